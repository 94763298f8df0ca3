"""Which of two methods extracts more: paired tests, because both start from the same noise.

Image i of seed s has the same initial noise whatever the method, so the pair (method A, method B)
of that image is what is compared. Pairs of different images are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtr, ndtri

from membench.errors import MembenchError
from membench.metrics.intervals import (
    CONFIDENCE,
    CRITICAL,
    Interval,
    bootstrap_mean,
    jackknife_variance,
    paired_difference,
)

POWER = 0.8
"""With which the smallest visible difference would have been seen."""


@dataclass(frozen=True)
class Difference:
    """A paired difference of two methods, first minus second.

    interval: 95 %, of this one comparison; p: of no difference, two-sided; adjusted: p after Holm's
    correction for all that were made together (`holm`); visible: the smallest true difference that
    would have been found with 80 % power at the level that the number of comparisons leaves.
    """

    value: float
    interval: Interval
    p: float
    visible: float
    adjusted: float
    test: str

    @property
    def distinguishable(self) -> bool:
        return self.adjusted < 1 - CONFIDENCE

    def verdict(self, first: str, second: str) -> str:
        """`side_c is higher`, or `not distinguishable`: see `visible` for what would have been."""
        if self.distinguishable:
            return f"{first if self.value > 0 else second} is higher"
        return "not distinguishable"


def rate_difference(first: NDArray[Any], second: NDArray[Any]) -> Difference:
    """AMS of two methods: hits [S, Q] of each, S guidance scales of its own, Q images of all seeds.

    Interval: Bonett and Price 2012 for one scale each, else a bootstrap over images of the mean
    over scales. p: `sign_flip_p`, which for one scale each is McNemar's exact test.
    Raises MembenchError unless both have the same images.
    """
    if len(first) == len(second) == 1 and first.shape == second.shape:
        a, b = first[0].astype(np.bool_), second[0].astype(np.bool_)
        steps = a.astype(np.int64) - b
        return _by_images(steps, 1, paired_difference(a, b), "McNemar, exact")
    steps, common = _steps(first, second)
    return _by_images(steps, common, bootstrap_mean(steps / common, -1, 1), "sign flips, exact")


def excess_difference(first: NDArray[Any], second: NDArray[Any]) -> Difference:
    """Excess AMS of two methods: member hits minus held-out hits, -1, 0 or 1 [S, Q] of each.

    Bootstrap over images and `sign_flip_p`. Raises MembenchError unless both have the same images.
    """
    steps, common = _steps(first, second)
    return _by_images(steps, common, bootstrap_mean(steps / common, -2, 2), "sign flips, exact")


def _steps(first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """Paired differences of means over scales [Q] as integers, and what they are multiples of."""
    if first.shape[1:] != second.shape[1:]:
        raise MembenchError(f"unpaired images: {first.shape[1:]} and {second.shape[1:]}")
    common = math.lcm(len(first), len(second))
    steps = first.sum(axis=0, dtype=np.int64) * (common // len(first))
    steps -= second.sum(axis=0, dtype=np.int64) * (common // len(second))
    return steps, common


def _by_images(steps: NDArray[np.int64], common: int, interval: Interval, test: str) -> Difference:
    difference = steps / common
    error = _standard_error(difference)
    return _difference(float(difference.mean()), interval, sign_flip_p(steps), error, test)


def sign_flip_p(steps: NDArray[np.int64]) -> float:
    """Two-sided p of the sum of paired differences [n], integers, when each sign is a fair coin.

    Exact: the sum's distribution is the convolution of one scaled binomial for each size of
    difference. For differences of -1, 0, 1 it is McNemar's exact test (Fisher 1935; McNemar 1947).
    It supposes that each pair could as well have been the other way round; for the weaker claim of
    equal means it holds when there are many pairs.
    """
    sizes, counts = np.unique(np.abs(steps[steps != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    unit = int(np.gcd.reduce(sizes))
    law = np.ones(1)  # of (sum + extreme) / 2, in units
    for size, count in zip((sizes // unit).tolist(), counts.tolist(), strict=True):
        k = np.arange(count + 1)
        one = np.zeros(size * count + 1)
        log_ways = gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1)
        one[k * size] = np.exp(log_ways - count * math.log(2))
        law = np.convolve(law, one)
    observed = (abs(int(steps.sum())) // unit + len(law) - 1) // 2
    return min(1.0, 2 * float(law[observed:].sum()))


def unique_difference(
    unique: Sequence[float],
    exclusive: Sequence[NDArray[Any]],
    n_images: int,
) -> Difference:
    """UMS of two methods, pooled over seeds, from the jackknife over images.

    unique: the difference of unique matches in each seed, first minus second; exclusive: for each
    seed a_i of the first minus a_i of the second [Q]. Resampling images would inflate duplicates.
    value +- z sqrt(sum_s V_s + z^2 / 2) / (seeds Q), p to match. V_s is not below the true
    variance on average (Efron and Stein 1981): the test errs towards "not distinguishable".
    """
    if len(unique) != len(exclusive) or not len(unique):
        raise MembenchError("a difference of UMS needs unique and exclusive matches of each seed")
    total = math.fsum(unique)
    variance = math.fsum(jackknife_variance(a) for a in exclusive)
    images = len(unique) * n_images
    error = math.sqrt(variance + CRITICAL**2 / 2)
    half = CRITICAL * error
    p = 2 * float(ndtr(-abs(total) / error))
    interval = (total - half) / images, (total + half) / images
    return _difference(total / images, interval, p, error / images, "jackknife")


def _standard_error(difference: NDArray[np.float64]) -> float:
    """Of the mean of paired differences [n], with one pseudo-pair of either sign added.

    So it is not 0 where no pair differs (Bonett and Price 2012).
    """
    with_pseudo = np.append(difference, [-1.0, 1.0])
    return float(with_pseudo.std()) / math.sqrt(len(with_pseudo))


def _difference(value: float, interval: Interval, p: float, error: float, test: str) -> Difference:
    visible = (CRITICAL + float(ndtri(POWER))) * error
    return Difference(value, interval, p, visible, p, test)


def holm(found: Sequence[Difference]) -> list[Difference]:
    """The same differences with p adjusted for being made together (Holm 1979).

    The chance of even one false "is higher" among them stays at 5 %, however they depend on each
    other. What would have been visible grows with their number m: it is taken at 5 % / m.
    """
    adjusted = holm_p([difference.p for difference in found])
    level = (1 - CONFIDENCE) / max(1, len(found))
    power = float(ndtri(POWER))
    wider = (float(-ndtri(level / 2)) + power) / (CRITICAL + power)
    return [
        replace(difference, adjusted=p, visible=difference.visible * wider)
        for difference, p in zip(found, adjusted, strict=True)
    ]


def holm_p(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: the r-th smallest of m times m - r + 1, made monotone (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
