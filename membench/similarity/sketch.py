"""Projection pruning: a few directions filter, in low precision, what must be compared in full.

**Features.** With a centre c and m directions as the rows of P, each image x is kept as

    f(x) = P (x - c)  rounded,        e_x >= |f(x) - P (x - c)|

P need not be the best basis, nor quite orthonormal. With lambda the eigenvalues of P P^T,

    |P z|^2 <= stretch |z|^2,         stretch = max(1, lambda_max)
    |z|^2 <= |P z|^2 / lambda_min + |z_rest|^2

where z_rest, what no direction sees of z = x - y, is no longer than r_x + r_y,
r_x^2 = |x - c|^2 - |P (x - c)|^2 / lambda_max. Without P, f(x) = x - c and r = 0.

**Errors.** e_x is measured where features are rounded and bounded where they are summed: the sum
of D products errs by at most gamma(D) sqrt(m stretch) |x - c| (Cauchy-Schwarz; Higham 2002, 3.1).
Let eta be the largest e_y / |y - c| of the references at hand. A pair within a distance s has
|y - c| <= |x - c| + s, and so

    g = |f(x) - f(y)| <= T = sqrt(stretch) s + e_x + eta (|x - c| + s)

**Products.** One matrix product gives g^2 / 2: to each row are appended its |f|^2 / 2, in as many
parts as the precision needs, and ones for the other's. As |f(y)| <= |f(x)| + g, it errs by at most
gamma(m + 8) (2 |f(x)| + g)^2 / 2 and, relatively, by the rounding of the result. So a pair within s
is never above `most(s)`, and by the same bounds a pair below `surely(s)` is within s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.similarity.filter import (
    Array,
    Candidates,
    evenly_spread,
    flat_rows,
    n_features,
    refine,
)
from membench.similarity.pages import blocks, gather
from membench.similarity.products import Engine, Float32, engines, gamma, seconds, split

WIDTHS = (64, 128, 256, 512)
"""Candidates for the columns of features; the appended ones are among them."""

WORTH = 2**36  # multiplications of a search from which on a sketch may pay
_TINY = 2.0**-126
_SAMPLE = 2048  # references that the directions are fitted to and tried on
_TRIED = 128  # queries of the trial
_CHUNK = 256  # rows whose features are made at a time
_RELATIVE = 1e-9  # more than the error of float64 sums and eigenvalues


@dataclass(frozen=True)
class Features:
    """Rows in the engine's format, and what is known of them.

    length: |x - c| [n]; size: |f(x)| [n]; error: e_x [n]; rest: r_x [n].
    """

    stored: Any
    length: NDArray[np.float64]
    size: NDArray[np.float64]
    error: NDArray[np.float64]
    rest: NDArray[np.float64]

    def __getitem__(self, rows: slice) -> Features:
        each = (self.length, self.size, self.error, self.rest)
        return Features(self.stored[rows], *(x[rows] for x in each))

    @classmethod
    def join(cls, parts: list[Features], engine: Engine) -> Features:
        if len(parts) == 1:
            return parts[0]
        names = ("length", "size", "error", "rest")
        each = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        return cls(engine.join([part.stored for part in parts]), *each)


class Sketch:
    """How rows become features: an engine, a centre [D] and directions [m, D] (None: all of x)."""

    def __init__(self, engine: Engine, centre: Array, directions: Array | None) -> None:
        self.engine = engine
        self.centre = centre.ravel()
        self.m = self.centre.size if directions is None else len(directions)
        self.stretch = self.least = 1.0
        self.summing = 0.0  # |error of the summed P z| / |z|
        self.directions = None
        if directions is not None:
            self.directions = engine.store(np.ascontiguousarray(directions, np.float32))
            exact = engine.load(self.directions).astype(np.float64)
            eigenvalues = np.linalg.eigvalsh(exact @ exact.T)
            self.stretch = max(1.0, float(eigenvalues[-1]) * (1 + _RELATIVE))
            self.least = float(eigenvalues[0]) * (1 - _RELATIVE)
            largest = float(np.linalg.eigvalsh(np.abs(exact) @ np.abs(exact).T)[-1])
            self.summing = gamma(self.centre.size) * (largest * (1 + _RELATIVE)) ** 0.5
        self.width = self.m + 2 * engine.parts
        self.gamma = gamma(self.width + 8)
        self.floor = (self.m + 2) * self.centre.size * 4 * _TINY  # errors of what underflows

    def __str__(self) -> str:
        what = f"{self.m} values" if self.directions is None else f"{self.m} directions"
        return f"{what} in {self.engine.name}"

    def queries(self, x: Array) -> Features:
        return self._features(x, query=True)

    def references(self, x: Array) -> Features:
        return self._features(x, query=False)

    def row_bytes(self) -> int:
        """Memory of one row of features."""
        return self.width * self.engine.bytes + 4 * 8

    def working_bytes(self) -> int:
        """Memory of making features, beside the result."""
        return _CHUNK * (self.centre.size * 10 + self.width * 16) + self.m * self.centre.size * 4

    def _features(self, x: Array, query: bool) -> Features:
        made = [self._chunk(block, query) for _, block in blocks(x, _CHUNK)]
        return Features.join(made, self.engine)

    def _chunk(self, x: Array, query: bool) -> Features:
        engine = self.engine
        centred = self._centred(x)
        length = np.sqrt(np.einsum("ij,ij->i", centred, centred).astype(np.float64))
        length = length * (1 + 2 * gamma(self.centre.size)) + self.centre.size * _TINY**0.5
        f = engine.store(centred)
        error = np.zeros(len(x))  # integers of at most 8 bits are stored as they are
        if x.dtype != np.uint8:
            error = _norm(engine.load(f).astype(np.float64) - centred) + 2.0**-24 * length
            error += self.centre.size * _TINY
        if self.directions is not None:
            f = engine.multiply(f, self.directions)
        seen = engine.load(f).astype(np.float64)
        size_squared = np.einsum("ij,ij->i", seen, seen)
        size = np.sqrt(size_squared) * (1 + _RELATIVE)
        rest = np.zeros(len(x))
        if self.directions is not None:
            error = self.stretch**0.5 * error + self.summing * (length + error)
            error += engine.rounding * 1.01 * size + self.m * self.centre.size * _TINY
            error *= 1 + _RELATIVE
            least = np.maximum(0, size * (1 - 2 * _RELATIVE) - error)
            rest = np.sqrt(np.maximum(0, length**2 - least**2 / self.stretch))
        half = split(size_squared / 2, engine)
        ones = np.ones_like(half)
        if query:
            added = np.concatenate([half, ones], axis=1)
            stored = engine.join([-f, engine.store(added)], axis=1)
        else:
            added = np.concatenate([ones, half], axis=1)
            stored = engine.join([f, engine.store(added)], axis=1)
        return Features(stored, length, size, error, rest)

    def _centred(self, x: Array) -> NDArray[np.float32]:
        """x - c as float32 [n, D]: exact for uint8, else rounded once."""
        rows = flat_rows(x)
        if x.dtype == np.uint8:
            return np.subtract(rows, self.centre.astype(np.int16), dtype=np.int16).astype(
                np.float32
            )
        return np.subtract(rows, self.centre, dtype=np.float64).astype(np.float32)


def _norm(x: Array) -> NDArray[np.float64]:
    norm: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", x, x))
    return norm


class SketchFilter:
    """Comparable halves of g^2 of one block of queries with references, and their limits.

    Takes the place of `filter.Filter` in a search: its ranks are only compared with its limits.
    """

    def __init__(self, sketch: Sketch, queries: Features, out: Array) -> None:
        self.sketch = sketch
        self.queries = queries
        self.out = out
        self.largest = Extent()  # of the references so far

    def ranks_of(self, references: Features) -> Array:
        """Comparable halves of g^2 [Q, r]; they live until the next call."""
        self.largest = self.largest.with_(references)
        return self.sketch.engine.product(self.queries.stored, references.stored, self.out)

    def most(self, squared: Array) -> Array:
        """Whatever is within squared distances [Q] ranks at most this, [Q, 1]."""
        q, sketch = self.queries, self.sketch
        s = np.sqrt(np.where(np.isinf(squared), 0, np.maximum(squared, 0))) * (1 + _RELATIVE)
        reach = sketch.stretch**0.5 * s + q.error + self.largest.relative * (q.length + s)
        reach += sketch.floor
        half = reach**2 / 2 + sketch.gamma * (2 * q.size + reach) ** 2 / 2
        half = half * (1 + 2 * sketch.engine.rounding) * (1 + _RELATIVE) + sketch.width * 4 * _TINY
        return sketch.engine.above(np.where(squared == np.inf, np.inf, half))[:, None]

    def surely(self, squared: Array) -> Array:
        """Whatever ranks below this, [Q, 1], is within squared distances [Q]."""
        q, sketch, largest = self.queries, self.sketch, self.largest
        seen = (squared - (q.rest + largest.rest) ** 2) * sketch.least * (1 - _RELATIVE)
        reach = np.sqrt(np.maximum(0, seen)) - q.error - largest.error
        half = np.maximum(0, reach) ** 2 / 2 - sketch.gamma * (q.size + largest.size) ** 2 / 2
        half = half * (1 - 2 * sketch.engine.rounding) * (1 - _RELATIVE) - sketch.width * 4 * _TINY
        return sketch.engine.below(half)[:, None]


@dataclass(frozen=True)
class Extent:
    """The largest e_y / |y - c|, e_y, |f(y)| and r_y of some references."""

    relative: float = 0.0
    error: float = 0.0
    size: float = 0.0
    rest: float = 0.0

    def with_(self, x: Features) -> Extent:
        relative = np.divide(x.error, x.length, out=np.zeros(len(x.error)), where=x.length > 0)
        return Extent(
            max(self.relative, float(relative.max()) * (1 + _RELATIVE)),
            max(self.error, float(x.error.max())),
            max(self.size, float(x.size.max())),
            max(self.rest, float(x.rest.max())),
        )


def choose(
    queries: Array,
    reference: Array,
    centre: Array,
    limits: Callable[[Array, Array], list[tuple[Array, Array]]],
    memory_bytes: int,
) -> Sketch | None:
    """The sketch that is expected to make a search quickest; None where plain blocks are.

    limits: of the rows of some queries, and of their squared distances [T, n] to an even sample of
    the reference, the squared distances [T] that decide: (at most, surely within), one pair for
    each radius. memory_bytes: of the search; None as well if a sketch would not fit into it.

    Features are made and compared for the sample, and their speed and what they leave to compare
    are measured. Whatever is chosen, the answer is the same.
    """
    n_queries, n, d = len(queries), len(reference), n_features(reference)
    if n_queries * n * d < WORTH:
        return None
    rows = evenly_spread(n, _SAMPLE)
    tried = evenly_spread(n_queries, _TRIED)
    sample, asked = gather(reference, rows), gather(queries, tried)
    exact = Sketch(Float32(), centre, None)
    squared = _all_squared(exact, asked, sample)
    asked_limits = limits(tried, squared)
    per_pair = _seconds_per_pair(asked, sample)
    plain = engines()[Float32()]
    engine, speed = min(engines().items(), key=lambda item: item[1].product)

    best, least = None, n_queries * n * (d * plain.product + plain.compared)
    basis: Array | None = None
    for width in (*WIDTHS, None):
        m = d if width is None else width - 2 * engine.parts
        fixed = n_queries * n * ((m + 2 * engine.parts) * speed.product + speed.compared)
        if fixed > least or m > min(d, len(sample) / 2 if width else d):
            continue
        if width is None:
            sketch = Sketch(engine, centre, None)
        else:
            if basis is None:
                basis = principal_directions(sample, centre, min(WIDTHS[-1], d, len(sample) // 2))
            sketch = Sketch(engine, centre, basis[:m])
        if sketch.working_bytes() > memory_bytes // 4:
            continue
        start = time.perf_counter()
        share = _unsure(sketch, asked, sample, asked_limits)
        made = (time.perf_counter() - start) / (len(sample) + len(asked))
        times = 1 if n * sketch.row_bytes() <= memory_bytes // 8 else -(-n_queries // 2048)
        cost = fixed + made * (n_queries + n * times) + share * n_queries * n * per_pair
        if cost < least:
            best, least = sketch, cost
    return best


def principal_directions(sample: Array, centre: Array, m: int) -> NDArray[np.float32]:
    """The m leading principal directions of rows about a centre, about, [m, D], orthonormal.

    By one subspace iteration from a random start (Halko, Martinsson and Tropp 2011, Algorithm 4.4).
    """
    rows = np.subtract(flat_rows(sample), centre.ravel(), dtype=np.float32)
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], m), np.float32)
    basis = _orthonormal(rows.T @ (rows @ basis))
    seen = rows @ basis
    _, axes = np.linalg.eigh(seen.T @ seen)
    directions: NDArray[np.float32] = (basis @ axes[:, ::-1]).T
    return directions


def _orthonormal(basis: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same span by orthonormal columns, about; those that hardly add to it are dropped."""
    wide = basis.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=0).max() or 1.0
    values, axes = np.linalg.eigh(wide.T @ wide)
    kept = values > 1e-12 * values[-1]
    return (wide @ (axes[:, kept] / np.sqrt(values[kept]))).astype(np.float32)


def _all_squared(sketch: Sketch, queries: Array, reference: Array) -> NDArray[np.float64]:
    """All squared distances [Q, n], about."""
    a, b = sketch.queries(queries), sketch.references(reference)
    out = np.empty(len(queries) * len(reference), np.float32)
    return np.maximum(0, 2 * sketch.engine.product(a.stored, b.stored, out).astype(np.float64))


def _unsure(
    sketch: Sketch, queries: Array, reference: Array, limits: list[tuple[Array, Array]]
) -> float:
    """Share of pairs that the sketch leaves to compare in full."""
    out = np.empty(len(queries) * len(reference), sketch.engine.dtype)
    filter_ = SketchFilter(sketch, sketch.queries(queries), out)
    rank = filter_.ranks_of(sketch.references(reference))
    unsure = np.zeros(rank.shape, bool)
    for most, surely in limits:
        unsure |= (rank <= filter_.most(most)) ^ (rank < filter_.surely(surely))
    return float(np.count_nonzero(unsure) / unsure.size)


def _seconds_per_pair(queries: Array, reference: Array) -> float:
    """Time to compare a pair in full."""
    query = np.repeat(np.arange(len(queries), dtype=np.int32), 128)
    index = np.arange(len(query), dtype=np.int32) * 7 % len(reference)
    pairs = Candidates(query, index.astype(np.int32), np.zeros(len(query), np.float32))
    return seconds(lambda: refine(pairs, queries, reference)) / len(pairs)
