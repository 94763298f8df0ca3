"""Comparisons, tables of what was extracted, and linear fits, against scipy and enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from membench.errors import MembenchError
from membench.metrics import comparison
from membench.metrics.comparison import (
    holm,
    holm_p,
    rate_difference,
    sign_flip_p,
    unique_difference,
)
from membench.metrics.extracted import by_group, extracted
from membench.metrics.regression import linear_fit

hits = hnp.arrays(np.bool_, st.tuples(st.just(1), st.integers(1, 60)))


@given(first=hits, data=st.data())
def test_one_scale_is_mcnemar(first, data):
    second = data.draw(hnp.arrays(np.bool_, first.shape))
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    either = int(only_first + only_second)
    expected = stats.binomtest(int(only_first), either, 0.5).pvalue if either else 1.0
    found = rate_difference(first, second)
    assert found.p == pytest.approx(expected) and found.test == "McNemar, exact"
    assert found.value == pytest.approx((only_first - only_second) / first.size)
    assert found.interval[0] <= found.value <= found.interval[1]


@given(steps=hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(-6, 6)))
@settings(deadline=None)
def test_sign_flips_are_enumerated(steps):
    """Against all 2^n signs."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(steps))))
    expected = np.mean(np.abs(signs @ np.abs(steps)) >= abs(steps.sum()))
    assert sign_flip_p(steps) == pytest.approx(expected)


def test_sign_flips_of_thousands_of_pairs_are_normal():
    rng = np.random.default_rng(0)
    steps = rng.integers(-6, 7, 5000) + (rng.random(5000) < 0.02)
    z = abs(steps.sum()) / np.sqrt((steps**2).sum())
    assert sign_flip_p(steps) == pytest.approx(2 * stats.norm.sf(z), rel=0.02)


def twins(rng, n, p_first, p_second, together, n_scales=(1, 1)):
    """Hits of two methods on shared noise: with chance `together` an image takes one latent."""
    latent = rng.random((1, n))
    own = [np.where(rng.random((s, n)) < together, latent, rng.random((s, n))) for s in n_scales]
    return own[0] < p_first, own[1] < p_second


@pytest.mark.parametrize("n_scales", [(1, 1), (1, 2), (3, 2)])
def test_rates_that_are_equal_are_rarely_called_different(n_scales):
    """False positives at most 5 %, and the interval covers 0 in about 95 %."""
    rng = np.random.default_rng(1)
    runs = [rate_difference(*twins(rng, 150, 0.4, 0.4, 0.5, n_scales)) for _ in range(200)]
    assert np.mean([run.p < 0.05 for run in runs]) <= 0.05 + 2.5 * (0.05 * 0.95 / 200) ** 0.5
    assert np.mean([run.interval[0] <= 0 <= run.interval[1] for run in runs]) > 0.92


@pytest.mark.parametrize("n_scales", [(1, 1), (2, 2)])
def test_the_visible_difference_is_seen_with_its_power(n_scales):
    """A true difference of the size called visible is found in about 80 % of runs."""
    rng = np.random.default_rng(2)
    visible = np.mean(
        [rate_difference(*twins(rng, 400, 0.4, 0.4, 0.5, n_scales)).visible for _ in range(40)]
    )
    runs = [
        rate_difference(*twins(rng, 400, 0.4 + visible / 2, 0.4 - visible / 2, 0.5, n_scales))
        for _ in range(300)
    ]
    assert 0.7 < np.mean([run.p < 0.05 for run in runs]) < 0.88


def unique_run(rng, p_first, p_second, n=120, seeds=2):
    """Two methods that match training image j with chances p [N]; each image may match several."""
    unique, exclusive = [], []
    for _ in range(seeds):
        sides = []
        for p in (p_first, p_second):
            phi = rng.random((n, len(p))) < p
            k = phi.sum(axis=0)
            sides.append((int((k > 0).sum()), (phi & (k == 1)).sum(axis=1)))
        unique.append(sides[0][0] - sides[1][0])
        exclusive.append(sides[0][1] - sides[1][1])
    return unique_difference(unique, exclusive, n)


def test_unique_matches_that_are_equal_are_rarely_called_different():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(90, 0.7)) * 0.6
    runs = [unique_run(rng, p, p) for _ in range(400)]
    assert np.mean([run.p < 0.05 for run in runs]) <= 0.05
    assert all((run.p < 0.05) == (not run.interval[0] <= 0 <= run.interval[1]) for run in runs)


def test_a_real_difference_of_unique_matches_is_seen_and_covered():
    rng = np.random.default_rng(4)
    p, q = np.full(90, 0.006), np.full(90, 0.012)
    truth = float(((1 - (1 - p) ** 120) - (1 - (1 - q) ** 120)).sum()) / 120
    runs = [unique_run(rng, p, q) for _ in range(300)]
    assert np.mean([run.p < 0.05 and run.value < 0 for run in runs]) > 0.9
    assert np.mean([run.interval[0] <= truth <= run.interval[1] for run in runs]) > 0.93


@given(p=st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.3, 1.0]), max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p):
    """p_j is the largest, over all sets of hypotheses with j, of size times the least p."""
    expected = [
        max(
            min(1.0, len(subset) * min(p[i] for i in subset))
            for size in range(1, len(p) + 1)
            for subset in itertools.combinations(range(len(p)), size)
            if j in subset
        )
        for j in range(len(p))
    ]
    assert holm_p(p) == pytest.approx(expected)


def test_holm_keeps_the_family_at_five_percent_and_widens_what_is_visible():
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(200):
        base = rng.random(200)
        first = base[None] < 0.4
        found = [rate_difference(rng.random((1, 200)) < 0.4, first) for _ in range(4)]
        corrected = holm(found)
        false += any(difference.distinguishable for difference in corrected)
        assert all(c.visible > d.visible for c, d in zip(corrected, found, strict=True))
    assert false / 200 <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5


def test_verdicts_say_what_could_have_been_seen():
    same = np.zeros((1, 50), bool)
    found = rate_difference(same, same)
    assert found.value == 0 and found.p == 1 and found.visible > 0
    assert found.verdict("a", "b") == "not distinguishable"
    assert rate_difference(~same, same).verdict("a", "b") == "a is higher"
    assert rate_difference(same, ~same).verdict("a", "b") == "b is higher"
    with pytest.raises(MembenchError, match="unpaired"):
        rate_difference(same, same[:, :40])
    with pytest.raises(MembenchError, match="each seed"):
        unique_difference([], [], 10)
    assert comparison.POWER == 0.8


# ---------------------------------------------------------------- what was extracted


@given(seed=st.integers(0, 10**6), lower=st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_table_of_extracted_images_is_what_loops_find(seed, lower):
    rng = np.random.default_rng(seed)
    scales = {}
    for scale in (0.1, 0.3):
        cells = np.argwhere(rng.random((8, 5)) < 0.3)
        scales[scale] = (cells[:, 0], cells[:, 1], rng.integers(0, 4, len(cells)) / 2)
    found = extracted(scales, 5, lower=lower).rows(np.arange(5) * 10, np.arange(5) % 2)
    expected = []
    for j in range(5):
        mine = [
            (s if lower else -s, scale, i, s)
            for scale, pairs in scales.items()
            for i, r, s in zip(*(part.tolist() for part in pairs), strict=True)
            if r == j
        ]
        if mine:
            _, scale, image, best = min(mine)
            counts = {f"count_at_{x:g}": sum(m[1] == x for m in mine) for x in scales}
            expected.append(
                {"member": j, "source_index": 10 * j, "label": j % 2, "count": len(mine)}
                | counts
                | {"best_score": best, "best_at": scale, "best_image": image}
            )
    assert found == sorted(expected, key=lambda row: (-row["count"], row["member"]))


@given(data=st.data())
def test_groups_are_what_loops_find(data):
    n = data.draw(st.integers(1, 30))
    counts = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3)))
    labels = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3)))
    found = by_group(counts, labels, 5)
    assert [g.group for g in found] == sorted(set(labels.tolist()))
    for g in found:
        mine = [c for c, label in zip(counts, labels, strict=True) if label == g.group]
        assert (g.members, g.extracted) == (len(mine), sum(c > 0 for c in mine))
        assert g.matches == sum(mine)
        low, high = stats.binomtest(g.extracted, g.members).proportion_ci(method="exact")
        assert g.interval == pytest.approx((low, high)) and g.share == g.extracted / g.members
    assert sum(g.expected for g in found) == pytest.approx((counts > 0).sum())
    with pytest.raises(MembenchError, match="labels from 0 to"):
        by_group(counts, labels, int(labels.max()))


def test_expected_is_the_uniform_share():
    found = by_group(np.array([1, 0, 0, 2, 0, 0]), np.array([0, 0, 0, 0, 1, 1]), 2)
    assert [g.expected for g in found] == pytest.approx([4 / 3, 2 / 3])


# ---------------------------------------------------------------- linear fits


@given(
    x=hnp.arrays(np.float64, st.integers(3, 30), elements=st.integers(1, 300)),
    data=st.data(),
)
def test_linear_fit_is_scipys(x, data):
    y = data.draw(hnp.arrays(np.float64, len(x), elements=st.integers(0, 50)))
    if len(set(x)) == 1:
        with pytest.raises(MembenchError, match="all x are equal"):
            linear_fit(x, y)
        return
    found = linear_fit(x, y)
    if len(set(y)) == 1:  # scipy's correlation is NaN there
        assert (found.coefficient, found.intercept) == pytest.approx((0, y[0]))
        assert found.correlation == found.r_squared == 0 and found.p == 1
        return
    expected = stats.linregress(x, y)
    np.testing.assert_allclose(
        [found.coefficient, found.intercept, found.coefficient_error, found.intercept_error],
        [expected.slope, expected.intercept, expected.stderr, expected.intercept_stderr],
        rtol=1e-6,
        atol=1e-6,
    )
    assert found.correlation == pytest.approx(expected.rvalue, abs=1e-9)
    assert found.r_squared == pytest.approx(expected.rvalue**2, abs=1e-9)
    if abs(expected.rvalue) < 1 - 1e-9:
        assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
        half = stats.t.ppf(0.975, len(x) - 2) * expected.stderr
        assert found.coefficient_interval[1] - found.coefficient == pytest.approx(half, rel=1e-6)


def test_linear_fit_refuses_two_points():
    with pytest.raises(MembenchError, match="three points, not 2"):
        linear_fit(np.array([1, 2]), np.array([1, 2]))
