"""Unique matches against N_G: every subset counted, scipy, simulation, and published examples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from membench.errors import MembenchError
from membench.metrics import richness
from membench.metrics.richness import incidence

SPIDERS = {
    "girdled": ([46, 22, 17, 15, 15, 9, 8, 6, 6, 4] + [2] * 4 + [1] * 12),
    "logged": [88, 22, 16, 15, 13, 10, 8, 8, 7, 7, 7, 5] + [4] * 3 + [3] * 4 + [2] * 4 + [1] * 14,
}
"""Spiders of Sackett et al. 2011, the worked example of the R package iNEXT."""


def sparse_of(dense):
    return incidence(*np.nonzero(dense), *dense.shape)


def subsets(dense, size):
    """The number of unique matches in every subset of that size."""
    rows = itertools.combinations(range(len(dense)), size)
    return np.array([dense[list(chosen)].any(axis=0).sum() for chosen in rows])


any_matches = hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 6)))


@given(dense=any_matches, data=st.data())
@settings(max_examples=150, deadline=None)
def test_mean_and_variance_are_those_over_all_subsets(dense, data):
    size = data.draw(st.integers(0, len(dense)))
    counts, every = dense.sum(axis=0), subsets(dense, size)
    assert richness.rarefied(counts, len(dense), size) == pytest.approx(every.mean(), abs=1e-12)
    variance = richness.rarefied_variance(sparse_of(dense), size)
    assert variance == pytest.approx(every.var(), abs=1e-10)


@given(k=st.integers(0, 400), more=st.integers(1, 400), data=st.data())
@settings(max_examples=100, deadline=None)
def test_missed_is_hypergeometric(k, more, data):
    n = k + more
    size = data.draw(st.integers(0, n))
    expected = stats.hypergeom(n, k, size).pmf(0)
    assert richness.missed(np.array(k), n, size) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(dense=any_matches, size=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_the_papers_formula_is_drawing_with_replacement(dense, size):
    """Against the definition, term by term; at most the rarefied number, which sees each once."""
    n = len(dense)
    counts = dense.sum(axis=0)
    expected = sum(1 - (1 - k / n) ** size for k in counts.tolist())
    assert richness.with_replacement(counts, n, size) == pytest.approx(expected, abs=1e-12)
    if size <= n:
        exact = richness.rarefied(counts, n, size)
        assert richness.with_replacement(counts, n, size) <= exact + 1e-12


def draw(rng, p, n):
    """n images, each matching one training image by p [N] (the rest of the mass: none)."""
    return rng.multinomial(n, np.append(p, max(0.0, 1 - p.sum())))[:-1]


def test_unconditional_variance_is_that_of_new_images():
    """Its mean over sets of images against the variance seen in new ones: within 25 %."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(80, 0.7)) * 0.6
    runs = [draw(rng, p, 300) for _ in range(1500)]
    for size in (150, 300):
        seen = np.var([(draw(rng, p, size) > 0).sum() for _ in range(3000)])
        estimated = np.mean([richness.unconditional_variance(k, 300, size) for k in runs])
        assert 0.75 < estimated / seen < 1.25, size
    s, total = (runs[0] > 0).sum(), richness.chao1(runs[0], 300).value
    assert richness.unconditional_variance(runs[0], 300, 300) == pytest.approx(s * (1 - s / total))


def test_measured_prefixes_lie_in_the_conditional_band():
    """Of the images in random order, the first `size` are a random subset: 95 % within 1.96 sd."""
    rng = np.random.default_rng(1)
    dense = rng.random((120, 90)) < rng.random(90) * 0.05
    inside = 0
    for _ in range(400):
        order = rng.permutation(120)
        measured = dense[order[:40]].any(axis=0).sum()
        mean = richness.rarefied(dense.sum(axis=0), 120, 40)
        inside += (
            abs(measured - mean) <= 1.96 * richness.rarefied_variance(sparse_of(dense), 40) ** 0.5
        )
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("name", "n", "observed", "value", "low", "high"),
    [("girdled", 168, 26, 43.893, 30.511, 96.971), ("logged", 252, 37, 61.403, 43.502, 128.583)],
)
def test_chao1_of_a_published_example(name, n, observed, value, low, high):
    """Figures printed by iNEXT's ChaoRichness for its spider data."""
    counts = np.array(SPIDERS[name])
    assert counts.sum() == n and len(counts) == observed
    found = richness.chao1(counts, n)
    assert (round(found.value, 3), *np.round(found.interval, 3)) == (value, low, high)


def test_chao1_without_doubletons_and_without_singletons():
    found = richness.chao1(np.array([1, 1, 1, 5]), 8)
    assert found.value == pytest.approx(4 + 7 / 8 * 3)
    assert 4 < found.interval[0] < found.value < found.interval[1]
    assert richness.chao1(np.array([0, 3, 4]), 9).interval == (2, 2)
    assert richness.chao1(np.zeros(5, int), 9).value == 0


def test_chao1_is_a_lower_bound_that_its_interval_often_reaches():
    """Equal rates: the bound is the truth. Unequal: below it on average."""
    rng = np.random.default_rng(2)
    equal, unequal = np.full(100, 0.01), rng.dirichlet(np.full(100, 0.5))
    runs = [richness.chao1(draw(rng, equal, 150), 150) for _ in range(600)]
    assert np.mean([r.value for r in runs]) == pytest.approx(100, rel=0.05)
    assert np.mean([r.interval[0] <= 100 <= r.interval[1] for r in runs]) > 0.9
    assert np.mean([richness.chao1(draw(rng, unequal, 150), 150).value for _ in range(300)]) < 95


@given(counts=hnp.arrays(np.int64, 12, elements=st.integers(0, 5)))
def test_extrapolation_starts_at_what_was_seen_and_ends_at_chao1(counts):
    n = 40
    seen = int((counts > 0).sum())
    curve = [richness.extrapolated(counts, n, size) for size in (n, 50, 100, 10**9)]
    assert curve[0] == seen and curve == sorted(curve)
    assert curve[-1] == pytest.approx(richness.chao1(counts, n).value, rel=1e-6)


def test_extrapolations_predict_twice_and_three_times_the_images():
    """Mean over runs of both predictors from 200 images against what 400 and 600 images show."""
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(300, 1.0))
    runs = [draw(rng, p, 200) for _ in range(300)]
    for size, tolerance in ((400, 0.02), (600, 0.06)):
        truth = float((1 - (1 - p) ** size).sum())
        for predict in (
            lambda k, n: richness.extrapolated(k, 200, n),
            lambda k, n: richness.good_toulmin(k, 200, n).value,
        ):
            found = np.mean([predict(k, size) for k in runs])
            assert found == pytest.approx(truth, rel=tolerance), size


def test_good_toulmin_covers_up_to_twice_the_images():
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.full(300, 1.0))
    truth = float((1 - (1 - p) ** 400).sum())
    runs = [richness.good_toulmin(draw(rng, p, 200), 200, 400).interval for _ in range(500)]
    assert np.mean([low <= truth <= high for low, high in runs]) > 0.93


@pytest.mark.parametrize("size", [250, 300, 400, 700])
def test_good_toulmin_is_its_series(size):
    """Against sums over i of the published formula, with scipy's binomial tail for t > 1."""
    counts = np.array([1] * 30 + [2] * 12 + [3] * 5 + [4, 4, 7])
    n, t = 200, size / 200 - 1
    total = 0.0
    for i in range(1, 8):
        tail = 1.0
        if t > 1:
            m = math.floor(0.5 * math.log(n * t**2 / (t - 1)) / math.log(3))
            tail = stats.binom(m, 2 / (2 + t)).sf(i - 1)
        total -= (-t) ** i * tail * (counts == i).sum()
    assert richness.good_toulmin(counts, n, size).value == pytest.approx(len(counts) + total)


def test_what_cannot_be_said_is_refused():
    counts = np.array([1, 2, 3])
    for function in (richness.rarefied, richness.unconditional_variance):
        with pytest.raises(MembenchError, match="cannot rarefy 10 images to 11"):
            function(counts, 10, 11)
    for function in (richness.extrapolated, richness.good_toulmin):
        with pytest.raises(MembenchError, match="rarefy"):
            function(counts, 10, 9)
    with pytest.raises(MembenchError, match="nothing beyond 33, not of 40"):
        richness.good_toulmin(counts, 10, 40)
    with pytest.raises(MembenchError, match="listed twice"):
        incidence(np.array([0, 0]), np.array([1, 1]), 2, 2)


def test_ten_thousand_images_are_quick(benchmark_seconds=2.0):
    import time

    rng = np.random.default_rng(5)
    image, reference = np.divmod(np.unique(rng.integers(0, 10_000 * 5_000, 40_000)), 5_000)
    found = incidence(image, reference, 10_000, 5_000)
    started = time.monotonic()
    assert richness.rarefied_variance(found, 5_000) > 0
    assert time.monotonic() - started < benchmark_seconds
