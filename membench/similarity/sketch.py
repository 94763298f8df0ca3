"""Projection pruning: a few directions, in 8-bit integers, filter what must be compared in full.

**Features.** With a centre c, integer directions as the rows of P and sigma^2 no less than the
largest eigenvalue of P P^T, let z = x - c and

    r_x^2 = |z|^2 - |P z|^2 / sigma^2,        phi(x) = rho (P z / sigma, r_x) - shift

r_x is the length of z under the matrix I - P^T P / sigma^2, which has no negative eigenvalue. So

    |phi(x) - phi(y)|^2  <=  rho^2 |x - y|^2  <=  |phi(x) - phi(y)|^2 + 4 rho^2 r_x r_y,

whether P is the best basis or not, and orthonormal or not. An image is kept as the 8-bit integers

    f(x) = round(clip(phi(x))),      e_x >= |f(x) - clip(phi(x))|,      l_x >= |f(x) - phi(x)|

As clipping to [-127, 127] brings no two points further apart, a pair within a distance s has

    |f(x) - f(y)|  <=  rho s + e_x + e_y,

and one with |f(x) - f(y)| <= rho (s^2 - 4 r_x r_y)^(1/2) - l_x - l_y is within s. The directions
are turned at random within their span, so that all coordinates are of one size and 8 bits do for
them. Without directions, phi(x) = rho z and r_x = 0; for 8-bit images f(x) = x - 128, exactly.

**Ranks.** Products of 8-bit integers are exact (see `products`), and so is a pair's rank

    rank = floor(|f(y)|^2 / 2) - f(x).f(y) = floor((|f(x) - f(y)|^2 - |f(x)|^2) / 2)  or 1/2 more

**Errors.** P z is exact for 8-bit images. Else z is rounded to float32 once, and the sums err by at
most gamma(D) |P|_F |z| (Cauchy-Schwarz; Higham 2002, 3.1). e_x and l_x are measured, and the bound
of what made phi is added to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.similarity.filter import Array, flat_rows, squared_to
from membench.similarity.pages import blocks
from membench.similarity.products import LARGEST, Engine, gamma

_TINY = 2.0**-126
_CHUNK = 512  # rows whose features are made at a time
_RELATIVE = 1e-9  # more than the error of float64 sums and eigenvalues
_ROUNDED = 2.0**-21  # more than the relative error of a few float32 operations
_SPREAD = 3.0  # standard deviations of a coordinate that 8 bits hold; beyond, it is clipped


@dataclass(frozen=True)
class Features:
    """Rows in the engine's format, and what is known of them, in units of the features.

    half: floor(|f|^2 / 2) [n]; size_squared: |f|^2 [n]; error: e_x [n]; lost: l_x [n];
    rest: rho r_x [n].
    """

    stored: Any
    half: Array
    size_squared: NDArray[np.float64]
    error: NDArray[np.float64]
    lost: NDArray[np.float64]
    rest: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.half)

    def __getitem__(self, rows: slice) -> Features:
        return Features(self.stored[rows], *(each[rows] for each in self.known()))

    def known(self) -> list[Array]:
        """Everything but the rows."""
        return [self.half, self.size_squared, self.error, self.lost, self.rest]


class Sketch:
    """How rows become features: an engine, a centre [D] and directions [m, D] (None: all of x).

    sample: rows [n, ...] of the reference, whose spread decides how features are scaled. Any
    centre, directions and sample give valid bounds.
    """

    def __init__(
        self, engine: Engine, centre: Array, sample: Array, directions: Array | None = None
    ) -> None:
        self.engine = engine
        self.centre = centre.ravel()
        self.directions: NDArray[np.int8] | None = None
        self.sigma = 1.0
        d = self.m = self.width = self.centre.size
        self.exact = directions is None and centre.dtype == np.uint8
        if directions is not None:
            self.directions = _integers(_turned(directions))
            wide = self.directions.astype(np.float64)
            self.sigma = float(np.linalg.eigvalsh(wide @ wide.T)[-1]) ** 0.5 * (1 + _RELATIVE)
            self.sigma = self.sigma or 1.0
            self.m, self.width = len(directions), len(directions) + 1
            self.summing = gamma(d) * float(np.linalg.norm(wide)) + 2.0**-24 * self.sigma
            self.in_integers = centre.dtype == np.uint8 and d * LARGEST**2 < engine.limit
            if self.in_integers:
                self.stored = engine.store(self.directions)
                self.offset = self.directions.astype(np.int64) @ (
                    self.centre.astype(np.int64) - 128
                )
            else:
                self.floats = self.directions.astype(np.float32)
        self.mu = np.float32(1)  # what a coordinate is multiplied by, rho / sigma
        self.shift = np.zeros(self.width)
        if not self.exact:
            made = np.concatenate([self._phi(block)[0] for _, block in blocks(sample, _CHUNK)])
            spread = float(made[:, : self.m].var(axis=0).mean()) ** 0.5
            if 1e-30 < spread < 1e30:
                self.mu = np.float32((LARGEST - 1) / (_SPREAD * spread))
            self.shift = made.mean(axis=0, dtype=np.float64) * float(self.mu)
        self.rho = float(self.mu) * self.sigma

    def __str__(self) -> str:
        what = f"{self.m} values" if self.directions is None else f"{self.m} directions"
        return f"{what} in {self.engine.name}"

    def features(self, x: Array) -> Features:
        """Features of rows [n, ...], made in pieces."""
        make = self._values if self.exact else self._chunk
        stored, known = self.engine.empty(len(x), self.width), []
        for start, block in blocks(x, _CHUNK):
            made = make(block)
            stored[start : start + len(block)] = made.stored
            known.append(made.known())
        return Features(stored, *(np.concatenate(each) for each in zip(*known, strict=True)))

    def row_bytes(self) -> int:
        """Memory of one row of features."""
        return self.width * self.engine.bytes + 5 * 8

    def working_bytes(self) -> int:
        """Memory of making features, beside the result."""
        return _CHUNK * (self.centre.size * 14 + self.width * 40) + self.m * self.centre.size * 5

    def _values(self, x: Array) -> Features:
        """The values of 8-bit images, less 128."""
        rows = flat_rows(x)
        none = np.zeros(len(x))
        return self._made(
            _signed(rows), squared_to(rows, np.full_like(rows[0], 128)), none, none, none
        )

    def _chunk(self, x: Array) -> Features:
        phi, error, rest = self._phi(x)
        phi -= self.shift.astype(phi.dtype)
        error += _ROUNDED * (_norm(phi) + 2 * float(np.linalg.norm(self.shift)))
        clipped = phi.clip(1 - LARGEST, LARGEST - 1)
        f = np.rint(clipped)
        clipped -= f
        phi -= f
        return self._made(
            f.astype(np.int8),
            np.einsum("ij,ij->i", f, f, dtype=np.float64),
            _norm(clipped) + error,
            _norm(phi) + error,
            rest,
        )

    def _made(
        self, f: NDArray[np.int8], size_squared: Array, error: Array, lost: Array, rest: Array
    ) -> Features:
        half = (size_squared // 2).astype(self.engine.dtype)
        return Features(self.engine.store(f), half, size_squared, error, lost, rest)

    def _phi(self, x: Array) -> tuple[Array, NDArray[np.float64], NDArray[np.float64]]:
        """phi(x) + shift [n, width]; bounds of its error [n], but for rounding; rho r_x [n]."""
        rows, scale = flat_rows(x), float(self.mu)
        length, seen, error = self._projected(rows)
        phi = np.empty((len(x), self.width), seen.dtype)
        np.multiply(seen, self.mu, out=phi[:, : self.m])
        if self.directions is None:
            return phi, error * scale, np.zeros(len(x))
        seen_squared = np.einsum("ij,ij->i", seen, seen).astype(np.float64)
        slack = gamma(self.m + 4) * seen_squared
        slack += error * (2 * np.sqrt(seen_squared) + error)
        slack = (slack / self.sigma**2 + _RELATIVE * length**2) * 1.01
        rest = np.sqrt(np.maximum(0, length**2 - seen_squared / self.sigma**2))
        off = np.sqrt(slack)
        off = np.minimum(off, np.divide(slack, rest, out=off.copy(), where=rest > 0))
        phi[:, self.m] = rest * (scale * self.sigma)
        return phi, (error + off * self.sigma) * scale, (rest + off) * (scale * self.sigma)

    def _projected(self, rows: Array) -> tuple[Array, Array, NDArray[np.float64]]:
        """|z| [n]; P z (or z) [n, m]; a bound of the error of its rows [n]."""
        if self.directions is not None and self.in_integers:
            length = np.sqrt(squared_to(rows, self.centre))
            out = np.empty(len(rows) * self.m, self.engine.dtype)
            seen = self.engine.product(self.engine.store(_signed(rows)), self.stored, out)
            seen -= self.offset.astype(seen.dtype)
            return length, seen.astype(np.float32), np.zeros(len(rows))
        z = np.subtract(rows, self.centre, dtype=np.float64)
        length = np.sqrt(np.einsum("ij,ij->i", z, z))
        narrow = z.astype(np.float32)
        if self.directions is None:
            error = 2.0**-24 * length + self.m * _TINY
            return length, narrow.astype(np.float64), error
        error = self.summing * length * 1.01 + self.m * self.centre.size * LARGEST * _TINY
        return length, (narrow @ self.floats.T).astype(np.float64), error


class SketchFilter:
    """Ranks of one block of queries, and their limits; takes the place of `filter.Filter`."""

    def __init__(self, sketch: Sketch, queries: Features, out: Array) -> None:
        self.sketch = sketch
        self.queries = queries
        self.out = out
        self.error = self.lost = self.rest = 0.0  # largest of the references so far

    def ranks(self, references: Features) -> Array:
        """Ranks [Q, r]; they live until the next call."""
        self.error = max(self.error, float(references.error.max()))
        self.lost = max(self.lost, float(references.lost.max()))
        self.rest = max(self.rest, float(references.rest.max()))
        rank = self.sketch.engine.product(self.queries.stored, references.stored, self.out)
        return np.subtract(references.half, rank, out=rank)

    def most(self, squared: Array) -> Array:
        """Whatever is within squared distances [Q] has at most this rank, [Q, 1]."""
        s = np.sqrt(np.maximum(squared, 0)) * self.sketch.rho
        reach = (s + self.queries.error + self.error) * (1 + _RELATIVE)
        rank = (reach**2 - self.queries.size_squared) / 2
        return self._limit(np.where(squared < 0, -np.inf, rank))

    def surely(self, squared: Array) -> Array:
        """Whatever has at most this rank, [Q, 1], is within squared distances [Q]."""
        q = self.queries
        seen = self.sketch.rho**2 * squared * (1 - _RELATIVE) - 4 * q.rest * self.rest
        reach = np.sqrt(np.maximum(seen, 0)) * (1 - _RELATIVE) - q.lost - self.lost
        rank = (reach**2 - q.size_squared - 1.001) / 2  # 1 for the floor, the rest for rounding
        return self._limit(np.where((seen >= 0) & (reach >= 0), rank, -np.inf))

    def squared(
        self, rank: Array, query: Array, column: Array, references: Features
    ) -> NDArray[np.float64]:
        """Squared distances of pairs with these ranks, by exact features."""
        odd = references.size_squared[column] % 2  # what the rank leaves out
        squared: NDArray[np.float64] = 2.0 * rank + self.queries.size_squared[query] + odd
        return squared

    def _limit(self, rank: Array) -> Array:
        engine = self.sketch.engine
        return np.floor(rank).clip(-engine.limit, engine.never - 1).astype(engine.dtype)[:, None]


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
    if not kept.any():  # rows that are all alike
        return np.eye(len(basis), 1, dtype=np.float32)
    return (wide @ (axes[:, kept] / np.sqrt(values[kept]))).astype(np.float32)


def _turned(directions: Array) -> Array:
    """Other directions of the same span, none of which is a leading one."""
    noise = np.random.default_rng(1).standard_normal((len(directions), len(directions)))
    turned: Array = np.linalg.qr(noise)[0].astype(np.float32) @ directions
    return turned


def _integers(directions: Array) -> NDArray[np.int8]:
    """Directions, all times one number, as 8-bit integers."""
    largest = float(np.abs(directions).max()) or 1.0
    integers: NDArray[np.int8] = np.rint(directions * ((LARGEST - 1) / largest)).astype(np.int8)
    return integers


def _signed(rows: NDArray[np.uint8]) -> NDArray[np.int8]:
    """rows - 128."""
    return (rows ^ np.uint8(128)).view(np.int8)


def _norm(x: Array) -> NDArray[np.float64]:
    """Lengths of rows, not below the true ones."""
    norm: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", x, x).astype(np.float64))
    return norm * (1 + gamma(x.shape[1] + 4))
