"""Exact k nearest neighbours by L2, in blocks, within a stated memory bound.

Matrix products only *filter*: of 8-bit sketches in large searches (see `sketch`), else of float32
rows (see `filter`). Distances of the survivors are computed in integers (floats: in float64), so
the answer is that of brute force, whatever the machine, the BLAS and the block sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.devices import listed_blocks
from membench.similarity.filter import (
    MEMORY,
    PENDING,
    Array,
    Candidates,
    Filter,
    check_inputs,
    float32_above,
    refine,
    sharpest,
    tile_rows,
    to_distance,
)
from membench.similarity.index import Index, choose
from membench.similarity.pages import blocks
from membench.similarity.pruned import nearest_by_sketch

LISTED = 2
"""References that a GPU lists for each query, in multiples of k."""


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
    reference: Array | Index,
    k: int = 50,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """The exact k nearest references of every query by L2; k = N if there are only N < k.

    queries, reference: uint8 images [*, H, W, C] or [*, D], or descriptors [*, D] in float16,
    float32 or float64; arrays, or memory maps of any length, which are read block by block and
    whose pages are given back, so that they need no memory of their own. An `Index` of the
    reference lets several searches share what they prepare, and may name GPUs to filter on.
    memory_bytes: bound of the working memory (without the inputs and the result).
    progress: called after each block with the number of (query, reference) pairs it compared;
    they add up to Q * N.

    For uint8 the order is that of the integer squared distance; for floats that of the squared
    distance of the stored values in float64. Raises MembenchError for wrong shapes or dtypes, empty
    input, NaN, infinite or huge values, and a memory bound that is too small for a single pair.
    """
    distance, index = [], []
    for squared, found in nearest_blocks(
        queries, reference, k, memory_bytes=memory_bytes, progress=progress
    ):
        distance.append(to_distance(squared, queries.dtype))
        index.append(found)
    return Neighbours(np.concatenate(distance), np.concatenate(index))


def nearest_blocks(
    queries: Array,
    reference: Array | Index,
    k: int,
    *,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
    """`nearest` block by block: squared distances [q, k] (integers for uint8) and indices [q, k].

    How the queries are cut into blocks depends on shapes and memory_bytes alone.
    """
    if k < 1:
        raise MembenchError(f"k must be at least 1, not {k}")
    index = Index.of(reference)
    check_inputs(queries, index.rows)
    queries, rows = np.asarray(queries), index.rows
    k = min(k, len(rows))
    if index.devices:
        yield from _nearest_on_devices(queries, index, k, memory_bytes, progress)
    else:
        yield from _nearest_on_cpu(queries, index, k, memory_bytes, progress)


Blocks = Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]


def _nearest_on_devices(
    queries: Array,
    index: Index,
    k: int,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Blocks:
    """Exact distances of what GPUs list; queries whose lists may lack something are done here."""
    kept = min(LISTED * k, len(index))
    for block, listed in listed_blocks(
        queries, index.rows, index.centre, k, kept, index.devices, progress
    ):
        query = np.repeat(np.arange(len(block), dtype=np.int32), kept)
        found = Candidates(query, listed.index.ravel(), listed.rank.ravel())
        found, squared = _settle(found, k, block, index.rows)
        distances, indices = squared.reshape(-1, k), found.index.reshape(-1, k)
        unsure = np.flatnonzero(~listed.sure)
        if len(unsure):
            again = _nearest_on_cpu(block[unsure], index, k, memory_bytes, None)
            parts = [np.concatenate(part) for part in zip(*again, strict=True)]
            distances[unsure], indices[unsure] = parts
        yield distances, indices


def _nearest_on_cpu(
    queries: Array,
    index: Index,
    k: int,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Blocks:
    rows = index.rows
    q_rows, r_rows = tile_rows(queries, rows, k, memory_bytes)
    sketch = choose(index, queries, partial(_kth, k / len(rows)), memory_bytes, len(queries))
    if sketch is not None:
        yield from nearest_by_sketch(queries, index, k, sketch, memory_bytes, progress)
        return
    patches = index.smooth and queries.ndim == 4
    for _, block in blocks(queries, q_rows):
        yield _nearest_to_block(block, rows, k, index.centre, patches, r_rows, progress)


def _kth(share: float, rows: Array, squared: Array) -> list[tuple[Array, Array]]:
    """What decides about neighbours: the distance within which that share of a sample lies.

    Where that is less than two of it, guessed from how distances grow with their order.
    """
    n = squared.shape[1]
    order, beyond = min(n, max(2, math.ceil(share * n))), min(n, 32)
    ascending = np.sort(squared, axis=1)
    kth = ascending[:, order - 1]
    if share * n < order and order < beyond:
        growth = np.log(ascending[:, beyond - 1] / np.maximum(kth, 1e-30)) / math.log(
            beyond / order
        )
        kth = kth * (share * n / order) ** growth
    return [(kth, np.full(len(squared), -np.inf))]


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
    room = PENDING * k * n_queries
    farthest = np.full(n_queries, np.inf)  # no less than the squared distance of the k-th
    if patches:
        likely = _likely(Filter(queries, centre, 4, r_rows), reference, 2 * k, r_rows)
        squared = np.sort(refine(likely, queries, reference).reshape(n_queries, -1), axis=1)
        farthest = squared[:, k - 1]
    filter_ = sharpest(queries, reference, centre, patches, r_rows, farthest)
    limit = filter_.rank_of(farthest)  # no neighbour that is still missing has a larger true rank

    found = Candidates.none()
    for start, block in blocks(reference, r_rows):
        rank = filter_.ranks(block)
        margin = filter_.margin()
        near = rank <= float32_above(limit + margin)[:, None]
        if filter_.is_rank and len(block) >= k and np.count_nonzero(near) > 2 * k * n_queries:
            kth = np.partition(rank, k - 1, axis=1)[:, k - 1]
            limit = np.minimum(limit, kth + margin)
            near = rank <= float32_above(limit + margin)[:, None]
        found += Candidates.where(near, rank, start)

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


def _likely(filter_: Filter, reference: Array, k: int, r_rows: int) -> Candidates:
    """The k lowest computed ranks of each query: a guess, whose distances bound the true ones."""
    n_queries = len(filter_.minus_a)
    k = min(k, len(reference))
    found = Candidates.none()
    cutoff = np.full(n_queries, np.inf, np.float32)
    for start, block in blocks(reference, r_rows):
        rank = filter_.ranks(block)
        near = rank < cutoff[:, None]
        if rank.shape[1] >= k and np.count_nonzero(near) > 2 * k * n_queries:
            cutoff = np.minimum(cutoff, np.partition(rank, k - 1, axis=1)[:, k - 1])
            near = rank <= cutoff[:, None]
        found += Candidates.where(near, rank, start)
        last = start + r_rows >= len(reference)
        if last or len(found) > PENDING // 2 * k * n_queries:
            found = found.by_rank()
            found = found[found.first(k, n_queries)]
            if len(found) == k * n_queries:
                cutoff = found.rank.reshape(n_queries, k)[:, -1]
    return found


def _prune(found: Candidates, k: int, margin: Array) -> tuple[Candidates, Array]:
    """Drops what cannot be among the k nearest, by computed ranks; upper bounds of the k-th [Q]."""
    found = found.by_rank()
    first = found.first(k, len(margin))
    if len(first) < k * len(margin):
        return found, np.full(len(margin), np.inf)
    limit = found.rank[first].reshape(-1, k)[:, -1] + margin
    return found[found.rank <= float32_above(limit + margin)[found.query]], limit


def _settle(
    found: Candidates, k: int, queries: Array, reference: Array
) -> tuple[Candidates, NDArray[np.float64]]:
    """The k nearest of each query's candidates by true distance, then index; squared distances."""
    squared = refine(found, queries, reference)
    order = np.lexsort((found.index, squared, found.query))
    chosen = order[found[order].first(k, len(queries))]
    return found[chosen], squared[chosen]
