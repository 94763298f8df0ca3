"""Projection pruning: bounds that hold for every pair, and the answers of brute force."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_ranges import assert_streams, assert_tallies, distances, edges, flipped_squared

from membench.similarity import (
    Index,
    filter,
    index,
    nearest,
    nearest_with_flips,
    products,
    pruned,
    ranges,
    search,
    tally,
    tally_with_flips,
    within,
    within_with_flips,
)
from membench.similarity.sketch import Sketch, SketchFilter, principal_directions

ENGINES = list(products.engines())
engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rows(rng, n, d, dtype):
    """Rows near a plane of few dimensions, so that directions tell most pairs apart."""
    plane = rng.standard_normal((4, d)) * np.array([[60], [30], [10], [5]]) / 2
    made = rng.standard_normal((n, 4)) @ plane + rng.standard_normal((n, d)) + 128
    return made.clip(0, 255).astype(dtype)


def squared_distances(x, y):
    wide = np.int64 if x.dtype == np.uint8 else np.float64
    a, b = (z.reshape(len(z), -1).astype(wide) for z in (x, y))
    return np.array([((b - row) ** 2).sum(axis=1) for row in a])


def make(engine, reference, m):
    """A sketch by m principal directions; None: of the values themselves."""
    centre, _ = filter.centre_of(reference)
    directions = None if m is None else principal_directions(reference, centre, m)
    return Sketch(engine, centre, reference, directions)


def assert_bounds(made, x, y):
    """At its own distance no pair ranks above `most`; whatever ranks below `surely` is within.

    Returns how many pairs `surely` proves to be within the distances of some other pair.
    """
    filter_ = SketchFilter(made, made.features(x), np.empty(len(x) * len(y), made.engine.dtype))
    rank = filter_.ranks(made.features(y))
    squared = squared_distances(x, y).astype(np.float64)
    proven = 0
    for column in range(len(y)):
        at = squared[:, column]
        assert (rank[:, column] <= filter_.most(at)[:, 0]).all()
        within = rank <= filter_.surely(at)
        assert (squared[within] <= np.broadcast_to(at[:, None], squared.shape)[within]).all()
        proven += int(within.sum())
    return proven


@engines
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 5, 30, None])
def test_bounds_hold_for_every_pair(rng, engine, dtype, m):
    x, y = rows(rng, 20, 300, dtype), rows(rng, 200, 300, dtype)
    y[:3] = x[:3]
    y[3] = 0  # far from all others, and clipped
    proven = assert_bounds(make(engine, y, m), x, y)
    if m != 1:  # one direction sees too little to prove anything
        assert proven > (0 if m else len(x) * len(y) / 4), "the bound proves nothing"


@engines
@pytest.mark.parametrize("m", [8, None])
@pytest.mark.parametrize("scale", [1e-43, 1e-30, 1, 1e14])
def test_bounds_hold_at_any_scale(rng, engine, m, scale):
    """Also where float32 under- and overflows."""
    x, y = ((rng.standard_normal((n, 40)) * scale).astype(np.float32) for n in (20, 100))
    assert_bounds(make(engine, y, m), x, y)


@engines
def test_values_of_images_are_compared_without_error(rng, engine):
    """For 8-bit images without directions, both limits are the distance itself, but for 1 or 2."""
    x, y = (rng.integers(0, 256, (n, 12), dtype=np.uint8) for n in (10, 200))
    made = make(engine, y, None)
    filter_ = SketchFilter(made, made.features(x), np.empty(2000, engine.dtype))
    rank = filter_.ranks(made.features(y))
    squared = squared_distances(x, y)
    for radius in np.quantile(squared, [0.1, 0.5, 0.9]).astype(int):
        most, surely = (f(np.full(len(x), float(radius))) for f in (filter_.most, filter_.surely))
        assert (squared[rank <= most] <= radius + 2).all()
        assert (squared[~(rank <= surely)] > radius - 3).all()


@engines
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_directions_need_not_be_orthonormal(rng, engine, dtype):
    x, y = rows(rng, 20, 64, dtype), rows(rng, 100, 64, dtype)
    centre, _ = filter.centre_of(y)
    assert_bounds(Sketch(engine, centre, y[:5], rng.standard_normal((8, 64)) * 3), x, y)
    assert_bounds(Sketch(engine, centre, y[:1], np.ones((3, 64))), x, y)  # one direction thrice
    assert_bounds(Sketch(engine, centre, y, np.zeros((2, 64))), x, y)


def test_rows_too_long_for_integer_sums_are_projected_in_floats(rng, monkeypatch):
    monkeypatch.setattr(products.Int8, "limit", 2**20)
    x, y = rows(rng, 20, 300, np.uint8), rows(rng, 100, 300, np.uint8)
    made = make(products.Int8(), y, 5)
    assert not made.in_integers and assert_bounds(made, x, y)


@engines
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_products_are_exact(engine, data):
    terms = data.draw(st.integers(2, products.longest(engine) // 128 + 300))
    a, b = (data.draw(hnp.arrays(np.int8, (n, terms))) for n in (2, 3))
    found = engine.product(engine.store(a), engine.store(b), np.empty(6, engine.dtype))
    np.testing.assert_array_equal(found, a.astype(np.int64) @ b.T.astype(np.int64))


@engines
def test_the_longest_product_is_exact(engine):
    terms = products.longest(engine)
    extreme = np.full((1, terms), -128, np.int8)
    found = engine.product(engine.store(extreme), engine.store(extreme), np.empty(1, engine.dtype))
    rank = engine.dtype(terms * 2**13) + found  # of the largest magnitude: half a norm more
    assert int(rank[0, 0]) == terms * (2**14 + 2**13) < engine.limit


def test_products_that_overflow_are_not_used(monkeypatch):
    """As on processors that add pairs of products in 16 bits."""
    assert products._adds_up() == any(engine.name == "int8" for engine in ENGINES)

    def saturating(self, a, b, out):
        x, y = np.asarray(a, np.int32), np.asarray(b, np.int32)
        pairs = x[:, None, : len(x[0]) // 2 * 2] * y[:, : len(x[0]) // 2 * 2]
        pairs = pairs.reshape(len(x), len(y), -1, 2).sum(axis=3)
        return pairs.clip(-(2**15), 2**15 - 1).sum(axis=2)

    monkeypatch.setattr(products.Int8, "product", saturating)
    assert not products._adds_up()


@pytest.fixture
def small_sketches(monkeypatch):
    """Sketches whatever the work, in small blocks; set `engine_of` to (engine, directions)."""
    engine_of = [ENGINES[-1], 5]

    def forced(index, *_):
        return make(engine_of[0], index.rows, engine_of[1])

    for module in (search, ranges):
        monkeypatch.setattr(module, "choose", forced)
    monkeypatch.setattr(pruned, "shape", lambda *_: (14, 7, 60))
    monkeypatch.setattr(ranges, "_PAIR_BYTES", 2**20)  # 11 queries by 11 references
    return engine_of


def assert_exact(x, y, k):
    found = nearest(x, y, k)
    squared = squared_distances(x, y)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.index, order)
    expected = distances(np.take_along_axis(squared, order, axis=1), x.dtype)
    np.testing.assert_array_equal(found.distance, expected)


def assert_bands(x, y):
    squared = squared_distances(x, y)
    radii = np.concatenate([edges(squared, x.dtype), [-1, np.inf]])
    for radius in radii:
        assert_streams(within(x, y, radius), squared, x.dtype, radius)
    assert_tallies(tally(x, y, radii), squared, x.dtype, radii)
    each = np.quantile(distances(squared, x.dtype), 0.1, axis=1, method="nearest")
    assert_streams(within(x, y, each), squared, x.dtype, each)
    assert_tallies(tally(x, y, [each, each / 2]), squared, x.dtype, [each, each / 2])


@engines
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_equals_brute_force(rng, small_sketches, engine, dtype):
    x, y = rows(rng, 23, 100, dtype), rows(rng, 200, 100, dtype)
    for m in (5, None):
        small_sketches[:] = engine, m
        for k in (1, 10, 80):
            assert_exact(x, y, k)
        assert_bands(x, y)


@engines
@pytest.mark.parametrize("m", [5, None])
def test_flips_equal_brute_force(rng, small_sketches, engine, m):
    small_sketches[:] = engine, m
    x, y = (rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (20, 150))
    y[:5] = np.flip(x[:5], axis=2)
    squared = flipped_squared(x, y)
    order = np.argsort(squared, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(nearest_with_flips(x, y, 10).index, order)
    radii = edges(squared, np.uint8)
    for radius in radii:
        assert_streams(within_with_flips(x, y, radius), squared, np.uint8, radius)
    assert_tallies(tally_with_flips(x, y, radii), squared, np.uint8, radii)


def test_equals_brute_force_without_numba(rng, small_sketches, monkeypatch):
    for name in ("compiled", "compiled_for_floats"):
        monkeypatch.setattr(filter, name, lambda: None)
    monkeypatch.setattr(filter, "COMPILED", 0)
    for dtype in (np.uint8, np.float32):
        assert_exact(rows(rng, 23, 100, dtype), rows(rng, 200, 100, dtype), 10)


def test_equals_brute_force_compiled(rng, small_sketches, monkeypatch):
    """Also few pairs, which are else not worth it."""
    monkeypatch.setattr(filter, "COMPILED", 0)
    for dtype in (np.uint8, np.float32):
        assert_exact(rows(rng, 23, 300, dtype), rows(rng, 200, 300, dtype), 10)


def test_ties_are_ordered_by_index(rng, small_sketches):
    reference = np.concatenate([rows(rng, 5, 40, np.uint8)] * 40)
    assert_exact(np.concatenate([reference[:3], rows(rng, 9, 40, np.uint8)]), reference, 50)


def test_survivors_beyond_the_memory_are_taken_in_parts(rng, small_sketches, monkeypatch):
    monkeypatch.setattr(pruned, "_SURVIVORS", 2**40)
    reference = rng.integers(0, 2, (200, 40)).astype(np.uint8)
    assert_exact(reference[::9], reference, 3)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 255]),
    st.integers(1, 12),
    st.sampled_from([1, 3, None]),
    st.sampled_from(ENGINES),
)
def test_equals_brute_force_for_any_images(seed, top, k, m, engine):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        for module in (search, ranges):
            patch.setattr(module, "choose", lambda i, *_: make(engine, i.rows, m))
        patch.setattr(pruned, "shape", lambda *_: (5, 3, 11))
        patch.setattr(ranges, "_PAIR_BYTES", 2**22)
        x, y = (rng.integers(0, top + 1, (n, 9), dtype=np.uint8) for n in (8, 40))
        assert_exact(x, y, k)
        assert_bands(x, y)


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("columns", [10, 33, 500])
def test_least_holds_at_least_n(rng, n, columns):
    rank = rng.integers(0, 1000, (20, columns)).astype(np.int32)
    held = (rank <= pruned._least(rank, n)).sum(axis=1)
    assert (held >= n).all()
    assert held.mean() < 3 * n + 2, "not many more"


# -- what an index shares --------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Choices as on a machine of stated speeds, however small the work."""
    monkeypatch.setattr(index, "WORTH", 0)
    speeds = {
        products.Float32(): products.Speed(product=3e-11, compared=1e-9),
        ENGINES[-1]: products.Speed(product=3e-11, compared=1e-9),
    }
    monkeypatch.setattr(index, "engines", lambda: speeds)
    monkeypatch.setattr(index, "_seconds_per_pair", lambda *_: 2e-6)
    return speeds


def near_a_plane(rng, n=4000):
    plane = rng.standard_normal((4, 2048)) * 20
    return (rng.standard_normal((n, 4)) @ plane + 128).clip(0, 255).astype(np.uint8)


third = partial(search._kth, 3 / 4000)


def test_a_sketch_is_chosen_where_it_pays(rng, measured):
    """Few directions for rows near a plane; the values themselves, or none, for a flat spectrum."""
    near = Index(near_a_plane(rng))
    chosen = index.choose(near, near.rows, third, 2**28, 4000)
    assert chosen is not None and chosen.m < 600
    flat = Index(rng.standard_normal((4000, 256)).astype(np.float32))
    chosen = index.choose(flat, flat.rows, third, 2**28, 4000)
    assert chosen is None or chosen.directions is None
    assert index.choose(near, near.rows, third, 2**16, 4000) is None, "does not fit into the memory"


def test_small_searches_do_without(rng):
    x = rows(rng, 50, 30, np.uint8)
    assert index.choose(Index(x), x, third, 2**30, 50) is None


@pytest.fixture
def made(monkeypatch):
    """How many rows features were made of, by sketches that are taken whatever the work."""
    made = []
    real = Sketch.features
    monkeypatch.setattr(Sketch, "features", lambda s, x: made.append(len(x)) or real(s, x))
    for module in (search, ranges):
        monkeypatch.setattr(module, "choose", lambda index, *_: index.sketch(64))
    return made


def test_an_index_makes_features_once(rng, made):
    """Of all references, whatever is searched; and answers as the array does."""
    reference = near_a_plane(rng, 3000)
    x, shared = near_a_plane(rng, 60), Index(reference)
    radius = float(nearest(x, reference, 5).distance.max())
    made.clear()
    found = nearest(x, shared, 5)
    pairs = list(within(x, shared, radius))
    again = nearest(x[:10], shared, 5)
    counted = tally(x, shared, [radius])
    assert made.count(3000) == 1
    np.testing.assert_array_equal(again.index, found.index[:10])
    np.testing.assert_array_equal(found.index, nearest(x, reference, 5).index)
    plain = list(within(x, reference, radius))
    assert sum(len(p[0]) for p in pairs) == sum(len(p[0]) for p in plain) > 0
    np.testing.assert_array_equal(counted.count, tally(x, reference, [radius]).count)


def test_features_that_do_not_fit_are_made_block_by_block(rng, made):
    reference, x = near_a_plane(rng, 3000), near_a_plane(rng, 60)
    expected = nearest(x, reference, 5)
    assert made.count(3000) == 1
    made.clear()
    found = nearest(x, reference, 5, memory_bytes=2**20)
    assert max(made) < 3000 <= sum(made)
    np.testing.assert_array_equal(found.index, expected.index)


SEARCHES = """
import sys
from pathlib import Path
import numpy as np
from membench.similarity import nearest, ranges, search, tally, within

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

used = []
def choose(index, *_):
    used.append(len(index))
    return index.sketch(64)

search.choose = ranges.choose = choose
queries, reference = (np.load(path, mmap_mode="r") for path in sys.argv[1:3])
bound, radius = int(sys.argv[3]), float(nearest(queries, reference[:3000]).distance.max())
list(within(queries, reference[:3000], radius))  # imports, compiled code
for run in (
    lambda: nearest(queries, reference, memory_bytes=bound),
    lambda: [None for _ in within(queries, reference, radius, memory_bytes=bound)],
    lambda: tally(queries, reference, [radius / 2, radius], memory_bytes=bound),
):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)
assert used.count(len(reference)) == 3
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_stays_within_its_memory(rng, tmp_path):
    """Resident memory of a process, pages of a map larger than the bound included."""
    bound = 64 * 2**20
    centres = rng.integers(50, 200, (500, 768), dtype=np.uint8)
    for name, n in (("queries", 300), ("reference", 120_000)):
        noise = rng.integers(0, 16, (n, 768), dtype=np.uint8)
        np.save(tmp_path / f"{name}.npy", centres[rng.integers(0, 500, n)] + noise)
    paths = [tmp_path / f"{name}.npy" for name in ("queries", "reference")]
    assert paths[1].stat().st_size > 1.3 * bound
    command = [sys.executable, "-c", SEARCHES, *map(str, paths), str(bound)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = 300 * 50 * 12 + 2 * 120_000 * 12
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 3 and max(peaks) < bound + result, peaks
