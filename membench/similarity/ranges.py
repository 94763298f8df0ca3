"""Exact range search: every pair within a distance, streamed or only counted, in bounded memory.

A pair counts as within a radius if its distance *as `nearest` returns it* (float32) is at most that
radius. So a distance found by `nearest` is a radius whose own pair is in, and thresholds on saved
distances and a search by the same threshold agree on every pair, also on the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from membench.errors import MembenchError
from membench.similarity.filter import (
    MEMORY,
    Array,
    Candidates,
    Filter,
    check_inputs,
    refine,
    sharpest,
    tile_rows,
    to_distance,
)
from membench.similarity.index import Index, Limits, choose
from membench.similarity.pages import blocks, release
from membench.similarity.sketch import Sketch, SketchFilter

Pairs = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]
"""Query and reference indices and squared distances of pairs, each [P]."""

_PAIR_BYTES = 80  # working memory of one pair of a tile, if every pair is within the radius
_Q_ROWS = 2048  # queries of a block
_SLACK = 2.0**-22  # more than the relative error of a float32 distance; _SMALLEST: the absolute one
_SMALLEST = 2.0**-149
_BEYOND = 1e37  # no squared distance of values that the search accepts is larger


def within(
    queries: Array,
    reference: Array | Index,
    radius: ArrayLike,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Pairs]:
    """Every pair with distance <= radius, block by block: (query, index, squared distance).

    queries, reference: as for `nearest`.
    radius: one for all or one per query [Q], in the units that `nearest` returns (pixels in [0, 1]
    for uint8). Pairs exactly on the edge are in; a negative radius holds nothing, infinity all.
    memory_bytes: bound of the working memory, the yielded block included.
    progress: called after each block with the number of pairs it compared; they add up to Q * N.

    Yields one triple for every pair of blocks, empty ones too: query int64 [P], index int32 [P],
    squared distance float64 [P], an integer of 8-bit units for uint8; sorted by query, then index.
    Raises MembenchError as `nearest` does, and for a radius that is NaN or of another shape.
    """
    return within_sides([queries], reference, radius, memory_bytes, progress)[0]


def within_sides(
    sides: Sequence[Array],
    reference: Array | Index,
    radius: ArrayLike,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> list[Iterator[Pairs]]:
    """`within` for several versions of the same queries, block for block of the same pairs."""
    index = Index.of(reference)
    for side in sides:
        check_inputs(side, index.rows)
    sides = [np.asarray(side) for side in sides]
    each = _per_query(radius, len(sides[0]), ())

    def limits(rows: Array, squared: Array) -> list[tuple[Array, Array]]:
        most, _ = _squared_bounds(each[rows], sides[0].dtype)
        return [(most, np.full(len(most), -np.inf))]

    scan = _Scan.of(index, sides, limits, memory_bytes // len(sides))
    return [_stream(side, scan, each, progress) for side in sides]


def _stream(
    queries: Array,
    scan: _Scan,
    radius: NDArray[np.float64],
    progress: Callable[[int], None] | None,
) -> Iterator[Pairs]:
    for begin, block in blocks(queries, scan.q_rows):
        block = np.ascontiguousarray(block)  # mirrored images are a view
        edge = radius[begin : begin + len(block)]
        most, _ = _squared_bounds(edge, queries.dtype)
        filter_ = scan.filter(block, most)
        for start, other in scan.blocks():
            rank = filter_.ranks(other)
            found = Candidates.where(rank <= filter_.most(most), rank, start)
            squared = scan.squared(filter_, found, block, other, start)
            chosen = to_distance(squared, queries.dtype) <= edge[found.query]
            query = found.query[chosen] + np.int64(begin)
            release(block)
            if progress is not None:
                progress(len(block) * len(other))
            yield query, found.index[chosen], squared[chosen]


@dataclass(frozen=True)
class Tally:
    """How many queries lie within each radius of each reference, and which if it is only one.

    radius: float64 [T], or [T, Q] where each query has its own, in the units of `nearest`.
    count: int32 [T, N], queries within the radius.
    total: int64 [T, N], the sum of their indices.
    """

    radius: NDArray[np.float64]
    count: NDArray[np.int32]
    total: NDArray[np.int64]

    def band(self, lower: int | None, upper: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Queries in the band radius[lower] < distance <= radius[upper] of each reference.

        lower, upper: positions in `radius`; lower None: from distance 0. Distances are float32, so
        `np.nextafter(np.float32(r), np.float32(-1))` as a radius makes an edge at r exclusive
        above and inclusive below.
        Returns their count, int32 [N], and the query's index where there is only one, else -1,
        int64 [N]. Raises MembenchError unless radius[lower] <= radius[upper] for every query.
        """
        if lower is None:
            count, total = self.count[upper], self.total[upper]
        else:
            if not (self.radius[lower] <= self.radius[upper]).all():
                raise MembenchError(f"radius {lower} exceeds radius {upper}: they bound no band")
            count = self.count[upper] - self.count[lower]
            total = self.total[upper] - self.total[lower]
        return count, np.where(count == 1, total, -1)


def tally(
    queries: Array,
    reference: Array | Index,
    radii: ArrayLike,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Counts what `within` would stream for each of T radii, without ever holding the pairs.

    radii: [T] for all queries or [T, Q] for each, in any order; else as for `within`.
    Only pairs that float32 cannot place on one side of a radius are refined, so that wide radii
    cost little more than narrow ones.
    """
    return tally_nearest_side([queries], reference, radii, memory_bytes, progress)


def tally_nearest_side(
    sides: Sequence[Array],
    reference: Array | Index,
    radii: ArrayLike,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Tally:
    """`tally` under the smallest distance of several versions of each query, [S] arrays of Q."""
    index = Index.of(reference)
    for side in sides:
        check_inputs(side, index.rows)
    sides = [np.asarray(side) for side in sides]
    n_queries, dtype = len(sides[0]), sides[0].dtype
    radius = np.asarray(radii, np.float64)
    if radius.ndim not in (1, 2):
        raise MembenchError(f"radii must be a list [T] or [T, Q], not of shape {radius.shape}")
    each = _per_query(radius, n_queries, radius.shape[:1])
    count = np.zeros((len(each), len(index)), np.int32)
    total = np.zeros((len(each), len(index)), np.int64)

    def limits(rows: Array, squared: Array) -> list[tuple[Array, Array]]:
        return [_squared_bounds(edge[rows], dtype) for edge in each]

    scan = _Scan.of(index, sides, limits, memory_bytes // len(sides))
    for begin in range(0, n_queries, scan.q_rows):
        parts = [np.ascontiguousarray(side[begin : begin + scan.q_rows]) for side in sides]
        edges = each[:, begin : begin + scan.q_rows]
        most, least = _squared_bounds(edges, dtype)
        filters = [scan.filter(part, most.max(axis=0)) for part in parts]
        for start, block in scan.blocks():
            found, sure, unsure = _place(filters, block, start, most, least)
            column = found.index - start
            open_ = found[unsure]
            squared = np.min([refine(open_, part, index.rows) for part in parts], axis=0)
            distance = to_distance(squared, dtype)
            here = slice(start, start + len(block))
            for t, edge in enumerate(edges):
                inside = sure[t]
                inside[unsure] |= distance <= edge[open_.query]
                n = np.bincount(column[inside], minlength=len(block))
                # row numbers of a block add up to far less than 2^53: exact
                row_sum = np.bincount(column[inside], found.query[inside], minlength=len(block))
                count[t, here] += n.astype(np.int32)
                total[t, here] += row_sum.astype(np.int64) + begin * n
            if progress is not None:
                progress(len(parts[0]) * len(block) * len(sides))
        for part in parts:
            release(part)
    return Tally(radius, count, total)


def _place(
    filters: Sequence[Filter | SketchFilter], block: Any, start: int, most: Array, least: Array
) -> tuple[Candidates, list[Array], Array]:
    """Pairs that may be within any of T radii on any side; which surely are within each radius
    [T][P]; which of them the filters cannot place for some radius [P]."""
    ranks = [filter_.ranks(block) for filter_ in filters]
    near = _any_side(ranks, [filter_.most(most.max(axis=0)) for filter_ in filters])
    found = Candidates.where(near, ranks[0], start)
    held = [rank[found.query, found.index - start] for rank in ranks]
    sure, unsure = [], np.zeros(len(found), bool)
    for most_t, least_t in zip(most, least, strict=True):
        surely = [filter_.surely(least_t)[found.query, 0] for filter_ in filters]
        at_most = [filter_.most(most_t)[found.query, 0] for filter_ in filters]
        sure.append(_any_side(held, surely))
        unsure |= sure[-1] ^ _any_side(held, at_most)
    return found, sure, unsure


@dataclass(frozen=True)
class _Scan:
    """How blocks of queries are compared with blocks of references: by a sketch or in full."""

    index: Index
    sketch: Sketch | None
    q_rows: int
    r_rows: int
    memory_bytes: int

    @classmethod
    def of(cls, index: Index, sides: Sequence[Array], limits: Limits, memory_bytes: int) -> _Scan:
        # half of the memory; the rest is for features and for making them
        pairs = max(1, memory_bytes // 2 // _PAIR_BYTES)
        q_rows = min(len(sides[0]), _Q_ROWS, math.isqrt(pairs))
        r_rows = min(len(index), pairs // q_rows)
        sketch = choose(index, sides[0], limits, memory_bytes, q_rows)
        if sketch is None:
            q_rows, r_rows = tile_rows(sides[0], index.rows, 0, memory_bytes, _PAIR_BYTES)
        return cls(index, sketch, q_rows, r_rows, memory_bytes)

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(first row, block of references as `filter` wants them), front to back."""
        if self.sketch is None:
            return blocks(self.index.rows, self.r_rows)
        return self.index.blocks(self.sketch, self.r_rows, self.memory_bytes)

    def squared(
        self,
        filter_: Filter | SketchFilter,
        found: Candidates,
        queries: Array,
        block: Any,
        start: int,
    ) -> NDArray[np.float64]:
        """True squared distances of pairs of a block of references that begins at row `start`."""
        if isinstance(filter_, SketchFilter) and filter_.sketch.exact:
            return filter_.squared(found.rank, found.query, found.index - start, block)
        return refine(found, queries, self.index.rows)

    def filter(self, queries: Array, most: Array) -> Filter | SketchFilter:
        """A filter for a block of queries and pairs within squared distances [Q]."""
        index = self.index
        if self.sketch is None:
            patches = index.smooth and queries.ndim == 4
            return sharpest(queries, index.rows, index.centre, patches, self.r_rows, most)
        out = np.empty(len(queries) * self.r_rows, self.sketch.engine.dtype)
        return SketchFilter(self.sketch, self.sketch.features(queries), out)


def _any_side(ranks: Sequence[Array], limits: Sequence[Array]) -> Array:
    """Whether any rank is at most its limit: ranks [Q, r] and limits [Q, 1], or both [P]."""
    near: Array = ranks[0] <= limits[0]
    for rank, limit in zip(ranks[1:], limits[1:], strict=True):
        near |= rank <= limit
    return near


def _per_query(radius: ArrayLike, n_queries: int, lead: tuple[int, ...]) -> NDArray[np.float64]:
    """Radii as [*lead, Q]; each given once or for every query."""
    given = np.asarray(radius, np.float64)
    if np.isnan(given).any():
        raise MembenchError("a radius is NaN")
    if given.ndim == len(lead):
        given = given[..., None]
    elif given.shape != (*lead, n_queries):
        raise MembenchError(
            f"radii must be one for all or one for each of the {n_queries} queries, "
            f"not of shape {given.shape}"
        )
    return np.broadcast_to(given, (*lead, n_queries))


def _squared_bounds(
    radius: NDArray[np.float64], dtype: np.dtype[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared distances that no pair within a radius exceeds, and up to which all are within.

    A distance x is within if float32(x) <= radius, where |float32(x) - x| <= 2^-24 x + 2^-150.
    """
    scale = 255 if dtype == np.uint8 else 1
    outer = radius * (1 + _SLACK) + _SMALLEST
    inner = radius * (1 - _SLACK) - _SMALLEST
    with np.errstate(over="ignore"):
        most, least = (scale * outer) ** 2, (scale * inner) ** 2
    most = np.where(radius < 0, -np.inf, np.where(most > _BEYOND, np.inf, most))
    return most, np.where(inner < 0, -np.inf, np.minimum(least, _BEYOND))
