"""Image-level metrics: pure functions on the nL2 scores and indices of the nearest references.

Shapes: `score` and `index` are [Q, n], nearest first; `inside` is bool [Q, n]. A lower
score is nearer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from membench.errors import MembenchError

Match = Literal["any", "best"]
Mode = Literal["calibrated", "cumulative", "literal", "shifted"]
Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEVELS = ("low", "mid", "high")
MATCHES: tuple[Match, ...] = ("any", "best")
MODES: tuple[Mode, ...] = ("calibrated", "cumulative", "literal", "shifted")
PAPER_THRESHOLDS = {"low": 1.5, "mid": 1.4, "high": 1.35}
"""Normalised-L2 thresholds of the SIDE papers."""
COMPLETE_BELOW = 2.0
"""Below this score the neighbour list holds every pair (see `Matches`)."""
RATIO = 1 / 3
"""An image is memorised by the l2 ratio if d_1 / d_2 is below this (Gu et al. 2023)."""
TOP_PERCENTS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10)
CURVE_THRESHOLDS = np.arange(200) / 100
"""0, 0.01 .. 1.99: the whole range in which the neighbour list is complete."""


@dataclass(frozen=True)
class Band:
    """Scores that count as a match: lower <= s <= upper, or lower < s if `open_below`."""

    lower: float | None
    upper: float
    open_below: bool = False

    def contains(self, score: Scores) -> Mask:
        inside = score <= self.upper
        if self.lower is not None:
            inside &= score > self.lower if self.open_below else score >= self.lower
        return inside

    @property
    def complete(self) -> bool:
        """Whether every pair of the band is among the listed neighbours."""
        return self.upper < COMPLETE_BELOW


def bands(mode: Mode, calibrated: dict[str, float | None] | None = None) -> dict[str, Band | None]:
    """The low, mid and high band of nL2 in a mode; None where no threshold could be calibrated.

    cumulative: s <= 1.5, s <= 1.4, s <= 1.35: reproduces independent figures, the default.
    literal: [1.5, 10], [1.4, 1.5], [1.35, 1.4], as printed in the papers (low holds nearly all).
    shifted: (1.4, 1.5], (1.35, 1.4], s <= 1.35: disjoint, they add up to the cumulative ones.
    calibrated: cumulative, with thresholds at given false-match rates (see `calibration`).
    Raises MembenchError for an unknown mode, or if calibrated thresholds are needed and missing.
    """
    low, mid, high = (PAPER_THRESHOLDS[level] for level in LEVELS)
    if mode == "cumulative":
        edges: list[Band | None] = [Band(None, low), Band(None, mid), Band(None, high)]
    elif mode == "literal":
        edges = [Band(low, 10.0), Band(mid, low), Band(high, mid)]
    elif mode == "shifted":
        edges = [Band(mid, low, True), Band(high, mid, True), Band(None, high)]
    elif mode == "calibrated":
        if calibrated is None:
            raise MembenchError("band mode 'calibrated' needs a calibration")
        tops = [calibrated[level] for level in LEVELS]
        edges = [None if top is None else Band(None, top) for top in tops]
    else:
        raise MembenchError(f"band mode must be one of {', '.join(MODES)}, not {mode!r}")
    return dict(zip(LEVELS, edges, strict=True))


def hits(inside: Mask) -> Mask:
    """F(x_i) [Q]: whether the best match lies in the band; AMS is its mean.

    AMS = (1 / N_G) sum_i F(x_i). Source: SIDE, average memorization score.
    """
    return inside[:, 0]


def matched(inside: Mask, match: Match) -> Mask:
    """phi(x_i) as a mask [Q, n]: every pair in the band ("any") or only the best match ("best")."""
    if match == "any":
        return inside
    if match != "best":
        raise MembenchError(f"match must be one of {', '.join(MATCHES)}, not {match!r}")
    best = np.zeros_like(inside)
    best[:, 0] = inside[:, 0]
    return best


def match_counts(phi: Mask, index: NDArray[Any], n_references: int) -> NDArray[np.int64]:
    """k_j [N]: the number of images that match reference j. UMS = |{j: k_j > 0}| / N_G (SIDE)."""
    return np.bincount(index[phi], minlength=n_references)


def exclusive(phi: Mask, index: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """a_i [Q]: the references that only image i matches, i.e. what the union loses without it."""
    return np.asarray((phi & (counts[index] == 1)).sum(axis=1))


def rarefied(counts: NDArray[np.int64], n_images: int, size: int) -> float:
    """Expected number of unique matches in a random subset of `size` of the n images.

    sum_j [1 - C(n - k_j, size) / C(n, size)], exact rarefaction (Hurlbert 1971).
    Scores at different N_G are comparable only at a common size. Raises MembenchError for a size
    outside 0..n: that would be extrapolation.
    """
    if not 0 <= size <= n_images:
        raise MembenchError(f"cannot rarefy {n_images} images to {size}")
    k = counts[counts > 0].astype(np.float64)
    left = n_images - k
    certain = left < size
    left = np.where(certain, size, left)
    log_missed = (
        gammaln(left + 1)
        - gammaln(left - size + 1)
        - gammaln(n_images + 1)
        + gammaln(n_images - size + 1)
    )
    return float(np.where(certain, 1.0, -np.expm1(np.minimum(log_missed, 0.0))).sum())


def ratio_hits(distance: NDArray[Any]) -> Mask:
    """Whether d_1 / d_2 < 1/3 [Q], from distances [Q, n >= 2].

    An exact copy (d_1 = 0) counts, also of an image that the reference holds twice (0 / 0).
    Source: Yoon et al. 2023; Gu et al. 2023 (On Memorization in Diffusion Models).
    """
    if distance.shape[1] < 2:
        raise MembenchError("the l2 ratio needs two neighbours; the reference has one image")
    first, second = distance[:, 0].astype(np.float64), distance[:, 1].astype(np.float64)
    return np.asarray((first < second * RATIO) | (first == 0))


def top_percent(best: Scores, percent: float) -> float:
    """Mean of the lowest `percent` % of best-match scores [Q]: ceil(percent Q / 100) images.

    Source: SIDE ("top x %": the printed figures fit the mean, not the percentile).
    """
    count = max(1, math.ceil(round(percent * len(best) / 100, 9)))
    return float(np.partition(best, count - 1)[:count].mean())


def percentile_95(best: Scores) -> float:
    """95th percentile of *similarity* of the best matches [Q], which is the 5 % quantile of nL2.

    Linear interpolation between order statistics. Source: Somepalli et al. 2023; SIDE.
    """
    return float(np.quantile(best, 0.05))


def ams_curve(score: Scores, thresholds: Sequence[float] | Scores = CURVE_THRESHOLDS) -> Scores:
    """AMS at every threshold, cumulative (s <= t)."""
    best = np.sort(score[:, 0])
    return np.searchsorted(best, thresholds, side="right") / len(score)


def ums_curve(
    score: Scores,
    index: NDArray[Any],
    n_references: int,
    match: Match,
    thresholds: Sequence[float] | Scores = CURVE_THRESHOLDS,
) -> Scores:
    """UMS at every threshold below 2, cumulative (s <= t)."""
    phi = matched(np.ones(score.shape, np.bool_), match)
    nearest = np.full(n_references, np.inf)  # the score at which a reference is first matched
    np.minimum.at(nearest, index[phi], score[phi])
    return np.searchsorted(np.sort(nearest), thresholds, side="right") / len(score)
