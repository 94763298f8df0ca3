"""Metrics against their definitions, scipy, simulation, and checked-in reference scores."""

import copy
import json
import math
import time

import numpy as np
import pytest
import reference_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from membench.errors import MembenchError
from membench.metrics import (
    METRIC_VERSIONS,
    Calibration,
    average,
    calibrate,
    check_invariants,
    image,
    intervals,
    score,
)
from membench.metrics.calibration import threshold
from membench.scoring import calibrate_from
from membench.similarity import NL2, Band, Matches, Neighbours, match, nl2
from membench.similarity.measures import LEVELS
from membench.specs import Similarity

ALL = ("calibrated", "cumulative", "literal", "shifted")
bands = NL2.bands


def pixels(rng, n, high=256):
    return rng.integers(0, high, (n, 4, 4, 1), dtype=np.uint8)


def make_matches(seed=0, n_images=40, n=80, copies=10):
    rng = np.random.default_rng(seed)
    members, heldout = pixels(rng, n), pixels(rng, n)
    images = pixels(rng, n_images)
    images[:copies] = members[rng.integers(0, n, copies)]
    return match(images, members, heldout)


@pytest.fixture(scope="module")
def matches():
    return make_matches()


@pytest.fixture(scope="module")
def calibration(matches):
    rng = np.random.default_rng(9)
    null = match(pixels(rng, 1000), pixels(rng, 80), pixels(rng, 80))
    return calibrate(null.scores()[:, 0], 80)


# ---------------------------------------------------------------- reference scores


def test_scores_change_only_with_their_version():
    new = json.loads(json.dumps(reference_scores.compute()))
    old = json.loads(reference_scores.PATH.read_text())
    changed = list(reference_scores.differences(old, new))
    assert not changed, "raise the metric's version, then run tests/reference_scores.py"


def test_a_changed_score_is_noticed():
    old = json.loads(reference_scores.PATH.read_text())
    new = copy.deepcopy(old)
    new["score_any"]["bands"]["cumulative"]["low"]["members"]["ams"] += 1e-6
    assert len(list(reference_scores.differences(old, new))) == 1


# ---------------------------------------------------------------- AMS, UMS, bands


def by_definition(neighbours, band, match):
    """AMS and UMS from loops over the spec's formulas."""
    found, total = set(), 0
    for distance, index in zip(neighbours.distance, neighbours.index, strict=True):
        mean = float(np.mean(distance, dtype=np.float64))
        scores = [float(d) / (0.5 * mean) if mean else 0.0 for d in distance]
        inside = [
            (band.lower is None or s > band.lower or (s == band.lower and not band.open_below))
            and s <= band.upper
            for s in scores
        ]
        total += inside[0]
        phi = inside if match == "any" else [inside[0]] + [False] * (len(inside) - 1)
        found |= {int(j) for j, is_in in zip(index, phi, strict=True) if is_in}
    return total / len(neighbours.index), len(found) / len(neighbours.index)


@pytest.mark.parametrize("how", ["any", "best"])
@pytest.mark.parametrize("mode", ALL)
def test_ams_and_ums_are_their_definition(matches, calibration, mode, how):
    result = score(matches, calibration, match=how, modes=ALL)["bands"][mode]
    for level, band in bands(mode, calibration.values).items():
        for side in ("members", "heldout"):
            ams, ums = by_definition(matches.side(side).listed, band, how)
            assert result[level][side]["ams"] == pytest.approx(ams)
            if mode == "literal" and level == "low" and how == "any":
                assert result[level][side]["ums"] is None and result[level]["reason"]
            else:
                assert result[level][side]["ums"] == pytest.approx(ums)


@given(scores=hnp.arrays(np.float64, 30, elements=st.sampled_from([0, 1.3, 1.35, 1.4, 1.5, 2])))
def test_modes_agree_at_band_edges(scores):
    """Shifted bands are disjoint and add up to the cumulative ones, edges included."""
    cumulative, shifted = bands("cumulative"), bands("shifted")
    literal = bands("literal")
    union = np.zeros(30, bool)
    for level in reversed(LEVELS):
        part = shifted[level].contains(scores)
        assert not (part & union).any()
        union |= part
        np.testing.assert_array_equal(union, cumulative[level].contains(scores))
    np.testing.assert_array_equal(literal["low"].contains(scores), scores >= 1.5)
    at_edge = scores == 1.4  # printed as the end of two bands
    assert (literal["mid"].contains(scores) & literal["high"].contains(scores) == at_edge).all()


def test_bands_refuse_what_they_do_not_know():
    with pytest.raises(MembenchError, match="band mode"):
        bands("narrow")
    with pytest.raises(MembenchError, match="calibration"):
        bands("calibrated")
    with pytest.raises(MembenchError, match="match"):
        image.matched(np.ones((1, 1), bool), "some")


@settings(deadline=None)
@given(data=st.data())
def test_curves_are_the_metrics_at_every_threshold(data):
    """Also with ties, since distances are few small integers."""
    q, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    distance = np.sort(
        data.draw(hnp.arrays(np.float32, (q, n), elements=st.integers(0, 4))), axis=1
    )
    index = np.array([data.draw(st.permutations(range(7)))[:n] for _ in range(q)])
    values = nl2(distance)
    for how in ("any", "best"):
        curve = np.array(NL2.curve)
        ams = image.ams_curve(values[:, 0], curve)
        counting = image.matched(np.ones(values.shape, bool), how)
        ums = image.ums_curve(values[counting], index[counting], 7, curve, q)
        for t in (0, 100, 135, 150, 199):
            inside = Band(None, t / 100).contains(values)
            phi = image.matched(inside, how)
            assert ams[t] == inside[:, 0].mean()
            assert ums[t] == len(set(index[phi].tolist())) / q


@settings(deadline=None)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 6), st.just(4))))
def test_exclusive_is_what_the_union_loses(phi):
    index = np.tile(np.arange(4), (len(phi), 1))
    counts = image.match_counts(phi, index, 4)
    whole = phi.any(axis=0).sum()
    lost = [whole - np.delete(phi, i, axis=0).any(axis=0).sum() for i in range(len(phi))]
    assert image.exclusive(phi, index, counts).tolist() == lost


# ---------------------------------------------------------------- other metrics


def test_l2_ratio_at_its_edge():
    third = np.nextafter(np.float64(1) / 3, 0)
    distance = np.array([[1, 3], [third, 1], [0, 0], [0, 1], [2, 2]], np.float64)
    assert image.ratio_hits(distance).tolist() == [False, True, True, True, False]
    with pytest.raises(MembenchError, match="two neighbours"):
        image.ratio_hits(np.ones((2, 1)))


@given(
    hnp.arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 2)),
    st.sampled_from(image.TOP_PERCENTS),
)
def test_top_percent_is_the_mean_of_the_lowest(best, percent):
    count = -(-int(100 * percent) * len(best) // 10_000)
    assert image.top_percent(best, percent) == pytest.approx(np.mean(sorted(best)[:count]))


def test_top_percent_counts_exactly():
    """0.01 % of 10,000 images is one image, not two, whatever floating point makes of it."""
    best = np.arange(10_000.0)
    for percent in image.TOP_PERCENTS:
        count = round(percent * 100)
        assert image.top_percent(best, percent) == (count - 1) / 2


def test_percentile_95_is_the_similar_tail():
    assert image.percentile_95(np.arange(101.0)) == pytest.approx(5)


# ---------------------------------------------------------------- intervals


@given(st.integers(1, 400), st.data())
def test_clopper_pearson_equals_scipy(n, data):
    successes = data.draw(st.integers(0, n))
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert intervals.clopper_pearson(successes, n) == pytest.approx(tuple(expected), abs=1e-9)


def test_clopper_pearson_refuses():
    for successes, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(MembenchError):
            intervals.clopper_pearson(successes, n)


def simulate(seed, n_images=80, n_references=60, runs=1500):
    """Images that match several correlated references at once; [runs, images, references]."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(n_references, 0.3))
    single = rng.random((runs, n_images)) < 0.35
    first = rng.choice(n_references, (runs, n_images), p=popularity)
    seen = np.zeros((runs, n_images, n_references), bool)
    for shift in (0, 7, 20):
        np.put_along_axis(seen, ((first + shift) % n_references)[..., None], single[..., None], 2)
        single = single & (rng.random(single.shape) < 0.5)
    return seen


def coverage(interval, truth):
    return np.mean([low <= truth <= high for low, high in interval])


def test_intervals_of_unique_matches_cover():
    """At least nominal coverage of E[U] and of the excess, with matches that come in clumps."""
    members, heldout = simulate(1), simulate(2)[:, :, ::-1]
    heldout &= np.random.default_rng(3).random(heldout.shape[:2])[..., None] < 0.4
    index = np.tile(np.arange(60), (80, 1))
    alone, unique = [], []
    for seen in (members, heldout):
        counts = [image.match_counts(phi, index, 60) for phi in seen]
        alone.append([image.exclusive(p, index, c) for p, c in zip(seen, counts, strict=True)])
        unique.append(np.array([(c > 0).sum() for c in counts]))
    for a, u in zip(alone, unique, strict=True):
        found = [intervals.unique_interval(x, y, 60) for x, y in zip(u, a, strict=True)]
        assert coverage(found, u.mean()) >= 0.94
    excess = unique[0] - unique[1]
    found = [intervals.unique_difference(d, a - b) for d, a, b in zip(excess, *alone, strict=True)]
    assert coverage(found, excess.mean()) >= 0.94
    width = np.mean([high - low for low, high in found])
    assert width < 2 * 2 * 1.96 * excess.std(), "so wide that it says nothing"


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.02, 0.01), (0.3, 0.05), (1.0, 0.0)])
def test_paired_and_bootstrap_intervals_cover(rates):
    rng = np.random.default_rng(4)
    draws = [[rng.random(100) < rate for rate in rates] for _ in range(400)]
    truth = rates[0] - rates[1]
    paired = [intervals.paired_difference(a, b) for a, b in draws]
    assert coverage(paired, truth) >= 0.93
    bootstrap = [intervals.bootstrap_mean(a, 0, 1) for a, _ in draws]
    assert coverage(bootstrap, rates[0]) >= 0.92
    assert all(high > low for low, high in paired + bootstrap)


def test_bootstrap_over_values_equals_bootstrap_over_images():
    values = np.random.default_rng(5).choice([0, 0.25, 0.5, 1], 200, p=[0.5, 0.2, 0.2, 0.1])
    rng = np.random.default_rng(6)
    padded = np.append(values, [0, 1])
    means = rng.choice(padded, (20_000, len(padded))).mean(axis=1)
    assert intervals.bootstrap_mean(values, 0, 1) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.004
    )
    assert intervals.bootstrap_mean(values, 0, 1) == intervals.bootstrap_mean(values, 0, 1)


# ---------------------------------------------------------------- calibration


@given(
    hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(0, 2)),
    st.sampled_from([0.5, 0.05, 0.01, 0.002]),
)
def test_threshold_is_the_largest_that_keeps_the_rate(null, rate):
    found = threshold(null, rate)
    allowed = [v for v in null if (null <= v).mean() <= rate + 1e-12]
    assert found.value == (max(allowed) if allowed else None)
    assert (found.reason is None) == bool(allowed)
    achieved = (null <= found.value).mean() if allowed else 0
    assert found.achieved == achieved <= rate + 1e-12
    assert found.achieved_interval[0] <= achieved <= found.achieved_interval[1]


def test_threshold_interval_covers_the_quantile():
    rng = np.random.default_rng(7)
    for rate in (0.05, 0.002):
        found = [threshold(rng.random(2048), rate).interval for _ in range(400)]
        assert 0.93 <= coverage([(low or -1, high or 9) for low, high in found], rate) <= 0.99


@pytest.mark.parametrize(("n", "rate"), [(1, 0.05), (100, 0.05), (2048, 0.002), (700, 0.01)])
def test_threshold_interval_equals_scipy(n, rate):
    null = np.arange(1.0, n + 1)
    low, high = stats.binom.ppf([0.025, 0.975], n, rate)
    expected = (low if low >= 1 else None, high + 1 if high < n else None)
    assert threshold(null, rate).interval == expected


def test_too_few_heldout_images_are_said_to_be():
    found = threshold(np.linspace(0.5, 1, 100), 0.002)
    assert found.value is None and "100 held-out images" in found.reason
    assert found.achieved_interval[1] > 0.002
    with pytest.raises(MembenchError, match="rate"):
        threshold(np.ones(3), 0.0)


def test_copies_are_dropped_before_calibrating():
    distance = np.array([[0, 4], [0.1, 4], [1, 4], [2, 4]], np.float32)
    null = Neighbours(distance, np.tile(np.arange(2, dtype=np.int32), (4, 1)))
    keep = distance[:, 0] > 0.1
    side = Matches.of(null, null, 2, 2)
    similarity = Similarity(false_match_rates=dict.fromkeys(LEVELS, 0.5))
    found = calibrate_from(side, keep, similarity)
    assert (found.n_heldout, found.n_dropped) == (2, 2)
    assert found.values["low"] == nl2(distance)[2, 0]
    with pytest.raises(MembenchError, match="copies"):
        calibrate_from(side, keep & False, similarity)


def test_calibration_survives_json(calibration):
    data = json.loads(json.dumps(calibration.to_dict()))
    assert Calibration.from_dict(data) == calibration
    for broken in ({}, {**data, "more": 1}, {**data, "thresholds": {"low": {}}}):
        with pytest.raises(MembenchError, match="not a calibration"):
            Calibration.from_dict(broken)


def test_calibrated_false_match_rate_is_the_nominal_one():
    """Fresh strangers pass the calibrated bands at the calibrated rate, within 4 sigma."""
    rng = np.random.default_rng(8)
    members, heldout = pixels(rng, 300), pixels(rng, 300)
    null = match(pixels(rng, 4000), members, heldout).scores()[:, 0]
    fresh = match(pixels(rng, 4000), members, heldout)
    found = score(fresh, calibrate(null, 300))["bands"]["calibrated"]
    for level, rate in zip(LEVELS, (0.05, 0.01, 0.002), strict=True):
        for side in ("members", "heldout"):
            passed = 4000 * found[level][side]["ams"]
            assert abs(passed - 4000 * rate) < 4 * math.sqrt(passed + 4000 * rate)


def test_scores_refuse_another_calibration(matches, calibration):
    data = {**calibration.to_dict(), "n_members": 7}
    with pytest.raises(MembenchError, match="calibrated on 7 members"):
        score(matches, data)


def test_uncalibrated_bands_are_none_with_a_reason(matches):
    rng = np.random.default_rng(1)
    null = match(pixels(rng, 30), pixels(rng, 80), pixels(rng, 80)).scores()[:, 0]
    found = score(matches, calibrate(null, 80))["bands"]["calibrated"]
    assert found["high"]["members"]["ams"] is None and "30 held-out" in found["high"]["reason"]
    assert found["low"]["members"]["ams"] is not None


# ---------------------------------------------------------------- score and average


def test_scores_are_json_and_repeatable(matches, calibration):
    first = score(matches, calibration, modes=ALL)
    text = json.dumps(first, allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(first))
    again = score(matches, calibration.to_dict(), modes=ALL)
    assert json.dumps(again) == text
    assert first["metric_versions"] == METRIC_VERSIONS


def test_copies_are_found_and_the_twin_is_not(matches, calibration):
    found = score(matches, calibration)["bands"]["calibrated"]["high"]
    assert found["members"]["pairs"] == 10 and found["members"]["ams"] == 10 / 40
    assert found["heldout"]["ams"] == 0
    assert found["excess"]["ams_interval"][0] > 0 and found["excess"]["ums_interval"][0] > 0


@pytest.mark.parametrize("n", [1, 2, 49, 51])
@pytest.mark.parametrize("how", ["any", "best"])
def test_small_references(n, how):
    result = score(make_matches(n=n, n_images=6, copies=2), modes=("cumulative",), match=how)
    assert result["n_neighbours"] == min(n, 50)
    assert (result["l2_ratio"]["members"] is None) == (n == 1)


def test_one_image():
    modes = ("cumulative", "literal", "shifted")
    result = score(make_matches(n_images=1, copies=1), modes=modes, match="best")
    assert result["bands"]["cumulative"]["high"]["members"]["unique"] == 1
    assert result["top_percent"]["members"]["0.01"] == 0


def test_all_images_and_references_equal():
    flat = np.full((60, 2, 2, 1), 9, np.uint8)
    result = score(match(flat[:5], flat, flat), modes=("cumulative",))
    high = result["bands"]["cumulative"]["high"]
    assert high["members"]["ams"] == 1 and high["excess"]["ams"] == 0
    assert high["members"]["unique"] == 50 and high["members"]["pairs"] == 5 * 50


def test_duplicated_members_count_once_each():
    rng = np.random.default_rng(2)
    members = pixels(rng, 60)
    members[:3] = members[0]
    result = score(match(members[:1], members, pixels(rng, 60)), modes=("cumulative",))
    assert result["bands"]["cumulative"]["high"]["members"]["unique"] == 3
    best = score(match(members[:1], members, members), modes=("cumulative",), match="best")
    assert best["bands"]["cumulative"]["high"]["members"]["unique"] == 1


def strip(result):
    """Without intervals, which are of another kind for averages."""
    if isinstance(result, dict):
        return {k: strip(v) for k, v in result.items() if not k.endswith("_interval")}
    return result


def flatten(result, path=()):
    if isinstance(result, dict):
        for key, value in result.items():
            yield from flatten(value, (*path, key))
    elif isinstance(result, list):
        for i, value in enumerate(result):
            yield from flatten(value, (*path, i))
    else:
        yield path, result


def test_average_is_the_mean_of_the_scores(calibration):
    scales = [make_matches(seed, copies=c) for seed, c in ((0, 10), (1, 0), (2, 5))]
    each = [dict(flatten(strip(score(m, calibration, modes=ALL)))) for m in scales]
    mean = dict(flatten(strip(average(scales, calibration, modes=ALL))))
    assert mean.keys() == each[0].keys()
    for path, value in mean.items():
        parts = [e[path] for e in each]
        if path == ("n_scales",):
            assert value == 3
        elif isinstance(value, float | int):
            assert value == pytest.approx(math.fsum(parts) / 3), path
        else:
            assert set(parts) == {value}, path


def test_average_of_one_scale_is_its_score(matches, calibration):
    assert average([matches], calibration) == score(matches, calibration)


def test_average_over_equal_scales_gains_no_certainty(matches, calibration):
    """The same images four times over are no more evidence than once."""
    once, four = (average([matches] * n, calibration)["bands"]["cumulative"]["low"] for n in (1, 4))
    for side in ("members", "excess"):
        assert four[side]["ums_interval"] == pytest.approx(once[side]["ums_interval"])
        widths = [b[side]["ams_interval"][1] - b[side]["ams_interval"][0] for b in (once, four)]
        assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_average_refuses_unequal_scales(matches):
    with pytest.raises(MembenchError, match="no guidance scales"):
        average([])
    with pytest.raises(MembenchError, match="differ"):
        average([matches, make_matches(n_images=3, copies=0)], modes=("cumulative",))
    with pytest.raises(MembenchError, match="match must be"):
        score(matches, match="all", modes=("cumulative",))


# ---------------------------------------------------------------- invariants


def broken(path, value):
    def change(result):
        *parents, last = path
        for key in parents:
            result = result[key]
        result[last] = value

    return change


CUMULATIVE = ("bands", "cumulative")
BROKEN = {
    "NaN": broken((*CUMULATIVE, "low", "members", "ams"), math.nan),
    "infinite": broken(("percentile_95", "members"), math.inf),
    "AMS above 1": broken((*CUMULATIVE, "low", "members", "ams"), 1.5),
    "not nested": broken((*CUMULATIVE, "low", "members", "pairs"), 10),
    "unique above pairs": broken((*CUMULATIVE, "high", "heldout", "unique"), 79),
    "UMS is not unique / N": broken((*CUMULATIVE, "high", "members", "ums"), 0.123),
    "outside its interval": broken((*CUMULATIVE, "high", "members", "ams_interval"), [0.9, 1]),
    "excess": broken((*CUMULATIVE, "low", "excess", "ams"), 0.01),
    "curve": broken(("curve", "members", "ums", 3), 5),
    "curve above 1": broken(("curve", "members", "ams", -1), 1.1),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_contradictory_scores_are_refused(matches, change):
    result = score(matches, modes=("cumulative",))
    check_invariants(result)
    change(result)
    with pytest.raises(MembenchError):
        check_invariants(result)


def test_nan_never_enters():
    with pytest.raises(MembenchError, match="finite"):
        Neighbours(np.array([[np.nan]], np.float32), np.zeros((1, 1), np.int32))


def test_ten_thousand_images_are_quick(calibration):
    """Ten seconds would mean a loop over images somewhere."""
    rng = np.random.default_rng(0)
    q, n = 10_000, 5_000
    sides = [
        Neighbours(
            np.sort(rng.random((q, 50), np.float32), axis=1),
            np.argsort(rng.random((q, 200)), axis=1)[:, :50].astype(np.int32),
        )
        for _ in range(2)
    ]
    start = time.perf_counter()
    score(Matches.of(*sides, n, n), modes=("cumulative",))
    assert time.perf_counter() - start < 10
