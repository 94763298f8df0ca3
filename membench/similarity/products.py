"""Exact products of rows of 8-bit integers, in the number format the machine is quickest at.

An engine stores rows of integers from -128 to 127 and multiplies them without any rounding: `int8`
with 32-bit sums, where the CPU has instructions for it (AVX512-VNNI, AMX: some five times as quick
as float32), or `float32`, whose sums of such integers are exact below 2^24 in any order. `int8` is
taken only if the machine passes `_adds_up`: some multiply in 16 bits, which overflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST = 2**7
"""No stored integer is larger in magnitude."""

_TRIAL = (256, 2048, 256)  # rows, columns and terms of the product that is timed


def gamma(n: int) -> float:
    """Bound of the relative error of a float32 sum of n products (Higham 2002, 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


@dataclass(frozen=True)
class Float32:
    """Products by BLAS."""

    name = "float32"
    bytes = 4
    dtype = np.float32
    limit = 2**24  # integers below it in magnitude are exact
    never = 2**24 - 1  # above every rank and every limit

    def store(self, x: NDArray[np.int8]) -> Any:
        return x.astype(np.float32)

    def empty(self, rows: int, terms: int) -> Any:
        """Room for stored rows."""
        return np.empty((rows, terms), np.float32)

    def product(self, a: Any, b: Any, out: Array) -> Array:
        """a b^T of stored rows; `out` of `dtype` holds at least as many values."""
        product: Array = out[: len(a) * len(b)].reshape(len(a), len(b))
        return np.matmul(a, b.T, out=product)


@dataclass(frozen=True)
class Int8:
    """Products by oneDNN, through torch."""

    name = "int8"
    bytes = 1
    dtype = np.int32
    limit = 2**31
    never = 2**31 - 1

    def store(self, x: NDArray[np.int8]) -> Any:
        import torch

        return torch.tensor(x)  # a copy: where one row has odd strides, _int_mm writes nothing

    def empty(self, rows: int, terms: int) -> Any:
        import torch

        return torch.empty((rows, terms), dtype=torch.int8)

    def product(self, a: Any, b: Any, out: Array) -> Array:
        import torch

        product: Array = out[: len(a) * len(b)].reshape(len(a), len(b))
        torch.ops.aten._int_mm.out(a, b.T, out=torch.from_numpy(product))
        return product


Engine = Float32 | Int8


def longest(engine: Engine) -> int:
    """Terms of a product that may be added to half a squared norm without rounding."""
    return engine.limit // (LARGEST**2 + LARGEST**2 // 2) - 1


def fits(engine: Engine, terms: int) -> bool:
    """Whether rows of so many terms have exact products and ranks; of one, _int_mm writes none."""
    return 2 <= terms <= longest(engine)


@dataclass(frozen=True)
class Speed:
    """Seconds of an engine on this machine, as measured once in a process.

    product: per multiplication and addition; compared: per result compared with a limit.
    """

    product: float
    compared: float


@cache
def engines() -> dict[Engine, Speed]:
    """The engines that this machine can use, with their speeds; a few hundredths of a second."""
    able: list[Engine] = [Float32()]
    if _adds_up():
        able.append(Int8())
    return {engine: _speed(engine) for engine in able}


def quickest() -> Engine:
    """The engine whose products take least time on this machine."""
    speeds = engines()
    return min(speeds, key=lambda engine: speeds[engine].product)


def seconds(run: Callable[[], Any], times: int = 2) -> float:
    """The least wall time of a few runs; the first, which warms up, does not count."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _speed(engine: Engine) -> Speed:
    rows, columns, terms = _TRIAL
    rng = np.random.default_rng(0)
    a, b = (
        engine.store(rng.integers(-LARGEST, LARGEST, (n, terms)).astype(np.int8))
        for n in (rows, columns)
    )
    out = np.empty(rows * columns, engine.dtype)
    half = np.zeros(columns, engine.dtype)
    found = out.reshape(rows, columns)

    def compare() -> None:
        np.flatnonzero(np.subtract(half, found, out=found) <= -engine.limit)  # holds nothing

    product = seconds(lambda: engine.product(a, b, out))
    return Speed(product / (rows * columns * terms), seconds(compare) / (rows * columns))


def _adds_up() -> bool:
    """Whether products of the largest 8-bit integers are those of 32-bit arithmetic."""
    import torch

    if not hasattr(torch.ops.aten, "_int_mm"):
        return False
    engine, rng = Int8(), np.random.default_rng(0)
    for terms in (64, 257, 3072):
        a, b = (rng.choice([-128, 127], (n, terms)).astype(np.int8) for n in (48, 80))
        a[0], b[0] = -128, -128
        a[1], b[1] = 127, -128
        try:
            found = engine.product(engine.store(a), engine.store(b), np.empty(48 * 80, np.int32))
        except RuntimeError:  # not on this kind of CPU
            return False
        if not np.array_equal(found, a.astype(np.int32) @ b.T.astype(np.int32)):
            return False
    return True
