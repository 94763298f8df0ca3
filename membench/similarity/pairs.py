"""Exact squared distances of single pairs of rows: compiled where numba is installed.

numba is optional: without it the same numbers, to the last bit, come from numpy, some three times
slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LONGEST = 2**31 // 255**2
"""Values of a row whose squared distances are surely below 2^31."""

Kernel = Callable[[Array, Array, Array, Array, NDArray[np.float64]], None]


@cache
def compiled() -> Kernel | None:
    """Writes |queries[q] - reference[i]|^2 of uint8 rows [*, D], D <= `LONGEST`; or None."""
    try:
        import numba
    except ImportError:
        return None

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def squared_of_pairs(queries, reference, query, index, squared):  # type: ignore[no-untyped-def]
        for p in range(len(query)):
            x, y = queries[query[p]], reference[index[p]]
            total = np.int32(0)
            for i in range(len(x)):
                difference = np.int32(x[i]) - np.int32(y[i])
                total = np.int32(total + np.int32(difference * difference))
            squared[p] = total

    return squared_of_pairs


@cache
def compiled_for_floats() -> Kernel | None:
    """The same of float32 or float64 rows, in float64, added in the order of numpy; or None.

    That is pairwise summation down to at most 128 terms, those by eight running sums.
    """
    try:
        import numba
    except ImportError:
        return None
    eight = np.uint64(8)  # unsigned positions need no check for negative ones: loops become vectors

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def pairwise_sum(x):  # type: ignore[no-untyped-def]
        n = len(x)
        if n > 128:
            half = n // 2 - n // 2 % 8
            return pairwise_sum(x[:half]) + pairwise_sum(x[half:])
        whole = n - n % 8
        a = b = c = d = e = f = g = h = 0.0
        for block in range(whole // 8):
            i = np.uint64(block) * eight
            a += x[i]
            b += x[i + np.uint64(1)]
            c += x[i + np.uint64(2)]
            d += x[i + np.uint64(3)]
            e += x[i + np.uint64(4)]
            f += x[i + np.uint64(5)]
            g += x[i + np.uint64(6)]
            h += x[i + np.uint64(7)]
        total = ((a + b) + (c + d)) + ((e + f) + (g + h))
        for last in range(whole, n):
            total += x[last]
        return total

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def squared_of_pairs(queries, reference, query, index, squared):  # type: ignore[no-untyped-def]
        terms = np.empty(queries.shape[1])
        for p in range(len(query)):
            x, y = queries[query[p]], reference[index[p]]
            for i in range(len(x)):
                difference = np.float64(x[i]) - np.float64(y[i])
                terms[i] = difference * difference
            squared[p] = pairwise_sum(terms)

    return squared_of_pairs
