"""Matrix products in the precision the machine is quickest at, with a bound of their error.

An engine stores rows of numbers, multiplies them, and returns values that can be compared in the
order of the numbers: `float32`, or `bfloat16` on machines with matrix units (Intel AMX), where a
product is five times as quick and its result, of half the size, is compared as 16-bit integers.
Both add up in float32, rounding to nearest, in an order of their own. `bfloat16` is taken only if
the machine has the units and passes `_adds_in_float32`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TRIAL = (1024, 2048, 256)  # rows, columns and terms of the product that is timed


def gamma(n: int) -> float:
    """Bound of the relative error of a float32 sum of n products (Higham 2002, 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


@dataclass(frozen=True)
class Float32:
    """Products by BLAS."""

    name = "float32"
    rounding = 0.0  # relative error of a result, beyond that of its sum
    parts = 1  # stored numbers that together hold a float32
    bytes = 4
    dtype = np.float32

    def store(self, x: NDArray[np.float32]) -> Any:
        return x

    def load(self, stored: Any) -> NDArray[np.float32]:
        return np.asarray(stored)

    def join(self, rows: Sequence[Any], axis: int = 0) -> Any:
        return np.concatenate(rows, axis=axis)

    def multiply(self, a: Any, b: Any) -> Any:
        """a b^T of stored rows, stored."""
        return np.matmul(a, b.T)

    def product(self, a: Any, b: Any, out: Array) -> Array:
        """a b^T of stored rows, comparable; `out` of `dtype` holds at least as many values."""
        product: Array = out[: len(a) * len(b)].reshape(len(a), len(b))
        return np.matmul(a, b.T, out=product)

    def above(self, x: Array) -> Array:
        """Comparable numbers that are not below x."""
        return np.nextafter(x.astype(np.float32), np.float32(np.inf))

    def below(self, x: Array) -> Array:
        """Comparable numbers that are not above x; for x <= 0, none is smaller."""
        down = np.nextafter(x.astype(np.float32), np.float32(-np.inf))
        return np.where(x > 0, down, np.float32(-np.inf))


@dataclass(frozen=True)
class Bfloat16:
    """Products by oneDNN in bfloat16; results are compared by their bits, negative ones as low."""

    name = "bfloat16"
    rounding = 2.0**-9 * (1 + 2.0**-7)
    parts = 3
    bytes = 2
    dtype = np.int16

    def store(self, x: NDArray[np.float32]) -> Any:
        import torch

        return torch.from_numpy(x).to(torch.bfloat16)

    def load(self, stored: Any) -> NDArray[np.float32]:
        loaded: NDArray[np.float32] = stored.float().numpy()
        return loaded

    def join(self, rows: Sequence[Any], axis: int = 0) -> Any:
        import torch

        return torch.cat(list(rows), dim=axis)

    def multiply(self, a: Any, b: Any) -> Any:
        import torch

        return torch.mm(a, b.T)

    def product(self, a: Any, b: Any, out: Array) -> Array:
        import torch

        product: Array = out[: len(a) * len(b)].reshape(len(a), len(b))
        torch.mm(a, b.T, out=torch.from_numpy(product).view(torch.bfloat16))
        return product

    def above(self, x: Array) -> Array:
        """Of negative x, zero: whatever is negative compares as lower."""
        up = np.nextafter(np.maximum(x, 0).astype(np.float32), np.float32(np.inf))
        return np.minimum((up.view(np.uint32) + np.uint32(0xFFFF)) >> 16, 0x7F80).astype(np.int16)

    def below(self, x: Array) -> Array:
        down = np.nextafter(np.maximum(x, 0).astype(np.float32), np.float32(0))
        bits = (down.view(np.uint32) >> 16).astype(np.int16)
        return np.where(x > 0, bits, np.int16(-(2**15))).astype(np.int16)


Engine = Float32 | Bfloat16


def split(x: NDArray[np.float64], engine: Engine) -> NDArray[np.float32]:
    """[n, parts] of numbers that an engine stores exactly and whose sum is x, as in float32."""
    parts, left = [], x
    for _ in range(engine.parts):
        part = engine.load(engine.store(left.astype(np.float32)))
        parts.append(part)
        left = left - part
    return np.stack(parts, axis=1)


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
    if _has_matrix_units() and _adds_in_float32():
        able.append(Bfloat16())
    return {engine: _speed(engine) for engine in able}


def seconds(run: Callable[[], Any], times: int = 3) -> float:
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
    a, b = (engine.store(rng.random((n, terms), np.float32)) for n in (rows, columns))
    out = np.empty(rows * columns, engine.dtype)
    limit = engine.below(np.full((rows, 1), 1.0))  # holds nothing
    product = seconds(lambda: engine.product(a, b, out))
    found = out.reshape(rows, columns)
    compared = seconds(lambda: np.flatnonzero(found < limit))
    return Speed(product / (rows * columns * terms), compared / (rows * columns))


def _has_matrix_units() -> bool:
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported() and torch.backends.mkldnn.is_available())


def _adds_in_float32() -> bool:
    """Whether 4,096 terms that bfloat16 sums would lose add up as in float32."""
    import torch

    a = torch.ones((64, 4096), dtype=torch.bfloat16)
    a[:, 1::2] = 2.0**-8  # exact as a number, lost when added to 1 in bfloat16
    b = torch.ones_like(a)
    b[:, 0::2] = torch.where(torch.arange(2048) % 2 == 0, 1.0, -1.0).to(torch.bfloat16)
    return bool((torch.mm(a, b.T) == 2048 * 2.0**-8).all())
