"""All scores of one cell, from its matches: a pure function, so that `verify` can repeat it.

Layout of the result, JSON-able, the same for one guidance scale and for the mean over several:

    {"measure", "n_images", "n_scales", "n_members", "n_heldout", "n_neighbours", "flips", "match",
     "near_duplicates": {"members" | "heldout": count or None}, "confidence",
     "metric_versions": {metric: version},
     "bands": {mode: {"low" | "mid" | "high": {
         "lower", "upper", "reason": why something below is None,
         SIDE: {"ams", "ams_interval", "ums", "ums_interval", "unique", "pairs"},
         "excess": {"ams", "ams_interval", "ums", "ums_interval"}}}},
     "l2_ratio": {"members", "members_interval", "heldout", "heldout_interval",
                  "excess", "excess_interval"},
     "top_percent": {"members" | "heldout": {"0.01": ..}, "excess": {"0.01": ..}},
     "percentile_95", "mean": {"members", "heldout", "excess"},
     "percentiles": {"members" | "heldout" | "excess": {"50": ..}},
     "curve": {"threshold": [..], "members" | "heldout": {"ams": [..], "ums": [..]}}}

SIDE is "members", "heldout" and, where fewer images are held out than there are members,
"members_twin": as many members as are held out. n_images is per guidance scale.
excess = members (or members_twin) - heldout: the same images against D_train and against equally
many images that nobody trained on. Lower nL2 is nearer: where its `top_percent`, `mean` and
percentiles show extraction, their excess is negative; that of SSCD is positive.
Thresholds of the curve go from the strictest on; its UMS is None where not every pair is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.metrics import image, intervals
from membench.metrics.calibration import Calibration
from membench.metrics.catalogue import METRIC_VERSIONS
from membench.metrics.image import Match
from membench.metrics.invariants import check_invariants, equal_side
from membench.similarity.matches import Matches
from membench.similarity.measures import Band, Measure, Mode, Scores


@dataclass(frozen=True)
class _Side:
    """One guidance scale's images against one reference of n images.

    score, index [Q, k]: the listed neighbours; beyond: (image, index, score) of further pairs [P].
    """

    matches: Matches
    name: str
    score: Scores
    index: NDArray[np.int32]
    beyond: tuple[NDArray[np.int32], NDArray[np.int32], Scores]
    ratio: NDArray[np.bool_] | None

    @classmethod
    def of(cls, matches: Matches, name: str) -> _Side:
        found = matches.side(name)
        distance = found.listed.distance
        in_pixels = matches.measure.sign == 1 and distance.shape[1] > 1
        return cls(
            matches,
            name,
            matches.scores(name),
            found.listed.index,
            (found.beyond.image, found.beyond.index, matches.scores_beyond(name)),
            image.ratio_hits(distance) if in_pixels else None,
        )

    @property
    def rows(self) -> int:
        return self.matches.side(self.name).rows

    @property
    def far(self) -> Scores:
        """Far scores of the best matches [Q]."""
        return np.asarray(self.matches.measure.far(self.score[:, 0]))


def score(
    matches: Matches,
    calibration: Calibration | dict[str, Any] | None = None,
    *,
    match: Match = "any",
    modes: Sequence[Mode] = ("calibrated", "cumulative"),
) -> dict[str, Any]:
    """The scores of one guidance scale. Raises MembenchError for options that do not fit."""
    return _scores([matches], calibration, match, modes)


def average(
    scales: Sequence[Matches],
    calibration: Calibration | dict[str, Any] | None = None,
    *,
    match: Match = "any",
    modes: Sequence[Mode] = ("calibrated", "cumulative"),
) -> dict[str, Any]:
    """The mean of the scores over guidance scales; image i is the same seed at every scale.

    "unique" and "pairs" are means too. Intervals take images, not (image, scale) pairs, as what
    was drawn at random. Raises MembenchError for no scales, or scales of unequal size.
    """
    return _scores(scales, calibration, match, modes)


def _scores(
    scales: Sequence[Matches],
    calibration: Calibration | dict[str, Any] | None,
    match: Match,
    modes: Sequence[Mode],
) -> dict[str, Any]:
    if not scales:
        raise MembenchError("there are no guidance scales to average")
    shapes = {
        (len(m), *(m.side(s).n for s in m.sides), m.scores().shape[1], m.measure.name, m.flips)
        for m in scales
    }
    if len(shapes) > 1:
        raise MembenchError("guidance scales differ in images, references or neighbours")
    names, measure, n_images = scales[0].sides, scales[0].measure, len(scales[0])
    if "heldout" not in names:
        raise MembenchError("matches without a held-out reference have no scores")
    n_members = scales[0].n_members
    if isinstance(calibration, dict):
        calibration = Calibration.from_dict(calibration)
    if calibration is not None and calibration.n_members != n_members:
        raise MembenchError(
            f"thresholds were calibrated on {calibration.n_members} members, "
            f"but the matches are over {n_members}"
        )
    if calibration is not None and calibration.measure != measure.name:
        raise MembenchError(
            f"thresholds are of {calibration.measure}, but the matches are of {measure.name}"
        )
    if match not in image.MATCHES:
        raise MembenchError(f"match must be one of {', '.join(image.MATCHES)}, not {match!r}")
    values = calibration.values if calibration else None
    reasons = {
        level: t.reason for level, t in (calibration.thresholds if calibration else {}).items()
    }

    sides = {name: [_Side.of(m, name) for m in scales] for name in names}
    thresholds = [t for t in measure.curve if _on_curve(t, scales, match)]
    result: dict[str, Any] = {
        "measure": measure.name,
        "n_images": n_images,
        "n_scales": len(scales),
        **{f"n_{name}": scales[0].side(name).n for name in names},
        "n_neighbours": scales[0].scores().shape[1],
        "near_duplicates": {name: scales[0].side(name).near_duplicates for name in names},
        "flips": scales[0].flips,
        "match": match,
        "confidence": intervals.CONFIDENCE,
        "metric_versions": dict(METRIC_VERSIONS),
        "bands": {
            mode: {
                level: _band(sides, band, match, reasons.get(level))
                for level, band in measure.bands(mode, values).items()
            }
            for mode in modes
        },
        "l2_ratio": _l2_ratio(sides),
        "top_percent": _of_best(
            sides, {f"{x:g}": partial(image.top_percent, percent=x) for x in image.TOP_PERCENTS}
        ),
        "percentiles": _of_best(
            sides, {f"{x:g}": partial(image.percentile, percent=x) for x in image.PERCENTILES}
        ),
        "percentile_95": _single(_of_best(sides, {"": image.percentile_95})),
        "mean": _single(_of_best(sides, {"": lambda far: float(far.mean())})),
        "curve": {"threshold": list(measure.curve)}
        | {name: _curve(sides[name], match, thresholds) for name in names},
    }
    check_invariants(result)
    return result


def _of_best(
    sides: dict[str, list[_Side]], functions: dict[str, Callable[[Scores], float]]
) -> dict[str, dict[str, float]]:
    """Functions of the best matches' far scores, in the measure's direction, and their excess."""
    measure = sides["members"][0].matches.measure
    found = {
        name: {
            key: float(measure.far(_mean([function(s.far) for s in sides[name]]))) + 0.0
            for key, function in functions.items()
        }
        for name in sides
    }
    against = found[equal_side(sides)]
    found["excess"] = {key: against[key] - found["heldout"][key] for key in functions}
    return found


def _single(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: values[""] for name, values in found.items()}


def _on_curve(threshold: float, scales: Sequence[Matches], match: Match) -> bool:
    """Whether the UMS at a threshold can be told: every pair that near is known."""
    band = scales[0].measure.up_to(threshold)
    return match == "best" or all(m.covers(band, name) for m in scales for name in m.sides)


@dataclass(frozen=True)
class _Counted:
    """One band against one reference, over S guidance scales of Q images."""

    hits: NDArray[np.bool_]  # F [S, Q]
    exclusive: NDArray[np.float64] | None  # mean over scales of a_i [Q]; None: pairs not known
    unique: float | None  # mean over scales
    pairs: float | None
    n: int

    @classmethod
    def count(cls, scales: list[_Side], band: Band, match: Match) -> _Counted:
        hits, exclusive, unique, pairs = [], [], [], []
        for side in scales:
            counted = _count(side, band, match)
            hits.append(counted.hits)
            if counted.known:
                exclusive.append(counted.exclusive)
                unique.append(int(np.count_nonzero(counted.counts)))
                pairs.append(int(counted.counts.sum()))
        reference = scales[0].matches.side(scales[0].name)
        if len(unique) < len(scales):
            return cls(np.array(hits), None, None, None, reference.n)
        return cls(
            np.array(hits), np.mean(exclusive, axis=0), _mean(unique), _mean(pairs), reference.n
        )

    def scores(self) -> dict[str, Any]:
        n_images = self.hits.shape[1]
        found: dict[str, Any] = {
            "ams": float(self.hits.mean()),
            "ams_interval": _rate_interval(self.hits),
            **dict.fromkeys(("ums", "ums_interval", "unique", "pairs")),
        }
        if self.unique is not None and self.exclusive is not None:
            low, high = intervals.unique_interval(self.unique, self.exclusive, self.n)
            found |= {
                "ums": self.unique / n_images,
                "ums_interval": [low / n_images, high / n_images],
                "unique": self.unique,
                "pairs": self.pairs,
            }
        return found


@dataclass(frozen=True)
class BandCounts:
    """One band of one guidance scale against one reference.

    hits: F(x_i), bool [Q]; counts: k_j, int [N], the images that match reference j; exclusive: a_i,
    int [Q], the references that only image i matches. known: whether every pair of the band is;
    if not, the last two are empty.
    """

    hits: NDArray[np.bool_]
    counts: NDArray[np.int64]
    exclusive: NDArray[np.int64]
    known: bool


def count_band(matches: Matches, side: str, band: Band, match: Match = "any") -> BandCounts:
    """What AMS, UMS and their intervals are made of, for one band of one guidance scale."""
    return _count(_Side.of(matches, side), band, match)


def _count(side: _Side, band: Band, match: Match) -> BandCounts:
    inside = band.contains(side.score)
    hits = image.hits(inside)
    counted = side.matches.side(side.name).counted.get(str(band))
    if match == "any" and not side.matches.covers(band, side.name):
        if counted is None:
            return BandCounts(hits, np.empty(0, np.int64), np.empty(0, np.int64), False)
        sole = counted.sole[counted.sole >= 0]
        exclusive = np.bincount(sole, minlength=len(hits))
        return BandCounts(hits, counted.count.astype(np.int64), exclusive, True)
    phi = image.matched(inside, match)
    counts = image.match_counts(phi, side.index, side.rows)
    who, which, score = side.beyond
    if match == "any" and len(who):
        more = band.contains(score)
        who, which = who[more], which[more]
        counts = counts + np.bincount(which, minlength=side.rows)
        exclusive = image.exclusive(phi, side.index, counts)
        exclusive = exclusive + np.bincount(who[counts[which] == 1], minlength=len(hits))
    else:
        exclusive = image.exclusive(phi, side.index, counts)
    return BandCounts(hits, counts, exclusive, True)


def _band(
    sides: dict[str, list[_Side]], band: Band | None, match: Match, reason: str | None
) -> dict[str, Any]:
    """Both sides of one band and their excess."""
    if band is None:
        rates: dict[str, Any] = dict.fromkeys(("ams", "ams_interval", "ums", "ums_interval"))
        empty = {name: {**rates, "unique": None, "pairs": None} for name in sides}
        return {"lower": None, "upper": None, "reason": reason, **empty, "excess": rates}
    counted = {name: _Counted.count(sides[name], band, match) for name in sides}
    members, heldout = counted[equal_side(sides)], counted["heldout"]
    n_images = members.hits.shape[1]
    excess: dict[str, Any] = {
        "ams": float(members.hits.mean()) - float(heldout.hits.mean()),
        "ams_interval": _excess_interval(members.hits, heldout.hits),
        "ums": None,
        "ums_interval": None,
    }
    why = "no UMS: the pairs kept do not hold every pair of this band"
    if members.exclusive is not None and heldout.exclusive is not None:
        assert members.unique is not None and heldout.unique is not None
        low, high = intervals.unique_difference(
            members.unique - heldout.unique, members.exclusive - heldout.exclusive
        )
        excess["ums"] = (members.unique - heldout.unique) / n_images
        excess["ums_interval"] = [low / n_images, high / n_images]
        why = ""
    return {
        "lower": band.lower,
        "upper": band.upper,
        "reason": why or None,
        **{name: found.scores() for name, found in counted.items()},
        "excess": excess,
    }


def _l2_ratio(sides: dict[str, list[_Side]]) -> dict[str, Any]:
    keys = [*sides, "excess"]
    ratios = {name: [s.ratio for s in sides[name] if s.ratio is not None] for name in sides}
    if not all(ratios.values()):
        return dict.fromkeys([*keys, *(f"{key}_interval" for key in keys)])
    members, heldout = (np.array(ratios[name]) for name in (equal_side(sides), "heldout"))
    found: dict[str, Any] = {name: float(np.mean(hits)) for name, hits in ratios.items()}
    found |= {f"{name}_interval": _rate_interval(np.array(hits)) for name, hits in ratios.items()}
    return found | {
        "excess": float(members.mean()) - float(heldout.mean()),
        "excess_interval": _excess_interval(members, heldout),
    }


def _curve(sides: list[_Side], match: Match, thresholds: Sequence[float]) -> dict[str, list[Any]]:
    """AMS at every threshold of the measure; UMS at the given ones, None at the others."""
    measure: Measure = sides[0].matches.measure
    whole = [float(measure.far(t)) for t in measure.curve]
    ams = np.mean([image.ams_curve(s.far, whole) for s in sides], axis=0).tolist()
    known = [float(measure.far(t)) for t in thresholds]
    ums = []
    for side in sides:
        phi = image.matched(np.ones(side.score.shape, np.bool_), match)
        far, index = measure.far(side.score[phi]), side.index[phi]
        if match == "any":
            far = np.concatenate([far, measure.far(side.beyond[2])])
            index = np.concatenate([index, side.beyond[1]])
        ums.append(image.ums_curve(far, index, side.rows, known, len(side.score)))
    found: list[Any] = np.mean(ums, axis=0).tolist()
    return {"ams": ams, "ums": found + [None] * (len(whole) - len(found))}


def _rate_interval(hits: NDArray[np.bool_]) -> list[float]:
    """Interval of the mean of hits [scales, Q]."""
    if len(hits) == 1:
        return list(intervals.clopper_pearson(int(hits.sum()), hits.size))
    return list(intervals.bootstrap_mean(hits.mean(axis=0), 0, 1))


def _excess_interval(members: NDArray[np.bool_], heldout: NDArray[np.bool_]) -> list[float]:
    """Interval of mean(members) - mean(heldout), both [scales, Q]."""
    if len(members) == 1:
        return list(intervals.paired_difference(members[0], heldout[0]))
    difference = members.mean(axis=0) - heldout.mean(axis=0)
    return list(intervals.bootstrap_mean(difference, -1, 1))


def _mean(values: Sequence[float]) -> float:
    """The mean; a single value as it is, so that counts stay integers."""
    return values[0] if len(values) == 1 else math.fsum(values) / len(values)
