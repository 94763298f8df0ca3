"""Range search, counts and flips against brute force in int64 or float64."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from membench.errors import MembenchError
from membench.similarity import (
    Neighbours,
    filter,
    flips,
    merge,
    nearest,
    nearest_with_flips,
    ranges,
    search,
    tally,
    tally_with_flips,
    within,
    within_with_flips,
)


def squared_distances(queries, reference):
    """All squared distances [Q, N] by definition: int64 or float64."""
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    a, b = (x.reshape(len(x), -1).astype(wide) for x in (queries, reference))
    return np.array([((b - row) ** 2).sum(axis=1) for row in a])


def flipped_squared(queries, reference):
    """The smaller squared distance of each query and its mirror image."""
    mirrored = np.flip(queries, axis=2)
    return np.minimum(squared_distances(queries, reference), squared_distances(mirrored, reference))


def distances(squared, dtype):
    return (np.sqrt(squared) / (255 if dtype == np.uint8 else 1)).astype(np.float32)


def collect(blocks):
    """The pairs of all blocks, sorted by query, then index."""
    query, index, squared = (np.concatenate(x) for x in zip(*blocks, strict=True))
    assert (query.dtype, index.dtype, squared.dtype) == (np.int64, np.int32, np.float64)
    order = np.lexsort((index, query))
    return query[order], index[order], squared[order]


def assert_streams(blocks, squared, dtype, radius):
    inside = distances(squared, dtype) <= np.broadcast_to(radius, len(squared))[:, None]
    query, index, found = collect(blocks)
    np.testing.assert_array_equal(np.stack([query, index]), np.stack(np.nonzero(inside)))
    np.testing.assert_array_equal(found, squared[inside])


def assert_tallies(found, squared, dtype, radii):
    distance = distances(squared, dtype)
    rows = np.arange(len(squared))
    assert (found.count.dtype, found.total.dtype) == (np.int32, np.int64)
    assert len(found.count) == len(radii)
    for t, radius in enumerate(radii):
        inside = distance <= np.broadcast_to(np.float64(radius), len(squared))[:, None]
        np.testing.assert_array_equal(found.count[t], inside.sum(axis=0))
        np.testing.assert_array_equal(found.total[t], rows @ inside)


def edges(squared, dtype, quantiles=(0, 0.05, 0.3, 0.7, 1)):
    """Radii exactly at distances that occur, and just below."""
    exact = np.quantile(distances(squared, dtype), quantiles, method="nearest")
    below = np.nextafter(exact, np.float32(-1))
    return np.concatenate([exact, below]).astype(np.float64)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (search, ranges):
        monkeypatch.setattr(module, "tile_rows", lambda *_: (7, 11))


def images(rng, n, shape=(4, 4, 3), low=0, high=256):
    return rng.integers(low, high, (n, *shape), dtype=np.uint8)


def smooth(rng, n):
    """Images that the search filters by patch sums."""
    coarse = rng.integers(30, 220, (n, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + rng.integers(-3, 4, coarse.shape)).astype(np.uint8)


def copies(rng, n):
    """Few different images, many times."""
    return images(rng, 4)[rng.integers(0, 4, n)]


MAKERS = {
    "noise": images,
    "binary": lambda rng, n: images(rng, n, high=2),
    "all equal": lambda rng, n: images(rng, n, high=1),
    "smooth": smooth,
    "copies": copies,
    "float16": lambda rng, n: rng.standard_normal((n, 32)).astype(np.float16),
    "float32": lambda rng, n: rng.standard_normal((n, 32)).astype(np.float32),
    "far from 0": lambda rng, n: rng.standard_normal((n, 32)) + 1000,
    "tiny": lambda rng, n: 1e-30 * rng.standard_normal((n, 32)),
    "huge": lambda rng, n: 1e14 * rng.standard_normal((n, 32)),
    "float ties": lambda rng, n: rng.integers(0, 2, (n, 6)).astype(np.float32),
}


def pair_of(make, rng, q=23, n=150):
    both = MAKERS[make](rng, q + n)
    return both[:q], both[q:]


@pytest.mark.parametrize("make", MAKERS)
def test_within_and_tally_equal_brute_force(rng, small_blocks, make):
    queries, reference = pair_of(make, rng)
    squared = squared_distances(queries, reference)
    radii = edges(squared, queries.dtype)
    for radius in radii:
        assert_streams(within(queries, reference, radius), squared, queries.dtype, radius)
    assert_tallies(tally(queries, reference, radii), squared, queries.dtype, radii)


@pytest.mark.parametrize("make", ["noise", "smooth", "float16"])
def test_every_query_has_its_own_radius(rng, small_blocks, make):
    queries, reference = pair_of(make, rng)
    squared = squared_distances(queries, reference)
    radius = np.quantile(distances(squared, queries.dtype), 0.1, axis=1, method="nearest")
    radius[3], radius[4] = -1, np.inf
    assert_streams(within(queries, reference, radius), squared, queries.dtype, radius)
    radii = np.stack([radius, radius / 2, radius * 1.1])
    found = tally(queries, reference, radii)
    assert_tallies(found, squared, queries.dtype, radii)
    np.testing.assert_array_equal(found.radius, radii)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_images_equal_brute_force(data):
    shape = data.draw(st.sampled_from([(1, 1, 1), (1, 3, 1), (4, 4, 1)]))
    top = data.draw(st.sampled_from([1, 3, 255]))
    n = st.integers(1, 25)
    draw = lambda n: data.draw(hnp.arrays(np.uint8, (n, *shape), elements=st.integers(0, top)))  # noqa: E731
    queries, reference = draw(data.draw(n)), draw(data.draw(n))
    tile = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    plain, flipped = (f(queries, reference) for f in (squared_distances, flipped_squared))
    at = data.draw(st.floats(0, 1))
    k = data.draw(st.integers(1, 12))
    with pytest.MonkeyPatch.context() as patch:
        for module in (search, ranges):
            patch.setattr(module, "tile_rows", lambda *_: tile)
        for squared, stream, count in (
            (plain, within, tally),
            (flipped, within_with_flips, tally_with_flips),
        ):
            radii = edges(squared, np.uint8, [at])
            for radius in radii:
                assert_streams(stream(queries, reference, radius), squared, np.uint8, radius)
            assert_tallies(count(queries, reference, radii), squared, np.uint8, radii)
        assert_flipped_neighbours(queries, reference, k)


def assert_flipped_neighbours(queries, reference, k, **options):
    squared = flipped_squared(queries, reference)
    index = np.argsort(squared, axis=1, kind="stable")[:, :k]
    found = nearest_with_flips(queries, reference, k, **options)
    np.testing.assert_array_equal(found.index, index)
    expected = distances(np.take_along_axis(squared, index, axis=1), np.uint8)
    np.testing.assert_array_equal(found.distance, expected)


@pytest.mark.parametrize("make", ["noise", "binary", "all equal", "smooth", "copies"])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_flips_equal_brute_force(rng, small_blocks, make, k):
    queries, reference = pair_of(make, rng)
    reference = np.concatenate([reference, np.flip(queries[:5], axis=2)])
    assert_flipped_neighbours(queries, reference, k)
    if k == 1:
        squared = flipped_squared(queries, reference)
        radii = edges(squared, np.uint8)
        for radius in radii:
            found = within_with_flips(queries, reference, radius)
            assert_streams(found, squared, np.uint8, radius)
        assert_tallies(tally_with_flips(queries, reference, radii), squared, np.uint8, radii)


def test_a_flipped_copy_is_found(rng):
    reference = images(rng, 50, (8, 8, 3))
    found = nearest_with_flips(np.flip(reference[7:9], axis=2), reference, 3)
    np.testing.assert_array_equal(found.index[:, 0], [7, 8])
    assert (found.distance[:, 0] == 0).all()
    assert nearest(np.flip(reference[7:8], axis=2), reference, 1).distance > 1


def test_merge_equals_the_search_with_flips(rng):
    """Where float32 distances tell references apart, merging saved lists gives the same."""
    queries, reference = images(rng, 20), images(rng, 300)
    sides = [nearest(x, reference, 10) for x in (queries, np.flip(queries, axis=2))]
    merged, exact = merge(*sides, 10), nearest_with_flips(queries, reference, 10)
    np.testing.assert_array_equal(merged.distance, exact.distance)
    np.testing.assert_array_equal(merged.index, exact.index)
    assert (merged.index != sides[0].index).any() and (merged.index != sides[1].index).any()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_merge_equals_brute_force(data):
    n, k, q = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6)), 3
    both = data.draw(hnp.arrays(np.float32, (2, q, n), elements=st.integers(0, 4)))

    def listed(distance):
        index = np.argsort(distance, axis=1, kind="stable")[:, :k]
        return Neighbours(np.take_along_axis(distance, index, 1), index.astype(np.int32))

    found, expected = merge(listed(both[0]), listed(both[1]), k), listed(both.min(axis=0))
    np.testing.assert_array_equal(found.distance, expected.distance)
    np.testing.assert_array_equal(found.index, expected.index)


def test_merge_refuses_what_it_cannot_merge(rng):
    a, b = (nearest(images(rng, 3), images(rng, 9), k) for k in (2, 3))
    with pytest.raises(MembenchError, match="one shape"):
        merge(a, b, 2)
    with pytest.raises(MembenchError, match="at least 1"):
        merge(a, a, 0)


def test_a_found_distance_is_a_radius_that_holds_its_pair(rng):
    """Distances of `nearest` are rounded: used as radii they must not lose what was listed."""
    queries, reference = images(rng, 30, (8, 8, 3)), images(rng, 400, (8, 8, 3))
    found = nearest(queries, reference, 10)
    squared = squared_distances(queries, reference)
    query, index, _ = collect(within(queries, reference, found.distance[:, -1]))
    assert np.bincount(query).min() >= 10
    listed = set(zip(np.arange(30).repeat(10), found.index.ravel(), strict=True))
    assert listed <= set(zip(query, index, strict=True))
    # by the squared distance alone some would be lost: the test can fail
    assert (np.sqrt(np.sort(squared, axis=1)[:, 9]) / 255 > found.distance[:, -1]).any()


def test_bands_count_what_lies_between(rng, small_blocks):
    queries, reference = images(rng, 40, high=8), images(rng, 200, high=8)
    distance = distances(squared_distances(queries, reference), np.uint8)
    inner, outer = np.quantile(distance, [0.002, 0.02], method="nearest")
    found = tally(queries, reference, [inner, outer])
    for lower, upper, band in (
        (0, 1, (distance > inner) & (distance <= outer)),
        (None, 0, distance <= inner),
        (None, 1, distance <= outer),
    ):
        count, image = found.band(lower, upper)
        np.testing.assert_array_equal(count, band.sum(axis=0))
        sole = np.where(band.sum(axis=0) == 1, band.argmax(axis=0), -1)
        np.testing.assert_array_equal(image, sole)
        assert (image >= 0).any() and (count > 1).any()
    with pytest.raises(MembenchError, match="no band"):
        found.band(1, 0)


def test_a_radius_just_below_makes_an_edge_exclusive(rng):
    queries, reference = images(rng, 10, high=3), images(rng, 60, high=3)
    distance = distances(squared_distances(queries, reference), np.uint8)
    lower, upper = np.quantile(distance, [0.2, 0.6], method="nearest")
    below = np.nextafter(np.float32(lower), np.float32(-1))
    count, _ = tally(queries, reference, [below, upper]).band(0, 1)
    np.testing.assert_array_equal(count, ((distance >= lower) & (distance <= upper)).sum(axis=0))
    assert (distance == lower).sum() > 1


def test_wide_radii_are_counted_without_refining(rng, monkeypatch):
    """Half of all pairs lie within: only those that float32 cannot place are refined."""
    refined = []
    real = ranges.refine
    monkeypatch.setattr(ranges, "refine", lambda f, *a: refined.append(len(f)) or real(f, *a))
    queries, reference = images(rng, 100, (8, 8, 3)), images(rng, 1000, (8, 8, 3))
    squared = squared_distances(queries, reference)
    radii = np.quantile(distances(squared, np.uint8), [0.25, 0.5, 0.75])
    assert_tallies(tally(queries, reference, radii), squared, np.uint8, radii)
    assert 0 < sum(refined) < 0.02 * squared.size


def test_sums_of_row_numbers_are_exact_at_the_largest_block():
    """2,048 x 2,047 / 2 in float32, and beyond one block of queries."""
    queries, reference = np.zeros((5000, 2), np.uint8), np.array([[0, 0], [255, 255]], np.uint8)
    found = tally(queries, reference, [0.5])
    assert found.count.tolist() == [[5000, 0]] and found.total.tolist() == [[5000 * 4999 // 2, 0]]


@pytest.mark.parametrize("kind", ["all equal", "random", "flips"])
def test_stays_within_its_memory(rng, tmp_path, kind):
    """Every pair lies within the radius, and the map is eight times the bound."""
    bound = 4 * 2**20
    n = 8 * bound // 768
    for name, rows in (("queries", 12), ("reference", n)):
        high = 1 if kind == "all equal" else 256
        np.save(tmp_path / f"{name}.npy", images(rng, rows, (16, 16, 3), high=high))
    queries, reference = (
        np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("queries", "reference")
    )
    stream, count = (within_with_flips, tally_with_flips) if kind == "flips" else (within, tally)
    collect(stream(queries[:2], reference[:100], np.inf))  # imports and caches
    tracemalloc.start()
    pairs = sum(len(q) for q, _, _ in stream(queries, reference, 1e6, memory_bytes=bound))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs == 12 * n and peak < bound

    tracemalloc.start()
    found = count(queries, reference, [0.0, 1.0, 1e6], memory_bytes=bound)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.count[2] == 12).all()
    assert peak < bound + found.count.nbytes + found.total.nbytes


def test_blocks_do_not_change_the_answer(rng):
    queries, reference = images(rng, 100), images(rng, 700)
    radius = np.quantile(distances(squared_distances(queries, reference), np.uint8), 0.1)
    expected = collect(within(queries, reference, radius))
    assert len(expected[0]) == pytest.approx(7000, abs=100)
    counted = tally(queries, reference, [radius])
    for memory in (2**17, 2**19, 2**22):
        found = collect(within(queries, reference, radius, memory_bytes=memory))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        again = tally(queries, reference, [radius], memory_bytes=memory)
        np.testing.assert_array_equal(again.count, counted.count)
        np.testing.assert_array_equal(again.total, counted.total)


@pytest.mark.parametrize("sides", [1, 2])
def test_progress_counts_every_pair_once(rng, small_blocks, sides):
    queries, reference, seen = images(rng, 20), images(rng, 100), []
    stream, count = [(within, tally), (within_with_flips, tally_with_flips)][sides - 1]
    list(stream(queries, reference, 1, progress=seen.append))
    assert sum(seen) == sides * 20 * 100
    count(queries, reference, [1], progress=seen.append)
    assert sum(seen) == 2 * sides * 20 * 100


GOOD = np.zeros((3, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: within(GOOD, GOOD, np.nan), "NaN"),
        (lambda: within(GOOD, GOOD, [1, 2]), r"each of the 3 queries, not of shape \(2,\)"),
        (lambda: tally(GOOD, GOOD, [[1, 2]]), r"each of the 3 queries, not of shape \(1, 2\)"),
        (lambda: tally(GOOD, GOOD, 1.0), r"radii must be a list"),
        (lambda: tally(GOOD, GOOD, [1, np.nan]), "NaN"),
        (lambda: within(GOOD, GOOD[:0], 1), "reference are empty"),
        (lambda: within(np.full((1, 2), np.nan), np.ones((1, 2)), 1), "queries hold NaN"),
        (lambda: within(GOOD, GOOD, 1, memory_bytes=100), "memory_bytes"),
        (lambda: tally(GOOD, GOOD, [1], memory_bytes=100), "memory_bytes"),
        (lambda: nearest_with_flips(GOOD.reshape(3, -1), GOOD), "queries are uint8"),
        (lambda: within_with_flips(GOOD, GOOD.astype(float), 1), "reference are float64"),
        (lambda: tally_with_flips([1], GOOD, [1]), "queries are list"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(MembenchError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_mirroring_keeps_the_channels():
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 3, 2)
    mirrored = flips._mirrored(image)
    np.testing.assert_array_equal(mirrored[0, 1], [[10, 11], [8, 9], [6, 7]])


def test_bounds_of_squared_distances_enclose_the_radius(rng):
    """No pair within is above `most`, none beyond is below `least`, also for extreme radii."""
    radius = np.concatenate([10.0 ** rng.uniform(-44, 15, 500), [0, np.inf, -1]])
    for dtype in (np.uint8, np.float32):
        most, least = ranges._squared_bounds(radius, np.dtype(dtype))
        scale = 255 if dtype == np.uint8 else 1
        for factor in (1 - 2**-23, 1, 1 + 2**-24, 1 + 2**-23):
            squared = (np.where(np.isfinite(radius), radius, 1e15) * factor * scale) ** 2
            inside = filter.to_distance(squared, dtype) <= radius
            assert (squared[inside] <= most[inside]).all()
            assert (squared[~inside] > least[~inside]).all()
    assert most[-1] == least[-1] == -np.inf
