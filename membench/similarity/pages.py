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

SPAN = 16 * 2**20
"""Bytes of a memory map that scattered rows may span before its pages are given back."""


def blocks(x: NDArray[Any], rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(start, x[start : start + rows]) from front to back; each is released when the next comes."""
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        yield start, block
        release(block)


def gather(x: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """x[rows] for ascending rows; of a memory map, no more than `SPAN` stays in memory at a time.

    A single row may bring up to 2 MiB of its neighbourhood with it, as the system sees fit.
    """
    row_bytes = x.itemsize * x[0].size
    if int(rows[-1] - rows[0]) * row_bytes <= SPAN or _mapping(x) is None:
        return x[rows]
    out = np.empty((len(rows), *x.shape[1:]), x.dtype)
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        out[start : start + 8] = x[part]
        release(x[part[0] : part[-1] + 1])
    return out


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


def mapped(x: NDArray[Any]) -> bool:
    """Whether x is a view of a memory-mapped file whose pages can be given back."""
    return _mapping(x) is not None


def _mapping(x: NDArray[Any]) -> mmap.mmap | None:
    """The shared file mapping that x is a view of."""
    base: Any = x
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode == "c":
            return None
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
