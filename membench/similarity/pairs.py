"""Exact squared distances of single pairs of uint8 rows: compiled where numba is installed.

numba is optional: without it the same integers come from numpy, some three times slower.
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
