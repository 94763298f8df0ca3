"""Exact k nearest neighbours by L2, in blocks, within a stated memory bound.

Float32 matrix products only *filter*: by a proven margin no true neighbour is lost. Distances of
the survivors are computed in integers, so the answer is that of brute force, whatever the machine,
the BLAS and the block sizes.

**Features.** A pair is filtered by features whose distance never exceeds the true one:

    |f(x) - f(y)|^2 <= stretch * |x - y|^2

They are the values themselves (stretch 1) or, for smooth images, the sums of p x p patches (stretch
p^2, by Cauchy-Schwarz). On CIFAR-10, 2 x 2 patches keep 93 % of the squared distance for a quarter
of the work; 4 x 4 patches first suggest k references, whose true distances bound what to look for.
Where patches do not separate, the search uses the values.

**Ranks.** With `a = f(query) - f(centre)` and `b = f(reference) - f(centre)`, a pair's rank is

    rank = |b|^2 / 2 - a.b = (|a - b|^2 - |a|^2) / 2,

and the computed rank differs from the true one by at most

    margin = gamma(D + 4) (|a| |b| + |b|^2 / 2),      gamma(n) = n u / (1 - n u),   u = 2^-24

for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1).
For uint8 the centre is an integer image, so `a` and `b` are exact; for floats their rounding adds
`2 u (|a| + |b|)^2`. So whatever is within a squared distance s has a computed rank of at most
(stretch * s - |a|^2) / 2 + margin, and k known distances of at most s let all others be dropped.
"""

from __future__ import annotations

import math
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
_PENDING = 12  # candidates kept per query, in multiples of k, before they are pruned
_SMOOTH = 0.9  # share of the squared distance that patches must keep to be worth a try
_USEFUL = 1 / 32  # share of pairs left to refine beyond which patches cost more than they save
_REFINED = 64  # pairs refined at a time: their rows stay in the cache
_PAIR_BYTES = 52  # working memory of one pair of a tile, if every pair survives


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
    centre, patches = _centre(reference)
    patches = patches and queries.ndim == 4
    distance = np.empty((len(queries), k), np.float32)
    index = np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), q_rows):
        rows = slice(start, start + q_rows)
        squared, index[rows] = _nearest_to_block(
            queries[rows], reference, k, centre, patches, r_rows, progress
        )
        distance[rows] = np.sqrt(squared) / (255 if queries.dtype == np.uint8 else 1)
    return Neighbours(distance, index)


@dataclass
class _Candidates:
    """Pairs of one block of queries that may be among the k nearest."""

    query: NDArray[np.int32]
    index: NDArray[np.int32]
    rank: NDArray[np.float32]

    @classmethod
    def none(cls) -> _Candidates:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    @classmethod
    def where(cls, near: Array, rank: Array, start: int) -> _Candidates:
        """Entries of a block of ranks [Q, r] that begins at reference `start`."""
        query, column = np.divmod(np.flatnonzero(near), near.shape[1])
        index = (column + start).astype(np.int32)
        return cls(query.astype(np.int32), index, rank[query, column])

    def by_rank(self) -> _Candidates:
        """Sorted by query, then rank."""
        bits = self.rank.view(np.int32)
        ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
        return self[np.argsort((self.query.astype(np.int64) << 32) + ascending)]

    def first(self, k: int, n_queries: int) -> NDArray[np.int64]:
        """Positions of each query's first k entries; they must be sorted by query."""
        begin = np.searchsorted(self.query, np.arange(n_queries, dtype=np.int32))
        return np.flatnonzero(np.arange(len(self)) - begin[self.query] < k)

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


class _Filter:
    """Ranks of one block of queries against blocks of references, with their margin."""

    def __init__(self, queries: Array, centre: Array, patch: int, r_rows: int) -> None:
        self.exact_input = queries.dtype == np.uint8
        self.is_rank = patch == 1  # of the true distance, not of a lower bound
        self.patch = patch
        self.stretch = patch**2
        self.centre = centre
        a = self._features(queries)
        self.minus_a = np.negative(a, out=a)
        self.a_squared = np.einsum("ij,ij->i", a, a, dtype=np.float64)
        self.a_norm = np.sqrt(self.a_squared)
        self.b_norm = 0.0  # largest |b| so far
        self.products: NDArray[np.float32] = np.empty((len(a), r_rows), np.float32)
        n = a.shape[1] + 4
        self.gamma = n * _U / (1 - n * _U)

    def ranks(self, block: Array) -> NDArray[np.float32]:
        """Computed ranks [Q, r]; they live until the next call."""
        b = self._features(block)
        b_squared = np.einsum("ij,ij->i", b, b)
        self.b_norm = max(self.b_norm, math.sqrt(float(b_squared.max()) / (1 - self.gamma)))
        ranks: NDArray[np.float32] = self.products[:, : len(b)]
        np.matmul(self.minus_a, b.T, out=ranks)
        ranks += b_squared / 2
        return ranks

    def margin(self) -> Array:
        """Bound of the error of every rank computed so far [Q]."""
        b_norm = self.b_norm
        margin: Array = self.gamma * (self.a_norm * b_norm + b_norm**2 / 2)
        if not self.exact_input:
            margin = margin + 2 * _U * (self.a_norm + b_norm) ** 2
            margin += self.minus_a.shape[1] * _TINY
        return margin

    def rank_of(self, squared: Array, query: Array | slice = slice(None)) -> Array:
        """The largest true rank within squared distances, of the given queries."""
        return (self.stretch * squared - self.a_squared[query]) / 2

    def _features(self, x: Array) -> NDArray[np.float32]:
        """f(x) - f(centre), float32 [n, F]: exact for uint8, rounded once for floats."""
        if self.patch > 1:
            features = _patches(x, self.patch).astype(np.float32)
            features -= _patches(self.centre[None], self.patch).astype(np.float32)
            return features
        rows, centre = _rows(x), self.centre.ravel()
        if self.exact_input:
            features = rows.astype(np.float32)
            features -= centre.astype(np.float32)
        else:
            features = np.subtract(rows, centre, dtype=np.float64).astype(np.float32)
        return features


def _nearest_to_block(
    queries: Array,
    reference: Array,
    k: int,
    centre: Array,
    patches: bool,
    r_rows: int,
    progress: Callable[[int], None] | None,
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Squared distances [Q, k] (integers for uint8) and indices [Q, k] for one block of queries."""
    n_queries = len(queries)
    room = _PENDING * k * n_queries
    limit = np.full(n_queries, np.inf)  # no neighbour that is still missing has a larger true rank
    filter_ = _Filter(queries, centre, 2 if patches else 1, r_rows)
    if patches:
        likely = _likely(_Filter(queries, centre, 4, r_rows), reference, 2 * k, r_rows)
        squared = np.sort(_refine(likely, queries, reference).reshape(n_queries, -1), axis=1)
        farthest = squared[:, k - 1]
        limit = filter_.rank_of(farthest)
        rank = filter_.ranks(reference[:: -(-len(reference) // r_rows)])
        if np.count_nonzero(rank <= limit[:, None]) > _USEFUL * rank.size:
            filter_ = _Filter(queries, centre, 1, r_rows)
            limit = filter_.rank_of(farthest)

    found = _Candidates.none()
    for start in range(0, len(reference), r_rows):
        block = reference[start : start + r_rows]
        rank = filter_.ranks(block)
        margin = filter_.margin()
        near = rank <= _float32_above(limit + margin)[:, None]
        if filter_.is_rank and len(block) >= k and np.count_nonzero(near) > 2 * k * n_queries:
            kth = np.partition(rank, k - 1, axis=1)[:, k - 1]
            limit = np.minimum(limit, kth + margin)
            near = rank <= _float32_above(limit + margin)[:, None]
        found += _Candidates.where(near, rank, start)

        if filter_.is_rank and len(found) > room:
            found, bound = _prune(found, k, margin)
            limit = np.minimum(limit, bound)
        if len(found) > room:  # more than the filter can tell apart
            found, squared = _settle(found, k, queries, reference)
            found.rank = filter_.rank_of(squared, found.query).astype(np.float32)
            if len(found) == k * n_queries:
                # a later reference has a higher index, so it must be nearer by a unit of d^2
                farthest = squared.reshape(n_queries, k)[:, -1] - filter_.exact_input
                slack = 0 if filter_.exact_input else margin
                limit = np.minimum(limit, filter_.rank_of(farthest) + slack)
        if progress is not None:
            progress(n_queries * len(block))

    if filter_.is_rank:
        found, _ = _prune(found, k, filter_.margin())
    found, squared = _settle(found, k, queries, reference)
    return squared.reshape(n_queries, k), found.index.reshape(n_queries, k)


def _likely(filter_: _Filter, reference: Array, k: int, r_rows: int) -> _Candidates:
    """The k lowest computed ranks of each query: a guess, whose distances bound the true ones."""
    n_queries = len(filter_.minus_a)
    k = min(k, len(reference))
    found = _Candidates.none()
    cutoff = np.full(n_queries, np.inf, np.float32)
    for start in range(0, len(reference), r_rows):
        rank = filter_.ranks(reference[start : start + r_rows])
        near = rank < cutoff[:, None]
        if rank.shape[1] >= k and np.count_nonzero(near) > 2 * k * n_queries:
            cutoff = np.minimum(cutoff, np.partition(rank, k - 1, axis=1)[:, k - 1])
            near = rank <= cutoff[:, None]
        found += _Candidates.where(near, rank, start)
        last = start + r_rows >= len(reference)
        if last or len(found) > _PENDING // 2 * k * n_queries:
            found = found.by_rank()
            found = found[found.first(k, n_queries)]
            if len(found) == k * n_queries:
                cutoff = found.rank.reshape(n_queries, k)[:, -1]
    return found


def _prune(found: _Candidates, k: int, margin: Array) -> tuple[_Candidates, Array]:
    """Drops what cannot be among the k nearest, by computed ranks; upper bounds of the k-th [Q]."""
    found = found.by_rank()
    first = found.first(k, len(margin))
    if len(first) < k * len(margin):
        return found, np.full(len(margin), np.inf)
    limit = found.rank[first].reshape(-1, k)[:, -1] + margin
    return found[found.rank <= _float32_above(limit + margin)[found.query]], limit


def _settle(
    found: _Candidates, k: int, queries: Array, reference: Array
) -> tuple[_Candidates, NDArray[np.float64]]:
    """The k nearest of each query's candidates by true distance, then index; squared distances."""
    squared = _refine(found, queries, reference)
    order = np.lexsort((found.index, squared, found.query))
    chosen = order[found[order].first(k, len(queries))]
    return found[chosen], squared[chosen]


def _refine(found: _Candidates, queries: Array, reference: Array) -> NDArray[np.float64]:
    """True squared distances of candidates; the reference is read once, front to back."""
    squared = np.empty(len(found))
    order = np.argsort(found.index)
    for start in range(0, len(found), _REFINED):
        pairs = order[start : start + _REFINED]
        rows = _rows(reference[found.index[pairs]])
        squared[pairs] = _squared(rows, _rows(queries[found.query[pairs]]))
    return squared


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


def _patches(x: Array, patch: int) -> NDArray[np.uint16]:
    """Sums of 2 x 2 or 4 x 4 patches of uint8 images [n, H, W, C], as [n, H W C / patch^2]."""
    n, height, width, channels = x.shape
    if patch == 4:
        half = _patches(x, 2).reshape(n, height // 2, width // 2, channels)
        return _patches(half, 2)
    tall = np.add(x[:, 0::2], x[:, 1::2], dtype=np.uint16).reshape(-1, 2 * channels)
    sums = np.empty((len(tall), channels), np.uint16)
    for c in range(channels):  # long strides are quicker than an inner loop over few channels
        np.add(tall[:, c], tall[:, channels + c], out=sums[:, c])
    return sums.reshape(n, -1)


def _centre(reference: Array) -> tuple[Array, bool]:
    """A point near the mean, of the reference's dtype and shape, and whether patches may help.

    Any point and either choice give the same answer.
    """
    sample = reference[:: -(-len(reference) // 256)]
    mean: Array = sample.mean(axis=0, dtype=np.float64)
    if reference.dtype != np.uint8:
        return mean.astype(reference.dtype), False
    centre = np.rint(mean).astype(np.uint8)
    if reference.ndim != 4 or reference.shape[1] % 4 or reference.shape[2] % 4:
        return centre, False
    total = kept = 0.0
    for row in sample:
        total += float(_squared(_rows(row[None]), centre.ravel())[0])
        difference = _patches(row[None], 2).astype(np.float64) - _patches(centre[None], 2)
        kept += float((difference**2).sum()) / 4
    return centre, kept >= _SMOOTH * total


def _float32_above(x: Array) -> NDArray[np.float32]:
    """Float32 numbers that are not below x."""
    return np.nextafter(x.astype(np.float32), np.float32(np.inf))


def _rows(x: Array) -> Array:
    """Images or descriptors as [n, D]; a view where x is contiguous."""
    return x.reshape(len(x), -1)


def _tile(queries: Array, reference: Array, k: int, memory_bytes: int) -> tuple[int, int]:
    """Rows of the query and reference blocks whose product fits into the memory bound."""
    d = _features(reference)
    # features and the temporaries of making them; then the temporaries of one step of `_refine`
    row, refined = (8 * d, 7 * d) if reference.dtype == np.uint8 else (16 * d, 32 * d)
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
