"""Thresholds at given false-match rates, from real images that nobody trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from membench.errors import MembenchError
from membench.metrics.image import LEVELS
from membench.metrics.intervals import CONFIDENCE, clopper_pearson
from membench.similarity.matches import nl2
from membench.similarity.search import Neighbours

RATES = dict(zip(LEVELS, (0.05, 0.01, 0.002), strict=True))
"""False-match rates of the bands: 5, 1 and 0.2 %."""


@dataclass(frozen=True)
class Threshold:
    """The score at or below which at most a share `rate` of the held-out images matches.

    value: the threshold, an observed score; None with a `reason` if there are too few images.
    interval: order-statistic interval of the true quantile; None = open at that end.
    achieved, achieved_interval: the share at or below `value` and its Clopper-Pearson interval.
    """

    rate: float
    value: float | None
    interval: tuple[float | None, float | None]
    achieved: float
    achieved_interval: tuple[float, float]
    reason: str | None = None


@dataclass(frozen=True)
class Calibration:
    """The null distribution's thresholds for low, mid and high, and what they rest on.

    n_heldout: images in the null, after n_dropped copies of members were dropped from it:
    all with a nearest member within copy_distance (L2); None if the caller saw to that itself.
    """

    thresholds: dict[str, Threshold]
    n_heldout: int
    n_dropped: int
    n_members: int
    copy_distance: float | None

    @property
    def values(self) -> dict[str, float | None]:
        return {level: self.thresholds[level].value for level in LEVELS}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """Raises MembenchError for missing or unknown fields."""
        try:
            fields: dict[str, Any] = {
                level: {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in data["thresholds"][level].items()
                }
                for level in LEVELS
            }
            thresholds = {level: Threshold(**fields[level]) for level in LEVELS}
            return cls(**{**data, "thresholds": thresholds})
        except (KeyError, TypeError, AttributeError) as error:
            raise MembenchError(f"not a calibration: {error}") from None


def calibrate(
    heldout: Neighbours,
    n_members: int,
    *,
    rates: dict[str, float] | None = None,
    copy_distance: float | None = None,
    n_dropped: int = 0,
) -> Calibration:
    """Thresholds of nL2 from the neighbours of real held-out images over the members.

    heldout: `nearest(held-out images, members)`.
    copy_distance: held-out images with a member within this L2 distance are dropped first; strict
    and absolute, hence independent of the score, or the null would be biased.
    n_dropped: how many the caller has already dropped, to be recorded.
    Raises MembenchError if no image is left or a rate is not in (0, 1).
    """
    keep = np.ones(len(heldout.distance), np.bool_)
    if copy_distance is not None:
        keep = heldout.distance[:, 0] > copy_distance
    if not keep.any():
        raise MembenchError("no held-out image is left to calibrate on: all are copies of members")
    null = nl2(heldout.distance[keep])[:, 0]
    return Calibration(
        {level: threshold(null, rate) for level, rate in (rates or RATES).items()},
        n_heldout=len(null),
        n_dropped=n_dropped + int((~keep).sum()),
        n_members=n_members,
        copy_distance=copy_distance,
    )


def threshold(null: NDArray[np.float64], rate: float) -> Threshold:
    """The largest observed score at which at most a share `rate` of the null [M] matches.

    With the null sorted, r = floor(rate M): the r-th score, or, if it is tied with the next, the
    largest below the tie. Interval of the quantile: scores number l and u with l, u the 2.5 and
    97.5 % points of Binomial(M, rate), u plus one (Conover, Practical Nonparametric Statistics,
    3.2).
    """
    if not 0 < rate < 1:
        raise MembenchError(f"a false-match rate lies between 0 and 1, not {rate}")
    null = np.sort(null)
    n = len(null)
    allowed = min(int(round(rate * n, 9)), n - 1)
    tail = (1 - CONFIDENCE) / 2
    below = bdtr(np.arange(n + 1), n, rate)  # P(at most 0 .. n scores lie below the quantile)
    first = int(np.searchsorted(below, tail))
    last = int(np.searchsorted(below, 1 - tail)) + 1
    interval = (
        float(null[first - 1]) if first >= 1 else None,
        float(null[last - 1]) if last <= n else None,
    )
    allowed = int(np.searchsorted(null, null[allowed]))  # ties with the next score do not fit
    if allowed:
        value = float(null[allowed - 1])
        return Threshold(rate, value, interval, allowed / n, clopper_pearson(allowed, n), None)
    reason = f"{n} held-out images cannot show a false-match rate of {100 * rate:g} %"
    return Threshold(rate, None, interval, 0.0, clopper_pearson(0, n), reason)
