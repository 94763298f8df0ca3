"""SSCD and normalised L2 through one file: bands, pairs beyond the list, streams, flips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from membench.errors import MembenchError
from membench.metrics import calibrate, score
from membench.metrics.scores import count_band
from membench.similarity import NL2, SSCD, Band, Matches, Reference, match, nl2, sscd
from membench.similarity.measures import LEVELS

MODES = ("cumulative", "literal", "shifted")


def unit(rng, n, d=6):
    """Descriptors in clumps, so that many pairs are near and some are equal."""
    rows = rng.normal(size=(n, d)) + 2 * rng.integers(-1, 2, (n, d))
    rows[rng.random(n) < 0.2] = rows[0]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def gamma(a, b):
    """Brute force in float64, of the float32 rows brought to unit length."""
    a, b = (x.astype(np.float64) for x in (a, b))
    return 1 - ((a[:, None] - b) ** 2).sum(axis=2) / 2


def test_sscd_is_the_inner_product():
    rng = np.random.default_rng(0)
    a, b = unit(rng, 50), unit(rng, 60)
    distance = np.sqrt(((a[:, None].astype(float) - b) ** 2).sum(axis=2)).astype(np.float32)
    inner = a.astype(float) @ b.astype(float).T
    assert np.abs(sscd(distance) - inner).max() < 5e-7
    assert np.abs(sscd(distance.astype(float)) - sscd(distance)).max() < 2.4e-7
    with pytest.raises(MembenchError, match="finite"):
        sscd(np.array([np.nan]))


@given(scores=hnp.arrays(np.float64, 20, elements=st.sampled_from([0.39, 0.4, 0.5, 0.6, 1, -1])))
def test_sscd_bands_are_those_of_the_papers(scores):
    literal, cumulative = SSCD.bands("literal"), SSCD.bands("cumulative")
    np.testing.assert_array_equal(literal["low"].contains(scores), (scores >= 0.4) & (scores < 0.5))
    np.testing.assert_array_equal(literal["mid"].contains(scores), (scores >= 0.5) & (scores < 0.6))
    np.testing.assert_array_equal(literal["high"].contains(scores), scores >= 0.6)
    assert SSCD.bands("shifted") == literal
    union = np.zeros(20, bool)
    for level in reversed(LEVELS):
        union |= literal[level].contains(scores)
        np.testing.assert_array_equal(union, cumulative[level].contains(scores))
    assert [str(literal[level]) for level in LEVELS] == ["[0.4, 0.5)", "[0.5, 0.6)", "[0.6, 1]"]
    assert str(cumulative["low"]) == ">= 0.4" and str(NL2.bands("cumulative")["mid"]) == "<= 1.4"


def by_definition(scores, band):
    """AMS, UMS, pairs and a_i from the whole matrix of scores [Q, N]."""
    inside = band.contains(scores)
    best = band.contains(scores.max(axis=1))
    counts = inside.sum(axis=0)
    exclusive = (inside & (counts == 1)).sum(axis=1)
    return best.mean(), (counts > 0).sum() / len(scores), counts.sum(), exclusive


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), k=st.integers(1, 12), max_pairs=st.sampled_from([0, 5, 10**6]))
def test_scores_of_sscd_are_their_definition_however_many_pairs(seed, k, max_pairs):
    """With all pairs listed, kept beyond the list, or counted in a stream: the same numbers."""
    rng = np.random.default_rng(seed)
    images, members, heldout = unit(rng, 17), unit(rng, 30), unit(rng, 30)
    wanted = [band for mode in MODES for band in SSCD.bands(mode).values()]
    found = match(
        images, members, heldout, k, measure=SSCD, widest=0.4, bands=wanted, max_pairs=max_pairs
    )
    result = score(found, modes=MODES)
    for name, rows in (("members", members), ("heldout", heldout)):
        exact = gamma(images, rows)
        assert np.abs(exact - 0.4).min() > 1e-6, "a tie at an edge would be a matter of rounding"
        for mode in MODES:
            for level, band in SSCD.bands(mode).items():
                ams, ums, pairs, exclusive = by_definition(exact, band)
                side = result["bands"][mode][level][name]
                assert side["ams"] == pytest.approx(ams)
                assert side["ums"] == pytest.approx(ums)
                assert side["pairs"] == pairs
                counted = count_band(found, name, band)
                assert counted.known
                np.testing.assert_array_equal(counted.exclusive, exclusive)


def test_pairs_beyond_the_list_and_streams_are_really_used():
    rng = np.random.default_rng(1)
    images, members = unit(rng, 17), unit(rng, 30)
    bands = list(SSCD.bands("literal").values())
    options = {"measure": SSCD, "widest": 0.4, "bands": bands}
    kept = match(images, members, members, 3, **options)
    assert len(kept.members.beyond) and not kept.members.counted and kept.members.complete == 0.4
    streamed = match(images, members, members, 3, max_pairs=0, **options)
    assert not len(streamed.members.beyond) and len(streamed.members.counted) == 3
    assert streamed.members.complete > 0.4
    with pytest.raises(MembenchError, match="pairs are complete for thresholds from"):
        streamed.pairs(0.4)
    image, index, found = kept.pairs(0.4)
    exact = gamma(images, members)
    assert {(i, j) for i, j in zip(image, index, strict=True)} == {
        (i, j) for i, j in np.argwhere(exact >= 0.4)
    }
    np.testing.assert_allclose(found, exact[image, index], atol=3e-7)


def test_a_band_without_its_pairs_has_no_ums_and_says_so():
    rng = np.random.default_rng(1)
    found = match(unit(rng, 17), unit(rng, 30), unit(rng, 30), 3, measure=SSCD)
    band = score(found, modes=("literal",))["bands"]["literal"]["low"]
    assert band["members"]["ams"] is not None and band["members"]["ums"] is None
    assert "no UMS" in band["reason"]


def test_the_literal_low_band_of_nl2_is_counted_exactly():
    """[1.5, 10] holds nearly all pairs: never listed, counted in a stream."""
    rng = np.random.default_rng(2)
    images, members, heldout = (
        rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (9, 70, 70)
    )
    images[:3] = members[:3]
    low = NL2.bands("literal")["low"]
    found = match(images, members, heldout, bands=[low])
    result = score(found, modes=("literal",))["bands"]["literal"]["low"]
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (images, members))
    distance = (np.sqrt(((a[:, None] - b) ** 2).sum(axis=2)) / 255).astype(np.float32)
    unit_ = 0.5 * np.sort(distance.astype(np.float64), axis=1)[:, :50].mean(axis=1)
    exact = distance / unit_[:, None]
    inside = low.contains(exact)
    assert result["members"]["pairs"] == inside.sum() > 9 * 50
    assert result["members"]["unique"] == inside.any(axis=0).sum()
    assert result["members"]["ams"] == low.contains(nl2(found.members.listed.distance)[:, 0]).mean()


def test_flips_find_mirrored_copies():
    rng = np.random.default_rng(3)
    members, heldout = (rng.integers(0, 256, (60, 6, 6, 1), dtype=np.uint8) for _ in range(2))
    images = members[:5, :, ::-1].copy()
    plain = match(images, members, heldout)
    both = match(images, members, heldout, mirrored=images[:, :, ::-1].copy())
    assert plain.members.listed.distance[:, 0].min() > 0
    assert both.flips and not both.members.listed.distance[:, 0].any()
    np.testing.assert_array_equal(both.members.listed.index[:, 0], np.arange(5))
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (images, members))
    c = images[:, :, ::-1].reshape(5, -1).astype(np.int64)
    least = np.minimum(((a[:, None] - b) ** 2).sum(2), ((c[:, None] - b) ** 2).sum(2))
    expected = (np.sqrt(np.sort(least, axis=1)[:, :50]) / 255).astype(np.float32)
    np.testing.assert_array_equal(both.members.listed.distance, expected)


@pytest.mark.parametrize("max_pairs", [0, 10**6])
def test_flips_of_descriptors_unite_the_pairs(max_pairs):
    rng = np.random.default_rng(4)
    images, mirrored, members = unit(rng, 12), unit(rng, 12), unit(rng, 40)
    options = {"measure": SSCD, "widest": 0.4, "max_pairs": max_pairs, "mirrored": mirrored}
    bands = SSCD.bands("literal")
    found = match(images, members, members, 4, bands=list(bands.values()), **options)
    exact = np.maximum(gamma(images, members), gamma(mirrored, members))
    result = score(found, modes=("literal",))["bands"]["literal"]
    for level, band in bands.items():
        ams, ums, pairs, _ = by_definition(exact, band)
        side = result[level]["members"]
        assert (side["ams"], side["ums"]) == (pytest.approx(ams), pytest.approx(ums))
        assert side["pairs"] == pairs
    if not max_pairs:
        return
    image, index, values = found.pairs(0.4)
    assert {*zip(image.tolist(), index.tolist(), strict=True)} == {
        (int(i), int(j)) for i, j in np.argwhere(exact >= 0.4)
    }
    np.testing.assert_allclose(values, exact[image, index], atol=3e-7)


def test_a_deduplicated_reference_keeps_the_rows_of_the_split():
    rng = np.random.default_rng(5)
    members = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8)
    members[1::2] = members[::2]  # every second one a copy
    keep = np.arange(0, 80, 2, dtype=np.int32)
    images = members[[10, 31]]
    found = match(images, Reference(members, keep, 80), Reference(members, keep, 80), k=20)
    assert found.members.listed.index[:, 0].tolist() == [10, 30]
    assert (found.members.listed.index % 2 == 0).all()
    assert (found.n_members, found.members.rows, found.members.near_duplicates) == (40, 80, 80)
    high = score(found, modes=("cumulative",))["bands"]["cumulative"]["high"]
    assert high["members"]["unique"] == 2
    twice = match(images, members, members, k=20)
    assert (
        score(twice, modes=("cumulative",))["bands"]["cumulative"]["high"]["members"]["unique"] == 4
    )


def test_a_smaller_twin_stands_against_as_many_members(tmp_path):
    """AMS and UMS are against all members, the excess between references of one size."""
    rng = np.random.default_rng(7)
    members, heldout = (rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (90, 60))
    images = members[[3, 70, 80]]
    with pytest.raises(MembenchError, match="as many images as there are members: 60 and 90"):
        match(images, members, heldout)
    found = match(images, members, heldout, members_twin=members[:60])
    found.save(tmp_path / "m.npz")
    result = score(Matches.load(tmp_path / "m.npz"), modes=("cumulative",))
    high = result["bands"]["cumulative"]["high"]
    assert (result["n_members"], result["n_members_twin"], result["n_heldout"]) == (90, 60, 60)
    assert high["members"]["ams"] == 1 and high["members"]["unique"] >= 3
    exact = score(match(images, members[:60], heldout), modes=("cumulative",))
    alone = exact["bands"]["cumulative"]["high"]
    assert high["excess"] == alone["excess"] and high["members_twin"] == alone["members"]
    assert result["mean"]["excess"] == exact["mean"]["excess"]
    assert result["l2_ratio"]["excess"] == exact["l2_ratio"]["excess"] == pytest.approx(1 / 3)


def test_matches_without_a_twin_make_a_null_but_no_scores(tmp_path):
    rng = np.random.default_rng(8)
    rows = rng.integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    match(rows[:3], rows, None).save(tmp_path / "m.npz")
    null = Matches.load(tmp_path / "m.npz")
    assert null.sides == ("members",) and null.n_heldout == 0
    with pytest.raises(MembenchError, match="no scores"):
        score(null, modes=("cumulative",))


def test_everything_survives_the_file(tmp_path):
    rng = np.random.default_rng(6)
    bands = list(SSCD.bands("literal").values())
    for max_pairs in (0, 10**6):
        found = match(
            unit(rng, 9), unit(rng, 30), unit(rng, 30), 3,
            measure=SSCD, widest=0.4, bands=bands, max_pairs=max_pairs,
        )  # fmt: skip
        found.save(tmp_path / "m.npz")
        again = Matches.load(tmp_path / "m.npz")
        assert score(again, modes=MODES) == score(found, modes=MODES)
        assert again.measure == SSCD and again.members.complete == found.members.complete


def test_thresholds_of_sscd_are_high_scores():
    """The 5 % of strangers that are nearest have the highest scores."""
    null = np.linspace(0, 0.8, 2001)
    found = calibrate(null, 10, measure=SSCD)
    low = found.thresholds["low"]
    assert (null >= low.value).mean() == pytest.approx(0.05, abs=1e-3)
    assert low.value == null[-100] and low.interval[0] < low.value < low.interval[1]
    mirrored = calibrate(-null, 10).thresholds["low"]
    assert (-mirrored.value, mirrored.achieved) == (low.value, low.achieved)
    images = match(np.eye(4, dtype=np.float32), *[np.eye(4, dtype=np.float32)] * 2)
    with pytest.raises(MembenchError, match=r"thresholds are of sscd"):
        score(images, calibrate(null, 4, measure=SSCD))


def test_band_edges_are_open_or_closed():
    values = np.array([1.0, 1.5, 2.0])
    assert Band(1.0, 2.0).contains(values).tolist() == [True, True, True]
    assert Band(1.0, 2.0, True, True).contains(values).tolist() == [False, True, False]
    assert Band(None, None).contains(values).all()
