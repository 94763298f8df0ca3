"""Exact k nearest neighbours and range search by L2, in blocks, within a stated memory bound.

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
Conversely, where features are values, a computed rank of at most (s - |a|^2) / 2 - margin proves a
pair to be within s. For floats both also hold for the squared distance that float64 gives: half of
`2 u (|a| + |b|)^2` is to spare, far more than its rounding, D 2^-53 (|a| + |b|)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.pages import release

Array = NDArray[Any]

_U = 2.0**-24  # unit roundoff of float32
_TINY = 2.0**-126  # bound of the error of one product that underflows
_LARGEST = 1e15  # descriptors beyond this overflow when squared in float32
_PENDING = 12  # candidates kept per query, in multiples of k, before they are pruned
_SMOOTH = 0.9  # share of the squared distance that patches must keep to be worth a try
_USEFUL = 1 / 32  # share of pairs left to refine beyond which patches cost more than they save
_REFINED = 64  # pairs refined at a time: their rows stay in the cache
_PAIR_BYTES = 52  # working memory of one pair of a tile, if every pair survives
_STREAMED_BYTES = 84  # the same for range search, with the pairs that the caller still holds


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

    queries, reference: uint8 images [*, H, W, C] or [*, D], or descriptors [*, D] of float16,
    float32 or float64, also of two of them; arrays or memory maps of any length, which are read
    block by block and whose pages are given back, so that they never fill the memory.
    memory_bytes: bound of the working memory (without the inputs and the result).
    progress: called after each block with the number of (query, reference) pairs it compared;
    they add up to Q * N.

    For uint8 the order is that of the integer squared distance; for floats that of the squared
    distance of the stored values in float64. Raises MembenchError for wrong shapes or dtypes, empty
    input, NaN, infinite or huge values, and a memory bound that is too small for a single pair.
    """
    if k < 1:
        raise MembenchError(f"k must be at least 1, not {k}")
    _check(queries, reference)
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
        distance[rows] = _distance(squared, queries.dtype)
    return Neighbours(distance, index)


def merge(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k nearest of two searches of one reference, if the smaller of both distances counts.

    Row q of `first` and of `second` belong together: a query and its mirror image, so that copies
    which a model flipped are found too. k is cut to the shorter of the two lists (which holds the
    whole reference if that has fewer than k images). Nearest first, ties by lowest index.

    **The lists hold all that is needed.** Let j be among the k first by (min(d1, d2), index), with
    min(d1, d2)(j) = d1(j); else swap the lists. Whatever comes before j by (d1, index) comes before
    it by (min(d1, d2), index) as well, since min(d1, d2) <= d1. These are fewer than k, so j is in
    the first list, with its smaller distance. Rounding to float32 is monotone, so the distances
    returned are those of the true k nearest; where float32 makes distances equal that were not,
    they count as ties among the entries of both lists.

    Raises MembenchError for k < 1 and lists of different numbers of queries.
    """
    if k < 1:
        raise MembenchError(f"k must be at least 1, not {k}")
    if len(first.index) != len(second.index):
        raise MembenchError(
            f"the neighbours to merge are of {len(first.index)} and {len(second.index)} queries; "
            "they must be of the same images"
        )
    k = min(k, first.index.shape[1], second.index.shape[1])
    index = np.concatenate([first.index[:, :k], second.index[:, :k]], axis=1)
    distance = np.concatenate([first.distance[:, :k], second.distance[:, :k]], axis=1)
    by_index = np.lexsort((distance, index), axis=1)
    index, distance = (np.take_along_axis(x, by_index, axis=1) for x in (index, distance))
    farther = np.zeros(index.shape, bool)  # the second, not smaller distance of one reference
    farther[:, 1:] = index[:, 1:] == index[:, :-1]
    nearest_first = np.lexsort((index, distance, farther), axis=1)[:, :k]
    return Neighbours(
        np.take_along_axis(distance, nearest_first, axis=1),
        np.take_along_axis(index, nearest_first, axis=1),
    )


def within(
    queries: Array,
    reference: Array,
    radius: float | Array,
    *,
    memory_bytes: int = 256 * 2**20,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]]:
    """Every pair of a query and a reference at a distance <= radius, in pieces of bounded size.

    queries, reference, memory_bytes, progress: as for `nearest`. The bound includes one piece.
    radius: one for all or [Q], in the unit of the distances of `nearest` (pixels in [0, 1] for
    uint8). Both are compared as float32, the precision of those distances, so a pair exactly at the
    edge is in, and `within` finds what `nearest(...).distance <= radius` does.

    Yields (query int64 [P], index int32 [P], squared float64 [P]), P >= 1, sorted by query and then
    index within a piece. squared: the squared distance in the unit of radius^2; for uint8 it is
    the integer squared distance / 255^2. Each pair comes once, whatever the blocks.
    Raises MembenchError like `nearest`, and for a radius that is negative, NaN or of another shape.
    """
    _check(queries, reference)
    queries, reference = np.asarray(queries), np.asarray(reference)
    radii = _radii(radius, len(queries), ((), (len(queries),)))

    def pieces() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]]:
        for piece in _pieces_within(queries, reference, radii, memory_bytes, progress):
            found, own = piece.found, radii[piece.rows]
            squared = _refine(found, queries[piece.rows], reference)
            close = _distance(squared, queries.dtype) <= own[found.query]
            if close.any():
                query = found.query[close].astype(np.int64) + piece.rows.start
                yield query, found.index[close], squared[close] / _unit(queries.dtype) ** 2

    return pieces()


@dataclass(frozen=True)
class Tally:
    """How many queries lie within radius t of each reference, and the sum of their indices.

    count: int32 [T, N]. total: int64 [T, N].
    """

    count: NDArray[np.int32]
    total: NDArray[np.int64]

    def band(self, inner: int | None, outer: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Count and total [N] of the pairs within radius number `outer` but not within `inner`.

        inner: None for all within `outer`; otherwise a radius that nowhere exceeds the outer one.
        """
        if inner is None:
            return self.count[outer], self.total[outer]
        return self.count[outer] - self.count[inner], self.total[outer] - self.total[inner]


def tally(
    queries: Array,
    reference: Array,
    radii: Array,
    *,
    memory_bytes: int = 256 * 2**20,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Counts, for each reference and radius, exactly the pairs that `within` would stream.

    queries, reference, memory_bytes, progress: as for `nearest`; one pass serves all radii.
    radii: [T], or [T, Q] for radii of each query; unit and comparison as for `within`.
    Distances are computed only of pairs whose rank, with its margin, does not decide.
    Raises MembenchError like `within`.
    """
    _check(queries, reference)
    queries, reference = np.asarray(queries), np.asarray(reference)
    given = np.asarray(radii)
    n_radii = len(given) if given.ndim else 0
    bounds = _radii(given, len(queries), ((n_radii,), (n_radii, len(queries))))
    count = np.zeros((n_radii, len(reference)), np.int32)
    total = np.zeros((n_radii, len(reference)), np.int64)
    widest = bounds.max(axis=0)
    for piece in _pieces_within(queries, reference, widest, memory_bytes, progress):
        found, columns = piece.found, piece.columns
        limits = [piece.limits(own, queries.dtype) for own in bounds[:, piece.rows]]
        unsure = np.zeros(len(found), bool)
        for sure, possible in limits:
            unsure |= (found.rank > sure[found.query]) & (found.rank <= possible[found.query])
        squared = _refine(found[unsure], queries[piece.rows], reference)
        distance = _distance(squared, queries.dtype)
        for t, (sure, _) in enumerate(limits):
            inside = found.rank <= sure[found.query]
            inside[unsure] = distance <= bounds[t, piece.rows][found.query[unsure]]
            column = found.index[inside] - columns.start
            query = found.query[inside].astype(np.float64) + piece.rows.start
            size = columns.stop - columns.start
            count[t, columns] += np.bincount(column, minlength=size).astype(np.int32)
            sums = np.bincount(column, query, minlength=size)  # integers far below 2^53
            total[t, columns] += sums.astype(np.int64)
    return Tally(count, total)


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
        release(block)
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


@dataclass
class _Piece:
    """Pairs of a block of queries and a block of references that may be within a radius."""

    rows: slice
    columns: slice
    found: _Candidates  # query: within the block; index: into the whole reference
    filter_: _Filter

    def limits(
        self, radius: NDArray[np.float32], dtype: np.dtype[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Computed ranks up to which a pair is surely, and beyond which it is not, within."""
        margin = self.filter_.margin()
        surely, possibly = _squared_limits(radius, dtype)
        possible = _float32_above(self.filter_.rank_of(possibly) + margin)
        if not self.filter_.is_rank:
            return np.full_like(possible, -np.inf), possible
        return -_float32_above(margin - self.filter_.rank_of(surely)), possible


def _pieces_within(
    queries: Array,
    reference: Array,
    radius: NDArray[np.float32],
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Iterator[_Piece]:
    """All pairs within radius [Q], and some more, by blocks of queries, then of references."""
    q_rows, r_rows = _tile(queries, reference, 0, memory_bytes, _STREAMED_BYTES)
    centre, patches = _centre(reference)
    patches = patches and queries.ndim == 4
    for start in range(0, len(queries), q_rows):
        rows = slice(start, min(start + q_rows, len(queries)))
        _, possibly = _squared_limits(radius[rows], queries.dtype)
        filter_ = _choose_filter(queries[rows], reference, centre, patches, r_rows, possibly)
        limit = filter_.rank_of(possibly)
        for first in range(0, len(reference), r_rows):
            columns = slice(first, min(first + r_rows, len(reference)))
            rank = filter_.ranks(reference[columns])
            bound = _float32_above(limit + filter_.margin())[:, None]
            found = _Candidates.where(rank <= bound, rank, first)
            if progress is not None:
                progress(rank.size)
            if len(found):
                yield _Piece(rows, columns, found, filter_)


def _choose_filter(
    queries: Array,
    reference: Array,
    centre: Array,
    patches: bool,
    r_rows: int,
    squared: NDArray[np.float64],
) -> _Filter:
    """By 2 x 2 patches where these leave few pairs within `squared` [Q], else by values."""
    if patches:
        filter_ = _Filter(queries, centre, 2, r_rows)
        rank = filter_.ranks(reference[:: -(-len(reference) // r_rows)])
        if np.count_nonzero(rank <= filter_.rank_of(squared)[:, None]) <= _USEFUL * rank.size:
            return filter_
    return _Filter(queries, centre, 1, r_rows)


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
    farthest = np.full(n_queries, np.inf)
    if patches:
        likely = _likely(_Filter(queries, centre, 4, r_rows), reference, 2 * k, r_rows)
        squared = np.sort(_refine(likely, queries, reference).reshape(n_queries, -1), axis=1)
        farthest = squared[:, k - 1]
    filter_ = _choose_filter(queries, reference, centre, patches, r_rows, farthest)
    limit = filter_.rank_of(farthest)  # no neighbour that is still missing has a larger true rank

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
        release(reference[found.index[pairs[0]] : found.index[pairs[-1]] + 1])
    release(queries)
    return squared


def _unit(dtype: np.dtype[Any]) -> int:
    """How many of the units that squared distances are computed in make up one of distances."""
    return 255 if dtype == np.uint8 else 1


def _distance(squared: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Distances as they are returned, of squared ones as they are computed."""
    distance: NDArray[np.float32] = (np.sqrt(squared) / _unit(dtype)).astype(np.float32)
    return distance


def _squared_limits(
    radius: NDArray[np.float32], dtype: np.dtype[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared distances up to which `_distance` is surely, beyond which it is not <= radius.

    What rounds to the radius ends half way to the next float32: the rounding of float64 in between
    is too small to matter.
    """
    above = np.nextafter(radius, np.float32(np.inf))
    unit = _unit(dtype)
    return (unit * radius.astype(np.float64)) ** 2, (unit * above.astype(np.float64)) ** 2


def _radii(
    radius: float | Array, n_queries: int, shapes: tuple[tuple[int, ...], ...]
) -> NDArray[np.float32]:
    """Radii as float32 [..., Q]; given in one of two shapes, without and with the queries."""
    given = np.asarray(radius)
    if given.dtype.kind not in "fiu" or given.shape not in shapes or given.size == 0:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise MembenchError(
            f"radii must be numbers of shape {expected}, not {given.dtype} of {list(given.shape)}"
        )
    if not (given >= 0).all():
        raise MembenchError("radii must be >= 0 and not NaN")
    with np.errstate(over="ignore"):  # beyond every distance is infinite enough
        rounded = given.astype(np.float32)
    if given.shape == shapes[0]:
        rounded = rounded[..., None]
    return np.broadcast_to(rounded, (*shapes[0], n_queries))


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
    release(reference)
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


def _tile(
    queries: Array, reference: Array, k: int, memory_bytes: int, pair_bytes: int = _PAIR_BYTES
) -> tuple[int, int]:
    """Rows of the query and reference blocks whose product fits into the memory bound."""
    d = _features(reference)
    # features and the temporaries of making them; then the temporaries of one step of `_refine`
    row, refined = (8 * d, 7 * d) if reference.dtype == np.uint8 else (16 * d, 32 * d)
    fixed = _REFINED * refined + 2**15

    def bytes_needed(q: int, r: int) -> int:
        return fixed + (q + r) * row + q * (r + _PENDING * k) * pair_bytes

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


def _check(queries: Array, reference: Array) -> None:
    """Refuses input that cannot be compared, in one line that says why."""
    for name, x in (("queries", queries), ("reference", reference)):
        if not isinstance(x, np.ndarray) or x.ndim not in (2, 4):
            what = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise MembenchError(f"{name} must be an array [*, H, W, C] or [*, D], not {what}")
        if x.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise MembenchError(f"{name} must be uint8, float16, float32 or float64, not {x.dtype}")
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
        # as Python floats: float16 would round the limit to infinity
        if x.dtype != np.uint8 and not all(float(np.abs(b).max()) <= _LARGEST for b in _blocks(x)):
            raise MembenchError(f"{name} hold NaN, infinite or huge (> {_LARGEST:g}) values")


def _blocks(x: Array) -> Iterator[Array]:
    """x in pieces of about one MiB, given back once they are used."""
    rows = max(1, 2**20 // (_features(x) * x.dtype.itemsize))
    for start in range(0, len(x), rows):
        yield x[start : start + rows]
        release(x[start : start + rows])
