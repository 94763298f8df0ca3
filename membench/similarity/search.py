"""Exact k nearest neighbours by L2, in blocks, within a stated memory bound.

A float32 matrix product only *filters*: by its proven rounding margin no true neighbour is lost.
Distances of the survivors are recomputed exactly, so the answer is that of brute force in integers,
whatever the machine, the BLAS and the block sizes.

With `a = query - centre`, `b = reference - centre`, a pair is ranked by

    rank = |b|^2 / 2 - a.b = (d^2 - |a|^2) / 2,         d = |a - b|

and the computed rank differs from the true one by at most

    margin = gamma(D + 4) |a| |b| + 4 u |b|^2 / 2,      gamma(n) = n u / (1 - n u),  u = 2^-24

for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1,
with Cauchy-Schwarz). For uint8 the centre is an integer image, so `a` and `b` hold integers and
are exact; for floats their rounding adds `2 u (|a| + |b|)^2`. If k references have a computed rank
of at most r, the k nearest have a true rank of at most r + margin: all others are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError

Array = NDArray[Any]

_U = 2.0**-24  # unit roundoff of float32
_TINY = 2.0**-126  # bound of the error of one product that underflows
_LARGEST = 1e15  # descriptors beyond this overflow when squared in float32
_PENDING = 4  # candidates kept per query, in multiples of k, before they are pruned
_REFINED = 64  # pairs refined at a time: their rows stay in the cache
_PAIR_BYTES = 64  # working memory of one pair of a tile, if every pair survives


@dataclass(frozen=True)
class Neighbours:
    """The k nearest references of every query, nearest first, ties by lowest index.

    distance: float32 [Q, k]; L2 over pixels in [0, 1] for uint8 images, plain L2 for descriptors.
    index: int32 [Q, k] into the reference.
    Raises MembenchError for shapes that differ, NaN, or distances that are not ascending.
    """

    distance: NDArray[np.float32]
    index: NDArray[np.int32]

    def __post_init__(self) -> None:
        d, i = self.distance, self.index
        if d.ndim != 2 or d.shape != i.shape or d.size == 0:
            raise MembenchError(
                f"distance and index must share one shape [Q, k], not {d.shape} and {i.shape}"
            )
        if d.dtype != np.float32 or i.dtype != np.int32:
            raise MembenchError(f"neighbours need float32 and int32, not {d.dtype} and {i.dtype}")
        if not np.isfinite(d).all() or d.min() < 0 or (np.diff(d, axis=1) < 0).any():
            raise MembenchError("neighbour distances must be finite, >= 0 and ascending")
        if i.min() < 0:
            raise MembenchError("neighbour indices must be >= 0")


def nearest(
    queries: Array,
    reference: Array,
    k: int = 50,
    *,
    memory_bytes: int = 256 * 2**20,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """The exact k nearest references of every query by L2; k = N if there are only N < k.

    queries, reference: uint8 images [*, H, W, C] or [*, D], or float32/float64 descriptors [*, D];
    arrays or memory maps of any length, which are read block by block.
    memory_bytes: bound of the working memory (without the inputs and the result).
    progress: called after each block with the number of (query, reference) pairs it compared;
    they add up to Q * N.

    For uint8 the order is that of the integer squared distance; for floats that of the squared
    distance in float64. Raises MembenchError for wrong shapes or dtypes, empty input, NaN, infinite
    or huge values, and a memory bound that is too small for a single pair.
    """
    _check(queries, reference, k)
    queries, reference = np.asarray(queries), np.asarray(reference)  # a memory map stays one
    k = min(k, len(reference))
    q_rows, r_rows = _tile(queries, reference, k, memory_bytes)
    centre = _centre(reference)
    distance = np.empty((len(queries), k), np.float32)
    index = np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), q_rows):
        rows = slice(start, start + q_rows)
        block = _flat(queries, start, start + q_rows)
        squared, index[rows] = _nearest_to_block(block, reference, k, centre, r_rows, progress)
        distance[rows] = np.sqrt(squared) / (255 if block.dtype == np.uint8 else 1)
    return Neighbours(distance, index)


@dataclass
class _Candidates:
    """Pairs of one block of queries that may be among the k nearest, sorted by query."""

    query: NDArray[np.int32]
    index: NDArray[np.int32]
    rank: NDArray[np.float32]

    @classmethod
    def none(cls) -> _Candidates:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, chosen: Array) -> _Candidates:
        return _Candidates(self.query[chosen], self.index[chosen], self.rank[chosen])

    def __add__(self, other: _Candidates) -> _Candidates:
        return _Candidates(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.index, other.index]),
            np.concatenate([self.rank, other.rank]),
        )


def _nearest_to_block(
    queries: Array,
    reference: Array,
    k: int,
    centre: Array,
    r_rows: int,
    progress: Callable[[int], None] | None,
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Squared distances [Q, k] (integers for uint8) and indices [Q, k] for one block of queries."""
    n_queries, d = queries.shape
    exact_input = queries.dtype == np.uint8
    minus_a = np.negative(_centred(queries, centre))
    a_squared = _squared(queries, centre)
    a_norm = np.sqrt(a_squared)
    b_norm = 0.0  # largest |b| so far

    def margin() -> Array:
        gamma = (d + 4) * _U / (1 - (d + 4) * _U)
        bound: Array = gamma * a_norm * b_norm + 2 * _U * b_norm**2
        return bound if exact_input else bound + 2 * _U * (a_norm + b_norm) ** 2 + d * _TINY

    found = _Candidates.none()
    limit = np.full(n_queries, np.inf)  # no neighbour that is still missing has a larger true rank
    products = np.empty((n_queries, r_rows), np.float32)
    buffer = np.empty((r_rows, d), np.float32)
    for start in range(0, len(reference), r_rows):
        block = _flat(reference, start, start + r_rows)
        b = _centred(block, centre, out=buffer[: len(block)])
        b_squared = _squared(block, centre)
        b_norm = max(b_norm, float(np.sqrt(b_squared.max())))
        slack = margin()

        rank = np.matmul(minus_a, b.T, out=products[:, : len(b)])
        rank += (b_squared / 2).astype(np.float32)
        near = rank <= _float32_above(limit + slack)[:, None]
        if len(b) >= k and np.count_nonzero(near) > 2 * k * n_queries:
            kth = np.partition(rank, k - 1, axis=1)[:, k - 1]
            limit = np.minimum(limit, kth + slack)
            near = rank <= _float32_above(limit + slack)[:, None]
        query, column = np.divmod(np.flatnonzero(near), len(b))
        found += _Candidates(
            query.astype(np.int32), (column + start).astype(np.int32), rank[query, column]
        )
        del near, query, column

        if len(found) > _PENDING * k * n_queries:
            found, kth = _prune(found, k, slack)
            limit = np.minimum(limit, kth + slack)
        if len(found) > _PENDING * k * n_queries:  # more near-ties than the margin can tell apart
            found, squared = _settle(found, k, queries, reference)
            rank_k = _kth(found, (squared - a_squared[found.query]) / 2, k, n_queries)
            # a later reference has a higher index, so it must be nearer by a whole unit of d^2
            limit = np.minimum(limit, rank_k - 0.5 if exact_input else rank_k + slack)
        if progress is not None:
            progress(n_queries * len(block))

    found, _ = _prune(found, k, margin())
    found, squared = _settle(found, k, queries, reference)
    return squared.reshape(n_queries, k), found.index.reshape(n_queries, k)


def _prune(
    found: _Candidates, k: int, slack: NDArray[np.float64]
) -> tuple[_Candidates, NDArray[np.float64]]:
    """Drops what cannot be among the k nearest; also the k-th smallest computed rank [Q]."""
    bits = found.rank.view(np.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    found = found[np.argsort((found.query.astype(np.int64) << 32) + ascending)]
    kth = _kth(found, found.rank.astype(np.float64), k, len(slack))
    return found[found.rank <= _float32_above(kth + 2 * slack)[found.query]], kth


def _settle(
    found: _Candidates, k: int, queries: Array, reference: Array
) -> tuple[_Candidates, NDArray[np.float64]]:
    """The k nearest of each query's candidates by true distance, then index; squared distances."""
    found = found[np.argsort(found.index)]  # the reference is read once, front to back
    squared = np.empty(len(found))
    for start in range(0, len(found), _REFINED):
        pairs = slice(start, start + _REFINED)
        rows = reference[found.index[pairs]]
        squared[pairs] = _squared(rows.reshape(len(rows), -1), queries[found.query[pairs]])
    order = np.lexsort((found.index, squared, found.query))
    found, squared = found[order], squared[order]
    first = np.searchsorted(found.query, np.arange(len(queries)))
    chosen = np.flatnonzero(np.arange(len(found)) - first[found.query] < k)
    return found[chosen], squared[chosen]


def _kth(found: _Candidates, value: Array, k: int, n_queries: int) -> NDArray[np.float64]:
    """The k-th of each query's values, which are sorted by query, then ascending; inf if fewer."""
    first = np.searchsorted(found.query, np.arange(n_queries + 1))
    last = first[:-1] + k - 1
    enough = last < first[1:]
    return np.where(enough, value[np.where(enough, last, 0)], np.inf)


def _squared(x: Array, y: Array) -> NDArray[np.float64]:
    """Squared L2 distances between rows, x [n, D], y [n, D] or [D]: exact for uint8."""
    if x.dtype != np.uint8:
        difference = np.subtract(x, y, dtype=np.float64)
        return np.asarray((difference * difference).sum(axis=1))
    difference = (np.maximum(x, y) - np.minimum(x, y)).astype(np.uint16)
    difference *= difference  # at most 255^2 < 2^16
    exact = np.uint32 if x.shape[1] * 255**2 < 2**32 else np.uint64
    squared: NDArray[np.float64] = difference.sum(axis=1, dtype=exact).astype(np.float64)
    return squared


def _centred(x: Array, centre: Array, out: Array | None = None) -> NDArray[np.float32]:
    """x - centre [n, D] as float32: exact for uint8, rounded once for floats."""
    out = np.empty(x.shape, np.float32) if out is None else out
    if x.dtype == np.uint8:
        out[:] = x
        out -= centre.astype(np.float32)
    else:
        out[:] = np.subtract(x, centre, dtype=np.float64)
    return out


def _centre(reference: Array) -> Array:
    """A point near the mean [D], of the reference's own dtype; any point gives the same answer."""
    sample = reference[:: -(-len(reference) // 256)]
    mean = sample.reshape(len(sample), -1).mean(axis=0, dtype=np.float64)
    centre: Array = np.rint(mean) if reference.dtype == np.uint8 else mean
    return centre.astype(reference.dtype)


def _float32_above(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """Float32 numbers that are not below x."""
    return np.nextafter(x.astype(np.float32), np.float32(np.inf))


def _flat(x: Array, start: int, stop: int) -> Array:
    """Rows start..stop of x as [n, D]; a view where x is contiguous."""
    block = np.asarray(x[start:stop])
    return block.reshape(len(block), -1)


def _tile(queries: Array, reference: Array, k: int, memory_bytes: int) -> tuple[int, int]:
    """Rows of the query and reference blocks whose product fits into the memory bound."""
    d = _features(reference)
    # float32 and the temporaries of `_centred` and `_squared`; then of one step of `_settle`
    row, refined = (13 * d, 7 * d) if reference.dtype == np.uint8 else (24 * d, 32 * d)
    fixed = _REFINED * refined + 2**15

    def bytes_needed(q: int, r: int) -> int:
        return fixed + (q + r) * row + q * (r + _PENDING * k) * _PAIR_BYTES

    q, r = min(len(queries), 2048), min(len(reference), 1024)
    while bytes_needed(q, r) > memory_bytes:
        if q == r == 1:
            raise MembenchError(
                f"the search needs at least {bytes_needed(1, 1)} bytes of memory for rows of "
                f"{d} values, but memory_bytes is {memory_bytes}"
            )
        q, r = (-(-q // 2), r) if q >= r else (q, -(-r // 2))
    return q, r


def _features(x: Array) -> int:
    return int(np.prod(x.shape[1:]))


def _check(queries: Array, reference: Array, k: int) -> None:
    """Refuses input that cannot be compared, in one line that says why."""
    if k < 1:
        raise MembenchError(f"k must be at least 1, not {k}")
    for name, x in (("queries", queries), ("reference", reference)):
        if not isinstance(x, np.ndarray) or x.ndim not in (2, 4):
            what = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise MembenchError(f"{name} must be an array [*, H, W, C] or [*, D], not {what}")
        if x.dtype not in (np.uint8, np.float32, np.float64):
            raise MembenchError(f"{name} must be uint8, float32 or float64, not {x.dtype}")
        if x.size == 0:
            raise MembenchError(f"{name} are empty: shape {x.shape}")
    if _features(queries) != _features(reference) or (
        queries.ndim == reference.ndim and queries.shape[1:] != reference.shape[1:]
    ):
        raise MembenchError(
            f"queries and reference differ in shape: {queries.shape[1:]} and {reference.shape[1:]}"
        )
    if (queries.dtype == np.uint8) != (reference.dtype == np.uint8):
        raise MembenchError(
            f"queries and reference must both be uint8 images or both float descriptors, "
            f"not {queries.dtype} and {reference.dtype}"
        )
    if len(reference) >= 2**31:
        raise MembenchError(f"the reference has {len(reference)} rows; the limit is 2^31 - 1")
    for name, x in (("queries", queries), ("reference", reference)):
        if x.dtype != np.uint8 and not all(np.abs(b).max() <= _LARGEST for b in _blocks(x)):
            raise MembenchError(f"{name} hold NaN, infinite or huge (> {_LARGEST:g}) values")


def _blocks(x: Array) -> Iterator[Array]:
    """x in pieces of about one MiB."""
    rows = max(1, 2**20 // (_features(x) * x.dtype.itemsize))
    return (x[start : start + rows] for start in range(0, len(x), rows))
