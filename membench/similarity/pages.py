"""Memory maps that do not fill the memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def release(x: NDArray[Any]) -> None:
    """Lets the system drop the pages of x if it is part of a memory map of a file.

    Pages that were read count as memory of the process until they are dropped; they are read again
    when they are used again, so values never change. Does nothing for other arrays, for maps of
    mode "c", whose changes live in memory only, and where the system has no such call.
    """
    base: Any = x
    mode = None
    while base is not None and not isinstance(base, mmap.mmap):
        mode = base.mode if isinstance(base, np.memmap) else mode
        base = getattr(base, "base", None)
    if base is None or mode in (None, "c") or x.size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    origin = np.frombuffer(base, np.uint8).ctypes.data
    low, high = (int(address) - origin for address in np.lib.array_utils.byte_bounds(x))
    start = low - low % mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, start, high - start)
