"""Intervals of the metrics, all at one confidence level, all deterministic.

Which is used where:
- AMS and l2 ratio at one guidance scale: Clopper-Pearson.
- Their excess (member minus held-out, the same images): Bonett and Price 2012, closed form.
- Both, averaged over guidance scales: bootstrap over images, an image being the same seed at every
  scale.
- UMS and its excess: closed form from the subsamples of N_G - 1 of the N_G images (m-out-of-n
  without replacement, m = N_G - 1, all of them: the jackknife). Plain resampling would inflate
  duplicates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri  # scipy.stats takes a second to import

from membench.errors import MembenchError

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
CRITICAL = float(ndtri((1 + CONFIDENCE) / 2))

Interval = tuple[float, float]


def clopper_pearson(successes: int, n: int) -> Interval:
    """Exact binomial interval of a rate, from `successes` of n.

    Source: Clopper and Pearson 1934. Raises MembenchError unless 0 <= successes <= n, n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise MembenchError(f"no interval for {successes} successes of {n}")
    tail = (1 - CONFIDENCE) / 2
    low = betaincinv(successes, n - successes + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return float(low), float(high)


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Interval:
    """Interval of mean(first) - mean(second), two outcomes [Q] of the same images.

    With one pseudo-image added to either kind of disagreement, p12 and p21 their shares of
    n + 2: p12 - p21 +- z sqrt((p12 + p21 - (p12 - p21)^2) / (n + 2)).
    Source: Bonett and Price 2012, adjusted Wald interval for paired proportions.
    """
    n = len(first) + 2
    plus = (np.count_nonzero(first & ~second) + 1) / n
    minus = (np.count_nonzero(second & ~first) + 1) / n
    half = CRITICAL * np.sqrt((plus + minus - (plus - minus) ** 2) / n)
    return _clip(plus - minus - half, plus - minus + half, -1, 1)


def bootstrap_mean(values: NDArray[Any], low: float, high: float) -> Interval:
    """Percentile bootstrap over images of the mean of values [Q] in [low, high].

    One pseudo-image at either end of the range is added, as in Bonett and Price, so that the
    interval does not collapse if all images agree. Resampling Q images is a multinomial draw over
    the distinct values: the same distribution at any Q for the price of a few numbers.
    """
    distinct, counts = np.unique(np.append(values, [low, high]), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    means = np.round(draws @ distinct / n, 12)  # the same on every BLAS
    bottom, top = np.quantile(means, [tail, 1 - tail])
    mean = float(np.mean(values))
    return _clip(min(bottom, mean), max(top, mean), low, high)


def unique_interval(unique: float, exclusive: NDArray[Any], limit: float) -> Interval:
    """Interval of the expected number of unique matches of Q images.

    Leaving out image i loses a_i = exclusive[i] matches, so the jackknife variance is
    V = (Q - 1)/Q sum_i (a_i - mean a)^2: but for the factor (Q - 1)/Q it is not below the true one
    on average (Efron and Stein 1981) and, unlike the analytic variance of Colwell et al. 2012,
    holds if an image matches many references at once. Score (Wilson) form,
    U + z^2/2 +- z sqrt(V + z^2/4), which keeps its width
    at U = 0; not beyond `limit`, the size of the reference.
    """
    half = CRITICAL * np.sqrt(jackknife_variance(exclusive) + CRITICAL**2 / 4)
    low, high = _clip(unique + CRITICAL**2 / 2 - half, unique + CRITICAL**2 / 2 + half, 0, limit)
    return min(low, unique), max(high, unique)


def unique_difference(difference: float, exclusive: NDArray[Any]) -> Interval:
    """Interval of the excess of unique matches: members minus held-out, the same images.

    exclusive: a_i of the members minus a_i of the held-out [Q]; difference +- z sqrt(V + z^2/2).
    """
    half = float(CRITICAL * np.sqrt(jackknife_variance(exclusive) + CRITICAL**2 / 2))
    return difference - half, difference + half


def jackknife_variance(exclusive: NDArray[Any]) -> float:
    """(Q - 1)/Q sum_i (a_i - mean a)^2, a_i = exclusive[i] what leaving out image i loses."""
    a = exclusive.astype(np.float64)
    return float((len(a) - 1) / len(a) * ((a - a.mean()) ** 2).sum())


def _clip(low: float, high: float, smallest: float, largest: float) -> Interval:
    return max(float(low), float(smallest)), min(float(high), float(largest))
