"""Image-level metrics: pure functions on the scores and indices of the nearest references.

Shapes: `score` and `index` are [Q, n], nearest first; `inside` is bool [Q, n]. Functions that need
an order take `far` scores, of which a lower one is nearer (`Measure.far`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.measures import Mask, Scores

Match = Literal["any", "best"]
MATCHES: tuple[Match, ...] = ("any", "best")
RATIO = 1 / 3
"""An image is memorised by the l2 ratio if d_1 / d_2 is below this (Gu et al. 2023)."""
TOP_PERCENTS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10)
PERCENTILES = (50, 90, 95, 99, 99.9)


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


def ratio_hits(distance: NDArray[Any]) -> Mask:
    """Whether d_1 / d_2 < 1/3 [Q], from distances [Q, n >= 2].

    An exact copy (d_1 = 0) counts, also of an image that the reference holds twice (0 / 0).
    Source: Yoon et al. 2023; Gu et al. 2023 (On Memorization in Diffusion Models).
    """
    if distance.shape[1] < 2:
        raise MembenchError("the l2 ratio needs two neighbours; the reference has one image")
    first, second = distance[:, 0].astype(np.float64), distance[:, 1].astype(np.float64)
    return np.asarray((first < second * RATIO) | (first == 0))


def top_percent(far: Scores, percent: float) -> float:
    """Mean of the nearest `percent` % of best-match scores [Q]: ceil(percent Q / 100) images.

    Source: SIDE ("top x %": the printed figures fit the mean, not the percentile).
    """
    count = max(1, math.ceil(round(percent * len(far) / 100, 9)))
    return float(np.partition(far, count - 1)[:count].mean())


def percentile(far: Scores, percent: float) -> float:
    """The `percent`-th percentile of *similarity* of the best matches [Q], as a far score.

    Of nL2 that is its (100 - percent) % quantile. Linear interpolation between order statistics.
    Source: Somepalli et al. 2023 and SIDE for the 95th.
    """
    return float(np.quantile(far, 1 - percent / 100))


def percentile_95(far: Scores) -> float:
    """95th percentile of similarity of the best matches [Q]: the 5 % quantile of nL2."""
    return float(np.quantile(far, 0.05))


def ams_curve(far: Scores, thresholds: Sequence[float] | Scores) -> Scores:
    """AMS at every threshold (far scores, ascending), cumulative; far: of the best matches [Q]."""
    return np.searchsorted(np.sort(far), thresholds, side="right") / len(far)


def ums_curve(
    far: Scores,
    index: NDArray[Any],
    n_references: int,
    thresholds: Sequence[float] | Scores,
    n_images: int,
) -> Scores:
    """UMS at every threshold (far scores, ascending), cumulative.

    far, index: of every pair that may count [P]; thresholds beyond the known pairs are the
    caller's to leave out.
    """
    nearest = np.full(n_references, np.inf)  # the score at which a reference is first matched
    np.minimum.at(nearest, index, far)
    return np.searchsorted(np.sort(nearest), thresholds, side="right") / n_images
