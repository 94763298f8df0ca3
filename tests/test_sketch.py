"""Projection pruning: bounds that hold for every pair, and the neighbours of brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membench.similarity import filter, products, pruned, search, sketch
from membench.similarity.search import nearest
from membench.similarity.sketch import Sketch, SketchFilter, principal_directions

ENGINES = list(products.engines())


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
    return np.array([((y.astype(wide) - row) ** 2).sum(axis=1) for row in x.astype(wide)])


def make(engine, reference, m):
    centre, _ = filter.centre_of(reference)
    directions = None if m is None else principal_directions(reference, centre, m)
    return Sketch(engine, centre, directions)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 5, 30, None])
def test_bounds_hold_for_every_pair(rng, engine, dtype, m):
    """At its own distance no pair ranks above `most`; whatever ranks below `surely` is within."""
    x, y = rows(rng, 20, 300, dtype), rows(rng, 200, 300, dtype)
    y[:3] = x[:3]
    y[3] = 0  # far from all others
    made = make(engine, y, m)
    out = np.empty(len(x) * len(y), engine.dtype)
    filter_ = SketchFilter(made, made.queries(x), out)
    rank = filter_.ranks_of(made.references(y))
    squared = squared_distances(x, y).astype(np.float64)
    sure = 0
    for column in range(len(y)):
        at = squared[:, column]
        assert (rank[:, column] <= filter_.most(at)[:, 0]).all()
        within = rank < filter_.surely(at)
        assert (squared[within] <= np.broadcast_to(at[:, None], squared.shape)[within]).all()
        sure += int(within.sum())
    if m != 1:  # one direction sees too little to prove anything
        assert sure > (0 if m else len(x) * len(y) / 4), "the bound proves nothing"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_directions_need_not_be_orthonormal(rng, engine):
    x, y = rows(rng, 20, 64, np.uint8), rows(rng, 100, 64, np.uint8)
    centre, _ = filter.centre_of(y)
    made = Sketch(engine, centre, rng.standard_normal((8, 64)) * 3)
    assert made.stretch > 9 and made.least < made.stretch
    filter_ = SketchFilter(made, made.queries(x), np.empty(2000, engine.dtype))
    rank = filter_.ranks_of(made.references(y))
    squared = squared_distances(x, y).astype(np.float64)
    for column in range(len(y)):
        assert (rank[:, column] <= filter_.most(squared[:, column])[:, 0]).all()


@pytest.fixture
def small_sketches(monkeypatch):
    """Sketches of 5 directions whatever the work, in blocks of 7 queries and 60 references."""
    used = []

    def forced(queries, reference, centre, *_):
        used.append(make(engine_of[0], reference, engine_of[1]))
        return used[-1]

    engine_of = [ENGINES[-1], 5]
    monkeypatch.setattr(search, "choose", forced)
    monkeypatch.setattr(pruned, "shape", lambda *_: (14, 7, 60))
    return engine_of


def assert_exact(x, y, k):
    found = nearest(x, y, k)
    squared = squared_distances(x, y)
    index = np.argsort(squared, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.index, index)
    scale = 255 if x.dtype == np.uint8 else 1
    distance = np.sqrt(np.take_along_axis(squared, index, axis=1)) / scale
    np.testing.assert_array_equal(found.distance, distance.astype(np.float32))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 10, 80])
def test_equals_brute_force(rng, small_sketches, engine, dtype, k):
    for m in (5, None):
        small_sketches[:] = engine, m
        assert_exact(rows(rng, 23, 100, dtype), rows(rng, 200, 100, dtype), k)


def test_ties_are_ordered_by_index(rng, small_sketches):
    reference = np.concatenate([rows(rng, 5, 40, np.uint8)] * 40)
    assert_exact(np.concatenate([reference[:3], rows(rng, 9, 40, np.uint8)]), reference, 50)


def test_survivors_beyond_the_memory_are_taken_in_parts(rng, small_sketches, monkeypatch):
    monkeypatch.setattr(pruned, "_SURVIVORS", 2**40)
    reference = rng.integers(0, 2, (200, 40)).astype(np.uint8)
    assert_exact(reference[::9], reference, 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 255]), st.integers(1, 12))
def test_equals_brute_force_for_any_images(seed, top, k):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "choose", lambda q, r, *_: make(ENGINES[-1], r, 3))
        patch.setattr(pruned, "shape", lambda *_: (5, 3, 11))
        x, y = (rng.integers(0, top + 1, (n, 9), dtype=np.uint8) for n in (8, 40))
        assert_exact(x, y, k)


def test_a_sketch_is_chosen_where_it_pays(rng, monkeypatch):
    """Few directions for rows near a plane; the values themselves, or none, for a flat spectrum."""
    monkeypatch.setattr(sketch, "WORTH", 0)
    usual = {products.Float32(): products.Speed(product=3e-11, compared=1e-9)}
    monkeypatch.setattr(sketch, "engines", lambda: usual)  # not those of a machine under load
    monkeypatch.setattr(sketch, "_seconds_per_pair", lambda *_: 2e-6)
    kth = lambda rows, squared: [  # noqa: E731
        (np.partition(squared, 2, axis=1)[:, 2], np.full(len(squared), -np.inf))
    ]
    centre = lambda x: filter.centre_of(x)[0]  # noqa: E731
    plane = rng.standard_normal((4, 2048)) * 20
    near = (rng.standard_normal((4000, 4)) @ plane + 128).clip(0, 255).astype(np.uint8)
    big = 256 * 2**20
    chosen = sketch.choose(near, near, centre(near), kth, big)
    assert chosen is not None and chosen.m < 600
    flat = rng.standard_normal((4000, 256)).astype(np.float32)
    chosen = sketch.choose(flat, flat, centre(flat), kth, big)
    assert chosen is None or chosen.directions is None
    assert sketch.choose(near, near, centre(near), kth, 2**16) is None


def test_small_searches_do_without(rng):
    x = rows(rng, 50, 30, np.uint8)
    assert sketch.choose(x, x, filter.centre_of(x)[0], None, 2**30) is None
