"""What all exact searches share: a float32 filter with a proven margin, and exact refinement.

Float32 matrix products only *filter*: by a proven margin no true neighbour is lost. Distances of
the survivors are computed in integers (floats: in float64), so the answer is that of brute force,
whatever the machine, the BLAS and the block sizes.

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
Conversely, where the features are the values, a computed rank of at most (s - |a|^2) / 2 - margin
proves a squared distance of at most s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.pages import SPAN, blocks, gather, release
from membench.similarity.pairs import LONGEST, Kernel, compiled, compiled_for_floats
from membench.similarity.products import gamma

Array = NDArray[Any]

U = 2.0**-24  # unit roundoff of float32
_TINY = 2.0**-126  # bound of the error of one product that underflows
_LARGEST = 1e15  # descriptors beyond this overflow when squared in float32
MEMORY = 512 * 2**20
"""Working memory of a search, in bytes, unless another bound is given."""

PENDING = 12  # candidates kept per query, in multiples of k, before they are pruned
_SMOOTH = 0.9  # share of the squared distance that patches must keep to be worth a try
USEFUL = 1 / 32  # share of pairs left to refine beyond which patches cost more than they save
_REFINED = 64  # pairs refined at a time: their rows stay in the cache
COMPILED = 2**14  # pairs from which on a compiled kernel is worth loading
_COMPILED_AT_ONCE = 1024
_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}  # that a compiled kernel reads
PAIR_BYTES = 52  # working memory of one pair of a tile, if every pair survives


@dataclass
class Candidates:
    """Pairs of one block of queries that may be among the k nearest."""

    query: NDArray[np.int32]
    index: NDArray[np.int32]
    rank: NDArray[np.float32]

    @classmethod
    def none(cls) -> Candidates:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    @classmethod
    def where(cls, near: Array, rank: Array, start: int) -> Candidates:
        """Entries of a block of ranks [Q, r] that begins at reference `start`."""
        query, column = np.divmod(np.flatnonzero(near), near.shape[1])
        index = (column + start).astype(np.int32)
        return cls(query.astype(np.int32), index, rank[query, column])

    def by_rank(self) -> Candidates:
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

    def __getitem__(self, chosen: Array) -> Candidates:
        return Candidates(self.query[chosen], self.index[chosen], self.rank[chosen])

    def __add__(self, other: Candidates) -> Candidates:
        return Candidates.join([self, other])

    @classmethod
    def join(cls, parts: list[Candidates]) -> Candidates:
        names = ("query", "index", "rank")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Filter:
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
        self.gamma = gamma(a.shape[1] + 4)

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
        features = self.minus_a.shape[1]
        return margin_of(self.a_norm, self.b_norm, features, exact=self.exact_input)

    def rank_of(self, squared: Array, query: Array | slice = slice(None)) -> Array:
        """The largest true rank within squared distances, of the given queries."""
        return (self.stretch * squared - self.a_squared[query]) / 2

    def most(self, squared: Array) -> NDArray[np.float32]:
        """Whatever is within squared distances [Q] has at most this computed rank, [Q, 1]."""
        return float32_above(self.rank_of(squared) + self.margin())[:, None]

    def surely(self, squared: Array) -> NDArray[np.float32]:
        """Whatever has at most this computed rank, [Q, 1], is within squared distances [Q]."""
        if not self.is_rank:
            return np.full((len(squared), 1), -np.inf, np.float32)
        return -float32_above(self.margin() - self.rank_of(squared))[:, None]

    def _features(self, x: Array) -> NDArray[np.float32]:
        """f(x) - f(centre), float32 [n, F]: exact for uint8, rounded once for floats."""
        if self.patch > 1:
            features = patch_sums(x, self.patch).astype(np.float32)
            features -= patch_sums(self.centre[None], self.patch).astype(np.float32)
            return features
        rows, centre = flat_rows(x), self.centre.ravel()
        if self.exact_input:
            features = rows.astype(np.float32)
            features -= centre.astype(np.float32)
        else:
            features = np.subtract(rows, centre, dtype=np.float64).astype(np.float32)
        return features


def margin_of(a_norm: Array, b_norm: float, features: int, *, exact: bool) -> Array:
    """Bound of the error of ranks computed in float32, for |a| [Q] and the largest |b|.

    exact: whether a and b are, as of 8-bit images; else they were rounded once.
    """
    margin: Array = gamma(features + 4) * (a_norm * b_norm + b_norm**2 / 2)
    if not exact:
        margin = margin + 2 * U * (a_norm + b_norm) ** 2
        margin += features * _TINY
    return margin


def sharpest(
    queries: Array, reference: Array, centre: Array, patches: bool, r_rows: int, squared: Array
) -> Filter:
    """A filter for pairs within squared distances [Q]: by patches if asked and of use."""
    if patches:
        filter_ = Filter(queries, centre, 2, r_rows)
        rank = filter_.ranks(_sample(reference, r_rows))
        near = rank <= filter_.rank_of(squared)[:, None]
        if np.count_nonzero(near) <= USEFUL * rank.size:
            return filter_
    return Filter(queries, centre, 1, r_rows)


def _sample(x: Array, n: int) -> Array:
    """At most n rows, evenly spread."""
    return gather(x, evenly_spread(len(x), n))


def evenly_spread(total: int, n: int) -> NDArray[np.int64]:
    """At most n of `total` rows, evenly spread."""
    return np.arange(0, total, -(-total // n))


def refine(
    found: Candidates, queries: Array, reference: Array, *, keep: bool = False
) -> NDArray[np.float64]:
    """True squared distances of candidates; the reference is read once, front to back.

    keep: whether what was read of a memory map stays in memory.
    """
    squared = np.empty(len(found))
    order = np.argsort(found.index)
    row_bytes = n_features(reference) * reference.itemsize
    run = _kernel(len(found), queries, reference)
    pairs_at_once = _REFINED if run is None else _COMPILED_AT_ONCE
    first = 0  # row from which on pages are in memory
    for start in range(0, len(found), pairs_at_once):
        pairs = order[start : start + pairs_at_once]
        query, index = found.query[pairs], found.index[pairs]
        if run is None:
            rows = flat_rows(gather(reference, index))
            squared[pairs] = squared_l2(rows, flat_rows(queries[query]))
        else:
            values = np.empty(len(pairs))
            run(flat_rows(queries), flat_rows(reference), query, index, values)
            squared[pairs] = values
        last = int(index[-1]) + 1
        if (last - first) * row_bytes > SPAN or start + pairs_at_once >= len(found):
            if not keep:
                release(reference[first:last])
            first = last - 1
    return squared


def _kernel(n_pairs: int, queries: Array, reference: Array) -> Kernel | None:
    """The compiled kernel where it is worth loading and can read the rows in place."""
    in_place = queries.flags.c_contiguous and reference.flags.c_contiguous
    # few rows of a memory map that lie far apart would bring too much of it into memory
    dense = n_pairs >= COMPILED and n_pairs * 64 >= len(reference)
    if not (in_place and dense):
        return None
    if reference.dtype == np.uint8:
        return compiled() if n_features(reference) <= LONGEST else None
    return compiled_for_floats() if {queries.dtype, reference.dtype} <= _FLOATS else None


def to_distance(squared: Array, dtype: Any) -> NDArray[np.float32]:
    """Distances as `nearest` returns them: of pixels in [0, 1] where dtype is uint8."""
    distance = np.sqrt(squared)
    distance /= 255 if dtype == np.uint8 else 1
    return distance.astype(np.float32)


def squared_l2(x: Array, y: Array) -> NDArray[np.float64]:
    """Squared L2 distances between rows, x [n, D], y [n, D] or [D]: exact for uint8."""
    if x.dtype != np.uint8:
        difference = np.subtract(x, y, dtype=np.float64)
        return np.asarray((difference * difference).sum(axis=1))
    difference = (np.maximum(x, y) - np.minimum(x, y)).astype(np.uint16)
    difference *= difference  # at most 255^2 < 2^16
    exact = np.uint32 if x.shape[1] * 255**2 < 2**32 else np.uint64
    squared: NDArray[np.float64] = difference.sum(axis=1, dtype=exact).astype(np.float64)
    return squared


def squared_to(rows: NDArray[np.uint8], point: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Exact squared distances of rows [n, D] to one point [D]."""
    run = compiled() if rows.shape[1] <= LONGEST and rows.flags.c_contiguous else None
    if run is None:
        return squared_l2(rows, point)
    squared = np.empty(len(rows))
    row = np.arange(len(rows), dtype=np.int32)
    run(point[None], rows, np.zeros_like(row), row, squared)
    return squared


def patch_sums(x: Array, patch: int) -> NDArray[np.uint16]:
    """Sums of 2 x 2 or 4 x 4 patches of uint8 images [n, H, W, C], as [n, H W C / patch^2]."""
    n, height, width, channels = x.shape
    if patch == 4:
        half = patch_sums(x, 2).reshape(n, height // 2, width // 2, channels)
        return patch_sums(half, 2)
    tall = np.add(x[:, 0::2], x[:, 1::2], dtype=np.uint16).reshape(-1, 2 * channels)
    sums = np.empty((len(tall), channels), np.uint16)
    for c in range(channels):  # long strides are quicker than an inner loop over few channels
        np.add(tall[:, c], tall[:, channels + c], out=sums[:, c])
    return sums.reshape(n, -1)


def centre_of(reference: Array) -> tuple[Array, bool]:
    """A point near the mean, of the reference's dtype and shape, and whether patches may help.

    Any point and either choice give the same answer.
    """
    sample = _sample(reference, 256)
    mean: Array = sample.mean(axis=0, dtype=np.float64)
    if reference.dtype != np.uint8:
        return mean.astype(reference.dtype), False
    centre = np.rint(mean).astype(np.uint8)
    if reference.ndim != 4 or reference.shape[1] % 4 or reference.shape[2] % 4:
        return centre, False
    total = kept = 0.0
    for row in sample:
        total += float(squared_l2(flat_rows(row[None]), centre.ravel())[0])
        difference = patch_sums(row[None], 2).astype(np.float64) - patch_sums(centre[None], 2)
        kept += float((difference**2).sum()) / 4
    return centre, kept >= _SMOOTH * total


def float32_above(x: Array) -> NDArray[np.float32]:
    """Float32 numbers that are not below x."""
    return np.nextafter(x.astype(np.float32), np.float32(np.inf))


def flat_rows(x: Array) -> Array:
    """Images or descriptors as [n, D]; a view where x is contiguous."""
    return x.reshape(len(x), -1)


def tile_rows(
    queries: Array, reference: Array, k: int, memory_bytes: int, pair_bytes: int = PAIR_BYTES
) -> tuple[int, int]:
    """Rows of the query and reference blocks whose product fits into the memory bound.

    k: neighbours kept per query; pair_bytes: working memory of one pair if every pair survives.
    """
    d = n_features(reference)
    # features and the temporaries of making them; then the temporaries of one step of `refine`
    row, refined = (8 * d, 7 * d) if reference.dtype == np.uint8 else (16 * d, 32 * d)
    fixed = _REFINED * refined + 2**15

    def bytes_needed(q: int, r: int) -> int:
        return fixed + (q + r) * row + q * (r + PENDING * k) * pair_bytes

    q, r = min(len(queries), 2048), min(len(reference), 1024)
    while bytes_needed(q, r) > memory_bytes:
        if q == r == 1:
            raise MembenchError(
                f"the search needs at least {bytes_needed(1, 1)} bytes of memory for rows of "
                f"{d} values, but memory_bytes is {memory_bytes}"
            )
        q, r = (-(-q // 2), r) if q >= r else (q, -(-r // 2))
    return q, r


def n_features(x: Array) -> int:
    return int(np.prod(x.shape[1:]))


def check_inputs(queries: Array, reference: Array) -> None:
    """Refuses input that cannot be compared, in one line that says why."""
    for name, x in (("queries", queries), ("reference", reference)):
        if not isinstance(x, np.ndarray) or x.ndim not in (2, 4):
            what = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise MembenchError(f"{name} must be an array [*, H, W, C] or [*, D], not {what}")
        if x.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise MembenchError(f"{name} must be uint8, float16, float32 or float64, not {x.dtype}")
        if x.size == 0:
            raise MembenchError(f"{name} are empty: shape {x.shape}")
    if n_features(queries) != n_features(reference) or (
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
        if x.dtype != np.uint8 and not _is_finite(x):
            raise MembenchError(f"{name} hold NaN, infinite or huge (> {_LARGEST:g}) values")


def _is_finite(x: Array) -> bool:
    """No NaN, nothing beyond `_LARGEST`; x is read in pieces of about one MiB."""
    rows = max(1, 2**20 // (n_features(x) * x.itemsize))
    wide = np.promote_types(x.dtype, np.float32)  # _LARGEST is beyond float16
    return all(np.abs(block, dtype=wide).max() <= _LARGEST for _, block in blocks(x, rows))
