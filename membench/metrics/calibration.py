"""Thresholds at given false-match rates, from real images that nobody trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import bdtr

from membench.errors import MembenchError
from membench.metrics.intervals import CONFIDENCE, clopper_pearson
from membench.similarity.measures import LEVELS, NL2, Measure, Scores

RATES = dict(zip(LEVELS, (0.05, 0.01, 0.002), strict=True))
"""False-match rates of the bands: 5, 1 and 0.2 %."""


@dataclass(frozen=True)
class Threshold:
    """The score from which on (in the direction of nearer) at most a share `rate` matches.

    value: the threshold, an observed score; None with a `reason` if there are too few images.
    interval: order-statistic interval of the true quantile; None = open at that end.
    achieved, achieved_interval: the share at least as near as `value`, Clopper-Pearson interval.
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

    n_heldout: images in the null, after n_dropped near-duplicates of members (or images that share
    an identity with one) were dropped from it.
    """

    thresholds: dict[str, Threshold]
    n_heldout: int
    n_dropped: int
    n_members: int
    measure: str = NL2.name

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
    best: Scores,
    n_members: int,
    *,
    measure: Measure = NL2,
    rates: Mapping[str, float] | None = None,
    n_dropped: int = 0,
) -> Calibration:
    """Thresholds from the best scores [M] of real held-out images over the members.

    best: of the images that make the null; what was left out of it (near-duplicates of members)
    must be chosen by a rule that does not depend on the score, or the null is biased.
    n_dropped: how many were left out, to be recorded.
    Raises MembenchError if no image is left or a rate is not in (0, 1).
    """
    if not len(best):
        raise MembenchError("no held-out image is left to calibrate on: all are copies of members")
    found = {level: threshold(measure.far(best), rate) for level, rate in (rates or RATES).items()}
    return Calibration(
        {level: _natural(t, measure) for level, t in found.items()},
        n_heldout=len(best),
        n_dropped=n_dropped,
        n_members=n_members,
        measure=measure.name,
    )


def _natural(found: Threshold, measure: Measure) -> Threshold:
    """A threshold of far scores in the measure's own direction."""
    if measure.sign == 1:
        return found
    low, high = (None if end is None else -end for end in found.interval)
    value = None if found.value is None else -found.value
    return replace(found, value=value, interval=(high, low))


def threshold(null: Scores, rate: float) -> Threshold:
    """The largest observed far score at which at most a share `rate` of the null [M] matches.

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
