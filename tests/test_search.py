"""The neighbour search against brute force in integers, whatever the blocks and the data."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from membench.errors import MembenchError
from membench.similarity import filter, pairs, search
from membench.similarity.search import Neighbours, nearest


def brute_force(queries, reference, k):
    """Squared distances and indices by definition: int64 (or float64), stable sort."""
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    a, b = (x.reshape(len(x), -1).astype(wide) for x in (queries, reference))
    squared = np.array([((b - row) ** 2).sum(axis=1) for row in a])
    index = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, index, axis=1), index


def assert_exact(queries, reference, k=50, **options):
    found = nearest(queries, reference, k, **options)
    squared, index = brute_force(queries, reference, k)
    scale = 255 if queries.dtype == np.uint8 else 1
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.distance, (np.sqrt(squared) / scale).astype(np.float32))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 queries by 11 references, so that every path is taken on little data."""
    monkeypatch.setattr(search, "tile_rows", lambda *_: (7, 11))


def images(rng, n, shape=(4, 4, 3), low=0, high=256):
    return rng.integers(low, high, (n, *shape), dtype=np.uint8)


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("high", [1, 2, 256])
def test_equals_brute_force_in_small_blocks(rng, small_blocks, k, high):
    assert_exact(images(rng, 23, high=high), images(rng, 150, high=high), k)


def test_equals_brute_force_at_default_blocks(rng):
    assert_exact(images(rng, 40), images(rng, 3000))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_brute_force_for_any_images(data):
    d, top = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 255]))
    rows = st.integers(1, 30)
    draw = lambda n: data.draw(hnp.arrays(np.uint8, (n, d), elements=st.integers(0, top)))  # noqa: E731
    tile = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "tile_rows", lambda *_: tile)
        assert_exact(draw(data.draw(rows)), draw(data.draw(rows)), data.draw(st.integers(1, 12)))


def test_references_that_keep_getting_nearer(rng, small_blocks):
    """The worst order: every block holds only nearer references than all before it."""
    reference = np.arange(200, dtype=np.uint8)[::-1, None].repeat(6, axis=1)
    assert_exact(reference[-20:], reference, 50)


def smooth(rng, n, noise=3):
    """Images whose 2 x 2 patches are nearly flat: the search filters them by patch sums."""
    coarse = rng.integers(30, 220, (n, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + rng.integers(-noise, noise + 1, coarse.shape)).astype(np.uint8)


@pytest.fixture
def patches(monkeypatch):
    """The patch sizes of the filters that a search used on blocks of references."""
    used = []
    real = filter.Filter.ranks
    monkeypatch.setattr(
        filter.Filter, "ranks", lambda self, block: used.append(self.patch) or real(self, block)
    )
    return used


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("useful", [1, -1], ids=["patches", "patches given up"])
def test_smooth_images_equal_brute_force(rng, small_blocks, patches, monkeypatch, k, useful):
    monkeypatch.setattr(filter, "USEFUL", useful)
    assert_exact(smooth(rng, 20), smooth(rng, 200), k)
    assert patches[-1] == (2 if useful > 0 else 1)


def test_patches_that_keep_too_many(rng, small_blocks, patches, monkeypatch):
    """References that differ within their patches only: all survive the filter and are refined."""
    monkeypatch.setattr(filter, "USEFUL", 1)
    base = smooth(rng, 2, 0)
    reference = base.repeat(300, axis=0) + rng.integers(0, 2, (600, 8, 8, 3)).astype(np.uint8)
    assert_exact(np.concatenate([reference[:5], base]), reference, 3)
    assert patches[-1] == 2


def test_patches_never_exceed_the_true_distance(rng):
    """|f(x) - f(y)|^2 <= stretch |x - y|^2, with equality for constant patches."""
    for patch in (2, 4):
        for make in (smooth, images):
            shape = {} if make is smooth else {"shape": (8, 8, 3)}
            x, y = (make(rng, 50, **shape) for _ in range(2))
            f = [filter.patch_sums(z, patch).astype(int) for z in (x, y)]
            true = ((x.astype(int) - y) ** 2).reshape(50, -1).sum(axis=1)
            assert (((f[0] - f[1]) ** 2).sum(axis=1) <= patch**2 * true).all()
    flat = [np.full((1, 4, 4, 1), value, np.uint8) for value in (0, 255)]
    sums = [filter.patch_sums(z, 4).astype(int) for z in flat]
    assert (sums[1] - sums[0]).item() ** 2 == 16 * 16 * 255**2


def test_duplicates_are_ordered_by_index(rng, small_blocks):
    reference = np.concatenate([images(rng, 5)] * 40)
    queries = np.concatenate([reference[:3], images(rng, 3)])
    assert_exact(queries, reference)


def test_near_ties_that_the_margin_cannot_tell_apart(rng, small_blocks, monkeypatch):
    """Far from the centre, references that differ by one grey level: all survive the filter."""
    settled = []
    real = search._settle
    monkeypatch.setattr(search, "_settle", lambda *a: settled.append(len(a[0])) or real(*a))
    reference = images(rng, 400, (3072,), 250, 252)
    reference[0] = 0  # moves nothing: the centre is at the other references
    queries = images(rng, 5, (3072,), 0, 2)
    assert_exact(queries, reference, 3)
    assert len(settled) > 1, "the path under test was not taken"


def test_a_later_reference_nearer_by_one_unit(small_blocks):
    """After more ties than are kept, the limit is the k-th squared distance minus one, no less."""
    reference = np.array([[2, 1]] * 60 + [[2, 0]] + [[2, 1]] * 20, np.uint8)
    assert_exact(np.zeros((3, 2), np.uint8), reference, 1)


def test_the_filter_alone_is_not_exact(rng):
    """Float32 ranks do reorder such neighbours: a missing refinement would be noticed."""
    reference = images(rng, 2000, (3072,), 100, 156).astype(np.float32)
    query = images(rng, 1, (3072,)).astype(np.float32)
    rank = (reference**2).sum(axis=1) / 2 - (reference @ query.T)[:, 0]
    _, index = brute_force(query.astype(np.uint8), reference.astype(np.uint8), 2000)
    assert (np.argsort(rank, kind="stable") != index[0]).any()


def test_long_rows_do_not_overflow():
    """256 x 256 x 3 black against white: the sum of squares exceeds 32 bits."""
    black, white = (np.full((1, 256, 256, 3), value, np.uint8) for value in (0, 255))
    found = nearest(black, np.concatenate([white, black]))
    np.testing.assert_array_equal(found.index, [[1, 0]])
    np.testing.assert_array_equal(found.distance, np.sqrt([[0, black.size]]).astype(np.float32))


def test_blocks_do_not_change_the_answer(rng):
    queries, reference = images(rng, 100), images(rng, 700)
    expected = nearest(queries, reference)
    for memory in (2**17, 2**19, 2**22):
        found = nearest(queries, reference, memory_bytes=memory)
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_array_equal(found.distance, expected.distance)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((dtype, scale) for dtype in (np.float32, np.float64) for scale in (1e-30, 1, 1e14)),
        *((np.float16, scale) for scale in (1e-6, 1, 1e4)),
    ],
)
def test_descriptors_equal_brute_force(rng, small_blocks, dtype, scale):
    draw = lambda n: (scale * rng.standard_normal((n, 32))).astype(dtype)  # noqa: E731
    assert_exact(draw(20), draw(150), 10)


@pytest.mark.parametrize("dtypes", [(np.float16, np.float32), (np.float64, np.float16)])
def test_descriptors_of_different_precision(rng, small_blocks, dtypes):
    """Stored values are compared as they are: nothing is rounded to the coarser type."""
    rows = rng.standard_normal((170, 32))
    queries, reference = (x.astype(t) for x, t in zip((rows[:20], rows[20:]), dtypes, strict=True))
    assert_exact(queries, reference, 10)


def test_half_precision_ties_and_its_largest_value(rng, small_blocks):
    reference = np.round(rng.standard_normal((200, 3))).astype(np.float16)
    reference[7] = np.finfo(np.float16).max
    assert_exact(reference[::9], reference, 20)


def test_memory_maps_of_descriptors(rng, tmp_path, small_blocks):
    for dtype in (np.float16, np.float32):
        np.save(tmp_path / "x.npy", rng.standard_normal((150, 700)).astype(dtype))
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert_exact(mapped[:20] + dtype(0.5), mapped, 10)


def test_descriptors_with_ties(rng, small_blocks):
    reference = np.repeat(rng.standard_normal((10, 16)), 9, axis=0)
    assert_exact(reference[::20] + 1000, reference + 1000, 20)


def test_fewer_references_than_k(rng):
    reference = images(rng, 7)
    assert nearest(images(rng, 2), reference).distance.shape == (2, 7)
    assert_exact(reference, reference)


def test_one_image(rng):
    image = images(rng, 1)
    found = nearest(image, image)
    assert found.distance.tolist() == [[0]] and found.index.tolist() == [[0]]


def test_flat_and_shaped_images_agree(rng):
    queries, reference = images(rng, 5), images(rng, 60)
    np.testing.assert_array_equal(
        nearest(queries, reference.reshape(60, -1)).index, nearest(queries, reference).index
    )


def test_progress_counts_every_pair_once(rng, small_blocks):
    seen = []
    nearest(images(rng, 20), images(rng, 100), progress=seen.append)
    assert sum(seen) == 20 * 100 and len(seen) == 3 * 10


@pytest.mark.parametrize("kind", ["all equal", "random", "smooth"])
def test_stays_within_its_memory(rng, tmp_path, kind):
    """A memory map eight times the bound, also where every pair is a tie; float32 would be 32x."""
    bound = 4 * 2**20
    paths = [tmp_path / "queries.npy", tmp_path / "reference.npy"]
    for path, n in zip(paths, (300, 8 * bound // 768), strict=True):
        made = images(rng, n, (16, 16, 3), high=1 if kind == "all equal" else 256)
        if kind == "smooth":
            made = made[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)
        np.save(path, made)
    queries, reference = (np.load(path, mmap_mode="r") for path in paths)
    small = nearest(queries[:2], reference[:100])  # imports and caches
    many = np.arange(filter.COMPILED, dtype=np.int32) % 300
    filter.refine(filter.Candidates(many, many, many.astype(np.float32)), queries, reference)
    result = 300 * 50 * (4 + 4)
    tracemalloc.start()
    found = nearest(queries, reference, memory_bytes=bound)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reference.nbytes > 7 * bound
    assert peak < bound + 2 * result
    assert len(small.index) == 2 and found.index.shape == (300, 50)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float64, np.float32)])
def test_compiled_floats_are_those_of_numpy(rng, dtypes):
    """To the last bit: which pairs are compared at a time must not decide about ties."""
    run = pairs.compiled_for_floats()
    if run is None:
        pytest.skip("numba is not installed")
    row = np.arange(20, dtype=np.int32)
    for d in (*range(1, 20), 127, 128, 129, 136, 255, 256, 257, 300, 512, 513, 3072, 5001):
        x, y = (rng.standard_normal((20, d)).astype(dtype) for dtype in dtypes)
        squared = np.empty(20)
        run(x, y, row, row, squared)
        np.testing.assert_array_equal(squared, filter.squared_l2(x, y))
        assert len(set(squared)) == 20


def test_too_little_memory_is_refused(rng):
    with pytest.raises(MembenchError, match="memory_bytes"):
        nearest(images(rng, 2), images(rng, 2), memory_bytes=100)


def test_tiles_shrink_with_the_memory(rng):
    reference = np.empty((5000, 3072), np.uint8)
    tiles = [filter.tile_rows(reference, reference, 50, 2**20 * m) for m in (256, 64, 16, 4)]
    assert all(q * r > s * t for (q, r), (s, t) in pairwise(tiles))


GOOD = np.zeros((3, 4, 4, 1), np.uint8)
BAD = {
    "not an array": ([[1, 2]], GOOD, "queries must be an array .* not list"),
    "dimensions": (GOOD, GOOD[0], r"reference must be an array .* shape \(4, 4, 1\)"),
    "dtype": (GOOD.astype(np.int32), GOOD, "queries must be uint8, float16, float32 or float64"),
    "mixed": (GOOD, GOOD.astype(np.float32), "both"),
    "no queries": (GOOD[:0], GOOD, "queries are empty"),
    "no reference": (GOOD, GOOD[:0], "reference are empty"),
    "shapes": (GOOD, GOOD[:, :2], "differ in shape"),
    "transposed": (GOOD[:, :2], GOOD[:, :, :2], "differ in shape"),
    "NaN in half": (np.full((1, 2), np.nan, np.float16), np.ones((1, 2)), "queries hold NaN"),
    "infinite half": (np.ones((1, 2)), np.full((1, 2), np.inf, np.float16), "reference hold NaN"),
    "NaN": (np.full((1, 2), np.nan), np.ones((1, 2)), "queries hold NaN"),
    "infinite": (np.ones((1, 2)), np.full((1, 2), np.inf), "reference hold NaN"),
}


@pytest.mark.parametrize(("queries", "reference", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(queries, reference, message):
    with pytest.raises(MembenchError, match=message) as error:
        nearest(queries, reference)
    assert "\n" not in str(error.value)


def test_k_below_one_is_refused():
    with pytest.raises(MembenchError, match="k must be"):
        nearest(GOOD, GOOD, 0)


@pytest.mark.parametrize(
    ("distance", "index"),
    [
        ([[0.0, np.nan]], [[0, 1]]),
        ([[1.0, 0.5]], [[0, 1]]),
        ([[-1.0, 0.5]], [[0, 1]]),
        ([[0.0, 0.5]], [[0, -1]]),
        ([[0.0, 0.5]], [[0]]),
    ],
)
def test_impossible_neighbours_are_refused(distance, index):
    with pytest.raises(MembenchError):
        Neighbours(np.array(distance, np.float32), np.array(index, np.int32))
