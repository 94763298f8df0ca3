"""Exact range search: every pair within a distance, streamed or only counted, in bounded memory.

A pair counts as within a radius if its distance *as `nearest` returns it* (float32) is at most that
radius. So a distance found by `nearest` is a radius whose own pair is in, and thresholds on saved
distances and a search by the same threshold agree on every pair, also on the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from membench.errors import MembenchError
from membench.similarity.filter import (
    Array,
    Candidates,
    centre_of,
    check_inputs,
    refine,
    sharpest,
    tile_rows,
    to_distance,
)
from membench.similarity.pages import blocks, release

Pairs = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]
"""Query and reference indices and squared distances of pairs, each [P]."""

_PAIR_BYTES = 80  # working memory of one pair of a tile, if every pair is within the radius
_SLACK = 2.0**-22  # more than the relative error of a float32 distance; _SMALLEST: the absolute one
_SMALLEST = 2.0**-149
_BEYOND = 1e37  # no squared distance of values that the search accepts is larger


def within(
    queries: Array,
    reference: Array,
    radius: ArrayLike,
    *,
    memory_bytes: int = 256 * 2**20,
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
    check_inputs(queries, reference)
    each = _per_query(radius, len(queries), ())
    tile = tile_rows(queries, reference, 0, memory_bytes, _PAIR_BYTES)
    return _stream(np.asarray(queries), np.asarray(reference), each, tile, progress)


def _stream(
    queries: Array,
    reference: Array,
    radius: NDArray[np.float64],
    tile: tuple[int, int],
    progress: Callable[[int], None] | None,
) -> Iterator[Pairs]:
    q_rows, r_rows = tile
    centre, patches = centre_of(reference)
    patches = patches and queries.ndim == 4
    for begin, block in blocks(queries, q_rows):
        edge = radius[begin : begin + len(block)]
        most, _ = _squared_bounds(edge, queries.dtype)
        filter_ = sharpest(block, reference, centre, patches, r_rows, most)
        for start, other in blocks(reference, r_rows):
            rank = filter_.ranks(other)
            found = Candidates.where(rank <= filter_.most(most), rank, start)
            squared = refine(found, block, reference)
            chosen = to_distance(squared, queries.dtype) <= edge[found.query]
            query = found.query[chosen] + np.int64(begin)
            release(block)
            if progress is not None:
                progress(len(block) * 1 * len(other))
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
    reference: Array,
    radii: ArrayLike,
    *,
    memory_bytes: int = 256 * 2**20,
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
    reference: Array,
    radii: ArrayLike,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Tally:
    """`tally` under the smallest distance of several versions of each query, [S] arrays of Q."""
    for side in sides:
        check_inputs(side, reference)
    sides, reference = [np.asarray(side) for side in sides], np.asarray(reference)
    n_queries, dtype = len(sides[0]), sides[0].dtype
    radius = np.asarray(radii, np.float64)
    if radius.ndim not in (1, 2):
        raise MembenchError(f"radii must be a list [T] or [T, Q], not of shape {radius.shape}")
    each = _per_query(radius, n_queries, radius.shape[:1])
    count = np.zeros((len(each), len(reference)), np.int32)
    total = np.zeros((len(each), len(reference)), np.int64)
    q_rows, r_rows = tile_rows(sides[0], reference, 0, memory_bytes // len(sides), _PAIR_BYTES)
    centre, patches = centre_of(reference)
    patches = patches and sides[0].ndim == 4

    for begin in range(0, n_queries, q_rows):
        parts = [side[begin : begin + q_rows] for side in sides]
        edges = each[:, begin : begin + q_rows]
        most, least = _squared_bounds(edges, dtype)
        filters = [
            sharpest(part, reference, centre, patches, r_rows, most.max(axis=0)) for part in parts
        ]
        # sums of at most 2,048 row numbers are below 2^24: exact in float32, in any order
        rows = np.stack([np.ones(len(parts[0])), np.arange(len(parts[0]))]).astype(np.float32)
        for start, block in blocks(reference, r_rows):
            ranks = [filter_.ranks(block) for filter_ in filters]
            here = slice(start, start + len(block))
            unsure = np.zeros(ranks[0].shape, bool)
            sure_rank = [[filter_.surely(least_t) for filter_ in filters] for least_t in least]
            for t, most_t in enumerate(most):
                near = _any_side(ranks, [filter_.most(most_t) for filter_ in filters])
                if not near.any():
                    continue
                sure = _any_side(ranks, sure_rank[t])
                unsure |= near ^ sure
                n, row_sum = rows @ sure.astype(np.float32)
                count[t, here] += n.astype(np.int32)
                total[t, here] += row_sum.astype(np.int64) + begin * n.astype(np.int64)

            found = Candidates.where(unsure, ranks[0], start)
            distance = to_distance(
                np.min([refine(found, part, reference) for part in parts], axis=0), dtype
            )
            column = found.index - start
            for t, edge in enumerate(edges):
                counted = np.zeros(len(found), bool)
                for rank, limit in zip(ranks, sure_rank[t], strict=True):
                    counted |= rank[found.query, column] <= limit[found.query, 0]
                new = ~counted & (distance <= edge[found.query])
                n_new = np.bincount(column[new], minlength=len(block))
                row_sum = np.bincount(column[new], found.query[new], minlength=len(block))
                count[t, here] += n_new.astype(np.int32)
                total[t, here] += row_sum.astype(np.int64) + begin * n_new
            if progress is not None:
                progress(len(parts[0]) * len(block) * len(sides))
        for part in parts:
            release(part)
    return Tally(radius, count, total)


def _any_side(ranks: list[NDArray[np.float32]], limits: list[NDArray[np.float32]]) -> Array:
    """Whether any rank [Q, r] is at most its limit [Q, 1]."""
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
