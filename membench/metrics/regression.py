"""A straight line through (number of classes or clusters, score)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from membench.errors import MembenchError
from membench.metrics.intervals import CONFIDENCE, Interval


@dataclass(frozen=True)
class LinearFit:
    """score = coefficient x + intercept, by least squares over n points.

    The errors are standard errors, the intervals 95 % by Student's t with n - 2 degrees of freedom;
    p: of a coefficient of 0. They take the residuals as independent, normal and of one size.
    """

    n: int
    coefficient: float
    intercept: float
    r_squared: float
    correlation: float
    coefficient_error: float
    intercept_error: float
    coefficient_interval: Interval
    intercept_interval: Interval
    p: float


def linear_fit(x: NDArray[Any], y: NDArray[Any]) -> LinearFit:
    """Least-squares line through points x [n], y [n], n >= 3.

    Source: SIDE, Table 2 (coefficient, intercept, R2, correlation). All y equal gives correlation
    and R2 0. Raises MembenchError for fewer points, or if all x are equal.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    if n < 3 or len(y) != n:
        raise MembenchError(f"a linear fit with errors needs three points, not {n}")
    dx, dy = x - x.mean(), y - y.mean()
    s_xx, s_yy, s_xy = float(dx @ dx), float(dy @ dy), float(dx @ dy)
    if s_xx == 0:
        raise MembenchError("a linear fit needs points at two or more places; all x are equal")
    coefficient = s_xy / s_xx
    intercept = float(y.mean() - coefficient * x.mean())
    correlation = max(-1.0, min(1.0, s_xy / math.sqrt(s_xx * s_yy))) if s_yy else 0.0
    residuals = dy - coefficient * dx
    error = math.sqrt(float(residuals @ residuals) / (n - 2) / s_xx)
    intercept_error = error * math.sqrt(s_xx / n + float(x.mean()) ** 2)
    z = float(stdtrit(n - 2, (1 + CONFIDENCE) / 2))
    p = 2 * float(stdtr(n - 2, -abs(coefficient / error))) if error else float(coefficient == 0)
    return LinearFit(
        n,
        coefficient,
        intercept,
        correlation**2,
        correlation,
        error,
        intercept_error,
        (coefficient - z * error, coefficient + z * error),
        (intercept - z * intercept_error, intercept + z * intercept_error),
        p,
    )
