"""All scores of one cell, from its matches: a pure function, so that `verify` can repeat it.

Layout of the result, JSON-able, the same for one guidance scale and for the mean over several:

    {"n_images", "n_scales", "n_members", "n_heldout", "n_neighbours", "match", "confidence",
     "metric_versions": {metric: version},
     "bands": {mode: {"low" | "mid" | "high": {
         "lower", "upper", "reason": why something below is None,
         "members", "heldout": {"ams", "ams_interval", "ums", "ums_interval", "unique", "pairs"},
         "excess": {"ams", "ams_interval", "ums", "ums_interval"}}}},
     "l2_ratio": {"members", "members_interval", "heldout", "heldout_interval",
                  "excess", "excess_interval"},
     "top_percent": {"members" | "heldout": {"0.01": ..}, "excess": {"0.01": ..}},
     "percentile_95": {"members", "heldout", "excess"},
     "curve": {"threshold": [..], "members" | "heldout": {"ams": [..], "ums": [..]}}}

n_images is per guidance scale. excess = members - heldout: the same images against D_train and
against equally many images that nobody trained on. Lower nL2 is nearer: where `top_percent` and
`percentile_95` show extraction, their excess is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.metrics import image, intervals
from membench.metrics.calibration import Calibration
from membench.metrics.catalogue import METRIC_VERSIONS
from membench.metrics.image import Band, Match, Mode
from membench.metrics.invariants import SIDES, check_invariants
from membench.similarity.matches import Matches, nl2


@dataclass(frozen=True)
class _Side:
    """One guidance scale's images against one reference of n images."""

    score: NDArray[np.float64]
    index: NDArray[np.int32]
    ratio: NDArray[np.bool_] | None
    n: int


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
    shapes = {(len(m), m.n_members, m.n_heldout, m.members.index.shape[1]) for m in scales}
    if len(shapes) > 1:
        raise MembenchError("guidance scales differ in images, references or neighbours")
    n_images, n_members, n_heldout, n_neighbours = shapes.pop()
    if isinstance(calibration, dict):
        calibration = Calibration.from_dict(calibration)
    if calibration is not None and calibration.n_members != n_members:
        raise MembenchError(
            f"thresholds were calibrated on {calibration.n_members} members, "
            f"but the matches are over {n_members}"
        )
    if match not in image.MATCHES:
        raise MembenchError(f"match must be one of {', '.join(image.MATCHES)}, not {match!r}")
    values = calibration.values if calibration else None
    reasons = {
        level: t.reason for level, t in (calibration.thresholds if calibration else {}).items()
    }

    sides = {name: [_side(m, name) for m in scales] for name in SIDES}
    result: dict[str, Any] = {
        "n_images": n_images,
        "n_scales": len(scales),
        "n_members": n_members,
        "n_heldout": n_heldout,
        "n_neighbours": n_neighbours,
        "match": match,
        "confidence": intervals.CONFIDENCE,
        "metric_versions": dict(METRIC_VERSIONS),
        "bands": {
            mode: {
                level: _band(sides, band, match, reasons.get(level))
                for level, band in image.bands(mode, values).items()
            }
            for mode in modes
        },
        "l2_ratio": _l2_ratio(sides),
        "top_percent": {
            name: {
                f"{x:g}": _mean([image.top_percent(s.score[:, 0], x) for s in sides[name]])
                for x in image.TOP_PERCENTS
            }
            for name in SIDES
        },
        "percentile_95": {
            name: _mean([image.percentile_95(s.score[:, 0]) for s in sides[name]]) for name in SIDES
        },
        "curve": {"threshold": image.CURVE_THRESHOLDS.tolist()}
        | {name: _curve(sides[name], match) for name in SIDES},
    }
    top, tail = result["top_percent"], result["percentile_95"]
    top["excess"] = {x: top["members"][x] - top["heldout"][x] for x in top["members"]}
    tail["excess"] = tail["members"] - tail["heldout"]
    check_invariants(result)
    return result


def _side(matches: Matches, name: str) -> _Side:
    found = matches.members if name == "members" else matches.heldout
    several = found.distance.shape[1] > 1
    return _Side(
        nl2(found.distance),
        found.index,
        image.ratio_hits(found.distance) if several else None,
        matches.n_members if name == "members" else matches.n_heldout,
    )


@dataclass(frozen=True)
class _Counted:
    """One band against one reference, over S guidance scales of Q images."""

    hits: NDArray[np.bool_]  # F [S, Q]
    exclusive: NDArray[np.float64]  # mean over scales of a_i [Q]
    unique: float  # mean over scales
    pairs: float
    n: int

    @classmethod
    def count(cls, scales: list[_Side], band: Band, match: Match) -> _Counted:
        hits, exclusive, unique, pairs = [], [], [], []
        for side in scales:
            inside = band.contains(side.score)
            phi = image.matched(inside, match)
            counts = image.match_counts(phi, side.index, side.n)
            hits.append(image.hits(inside))
            exclusive.append(image.exclusive(phi, side.index, counts))
            unique.append(int(np.count_nonzero(counts)))
            pairs.append(int(counts.sum()))
        return cls(
            np.array(hits), np.mean(exclusive, axis=0), _mean(unique), _mean(pairs), scales[0].n
        )

    def scores(self) -> dict[str, Any]:
        n_images = self.hits.shape[1]
        low, high = intervals.unique_interval(self.unique, self.exclusive, self.n)
        return {
            "ams": float(self.hits.mean()),
            "ams_interval": _rate_interval(self.hits),
            "ums": self.unique / n_images,
            "ums_interval": [low / n_images, high / n_images],
            "unique": self.unique,
            "pairs": self.pairs,
        }


def _band(
    sides: dict[str, list[_Side]], band: Band | None, match: Match, reason: str | None
) -> dict[str, Any]:
    """Both sides of one band and their excess."""
    if band is None:
        rates: dict[str, Any] = dict.fromkeys(("ams", "ams_interval", "ums", "ums_interval"))
        empty = {name: {**rates, "unique": None, "pairs": None} for name in SIDES}
        return {"lower": None, "upper": None, "reason": reason, **empty, "excess": rates}
    members, heldout = (_Counted.count(sides[name], band, match) for name in SIDES)
    n_images = members.hits.shape[1]
    low, high = intervals.unique_difference(
        members.unique - heldout.unique, members.exclusive - heldout.exclusive
    )
    result: dict[str, Any] = {
        "lower": band.lower,
        "upper": band.upper,
        "reason": None,
        "members": members.scores(),
        "heldout": heldout.scores(),
        "excess": {
            "ams": float(members.hits.mean()) - float(heldout.hits.mean()),
            "ams_interval": _excess_interval(members.hits, heldout.hits),
            "ums": (members.unique - heldout.unique) / n_images,
            "ums_interval": [low / n_images, high / n_images],
        },
    }
    if match == "any" and not band.complete:
        for part in (*SIDES, "excess"):
            for key in ("ums", "ums_interval", "unique", "pairs"):
                if key in result[part]:
                    result[part][key] = None
        result["reason"] = "no UMS: the neighbours listed do not hold every pair of this band"
    return result


def _l2_ratio(sides: dict[str, list[_Side]]) -> dict[str, Any]:
    keys = [*SIDES, "excess"]
    ratios = {name: [s.ratio for s in sides[name] if s.ratio is not None] for name in SIDES}
    if not all(ratios.values()):
        return dict.fromkeys([*keys, *(f"{key}_interval" for key in keys)])
    members, heldout = (np.array(ratios[name]) for name in SIDES)
    return {
        "members": float(members.mean()),
        "members_interval": _rate_interval(members),
        "heldout": float(heldout.mean()),
        "heldout_interval": _rate_interval(heldout),
        "excess": float(members.mean()) - float(heldout.mean()),
        "excess_interval": _excess_interval(members, heldout),
    }


def _curve(sides: list[_Side], match: Match) -> dict[str, list[float]]:
    ams = [image.ams_curve(s.score) for s in sides]
    ums = [image.ums_curve(s.score, s.index, s.n, match) for s in sides]
    return {"ams": np.mean(ams, axis=0).tolist(), "ums": np.mean(ums, axis=0).tolist()}


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
