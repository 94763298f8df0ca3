"""Reading memory maps larger than memory: pages that were read are given back.

Pages of a mapped file count as resident memory until someone needs the room. Given back, they stay
in the system's cache, so that reading them again costs no disk access; nothing is ever lost.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blocks(x: NDArray[Any], rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(start, x[start : start + rows]) from front to back; each is released when the next comes."""
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        yield start, block
        release(block)


def release(x: NDArray[Any]) -> None:
    """Gives back the memory of x where it is a view of a memory-mapped file; else does nothing.

    Private copies of pages (mode "c") stay: they may hold changes that are in no file. Does nothing
    where the system has no `madvise`.
    """
    pages = _mapping(x)
    if pages is None or not hasattr(mmap, "MADV_DONTNEED") or x.size == 0:
        return
    base = np.frombuffer(pages, np.uint8).ctypes.data
    reach = [(n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)]
    low = x.ctypes.data - base + sum(r for r in reach if r < 0)
    high = x.ctypes.data - base + sum(r for r in reach if r > 0) + x.itemsize
    low -= low % mmap.PAGESIZE
    with contextlib.suppress(OSError):  # only advice: locked pages, for one, cannot be given back
        pages.madvise(mmap.MADV_DONTNEED, low, high - low)


def _mapping(x: NDArray[Any]) -> mmap.mmap | None:
    """The shared file mapping that x is a view of."""
    base: Any = x
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode == "c":
            return None
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
