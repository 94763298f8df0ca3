"""k nearest neighbours by a sketch: a product filters, survivors are compared in full at once.

The references are read once for as many queries as fit; each block of them is compared with blocks
of queries, and every query's k-th distance so far limits what survives. Where that leaves many, the
likely nearest are compared first, so that their distances limit the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from membench.similarity.filter import Array, Candidates, refine
from membench.similarity.index import Index
from membench.similarity.pages import blocks, mapped, release
from membench.similarity.sketch import Sketch, SketchFilter

_SURVIVORS = 48  # working memory of a pair that survives
_ROWS = 512  # queries that are compared with a block of references at a time
_MOST = 2**16  # references of a block
_LIKELY = 2  # likely nearest that are compared first, in multiples of k
_MANY = 4  # survivors of a query, in multiples of k, that are too many to compare at once
_FOLDS = 16


def nearest_by_sketch(
    queries: Array,
    index: Index,
    k: int,
    sketch: Sketch,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
    """Squared distances [q, k] and indices [q, k] of blocks of queries; see `search.nearest`."""
    rows = index.rows
    keep = mapped(rows) and rows.nbytes <= memory_bytes // 2  # rather than read it again and again
    room = memory_bytes * 7 // 8 - (rows.nbytes if keep else 0)  # less what libraries take
    group, q_rows, r_rows = shape(queries, index, k, sketch, room)
    out = np.empty(q_rows * r_rows, sketch.engine.dtype)
    most_pairs = max(r_rows, room // 4 // _SURVIVORS)
    for _, block in blocks(queries, group):
        block = np.ascontiguousarray(block)  # mirrored images are a view
        features = sketch.features(block)
        found = _Nearest(block, rows, k, most_pairs, keep)
        for start, references in index.blocks(sketch, r_rows, memory_bytes):
            for first in range(0, len(block), q_rows):
                part = slice(first, first + q_rows)
                filter_ = SketchFilter(sketch, features[part], out)
                found.compare(filter_, filter_.ranks(references), part, start)
            found.settle()
            if progress is not None:
                progress(len(block) * len(references))
        yield found.squared, found.index
    release(rows)


def shape(
    queries: Array, index: Index, k: int, sketch: Sketch, memory_bytes: int
) -> tuple[int, int, int]:
    """Queries whose state is held at a time, those compared at a time, references of a block.

    An eighth of the memory each for the features of references and what is kept of queries, a
    quarter for the products, a quarter for survivors; the rest is for making features.
    """
    eighth = memory_bytes // 8
    r_rows = max(1, min(len(index), _MOST, eighth // sketch.row_bytes()))
    q_rows = max(1, min(len(queries), _ROWS, 2 * eighth // (r_rows * (4 + 3))))
    group = max(q_rows, min(len(queries), eighth // (sketch.row_bytes() + 12 * k)))
    return group, q_rows, r_rows


class _Nearest:
    """The nearest references so far of a group of queries, and pairs to be compared in full."""

    def __init__(self, queries: Array, reference: Array, k: int, most_pairs: int, keep: bool):
        self.queries = queries
        self.reference = reference
        self.k = k
        self.most_pairs = most_pairs
        self.keep = keep
        self.squared = np.full((len(queries), k), np.inf)
        self.index = np.full((len(queries), k), -1, np.int32)
        self.pending: list[Candidates] = []

    def compare(self, filter_: SketchFilter, rank: Array, part: slice, start: int) -> None:
        """Takes ranks [q, r] of a part of the queries with the references from `start` on."""
        near = rank <= filter_.most(self.squared[part, -1])
        if np.count_nonzero(near) > _MANY * self.k * len(near):
            near &= rank <= _least(rank, min(_LIKELY * self.k, rank.shape[1]))
            for places in self._marked(near):
                self._settle(_pairs(places, rank.shape[1], part.start, start))
                rank.ravel()[places] = filter_.sketch.engine.never
            near = rank <= filter_.most(self.squared[part, -1])
        for places in self._marked(near):
            if sum(map(len, self.pending)) + len(places) > self.most_pairs:
                self.settle()
            self.pending.append(_pairs(places, rank.shape[1], part.start, start))

    def settle(self) -> None:
        """Compares the pending pairs in full."""
        if self.pending:
            found = Candidates.join(self.pending)
            self.pending = []
            self._settle(found)

    def _marked(self, near: Array) -> Iterator[NDArray[np.int64]]:
        """Positions of the marked pairs, no more at a time than fit, or than one query has."""
        rows = len(near)
        if np.count_nonzero(near) > self.most_pairs:
            rows = max(1, self.most_pairs // near.shape[1])
        for first in range(0, len(near), rows):
            yield np.flatnonzero(near[first : first + rows]) + first * near.shape[1]

    def _settle(self, found: Candidates) -> None:
        squared = refine(found, self.queries, self.reference, keep=self.keep)
        self._merge(found.query, found.index, squared)

    def _merge(self, query: Array, index: Array, squared: Array) -> None:
        # of equal distances the lower index comes first: one that comes later in the reference
        # must be nearer, but one of the same block may precede what was found there
        of_use = squared <= self.squared[query, -1]
        query, index, squared = query[of_use], index[of_use], squared[of_use]
        if not len(query):
            return
        who = np.unique(query)
        held = self.index[who] >= 0
        query = np.concatenate([np.repeat(who, held.sum(axis=1)), query])
        index = np.concatenate([self.index[who][held], index])
        squared = np.concatenate([self.squared[who][held], squared])
        order = np.lexsort((index, squared, query))
        query = query[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        chosen = place < self.k
        query, place, order = query[chosen], place[chosen], order[chosen]
        self.squared[query, place] = squared[order]
        self.index[query, place] = index[order]


def _pairs(places: NDArray[np.int64], columns: int, query: int, index: int) -> Candidates:
    """Pairs by their places in a block [q, columns] that begins at a query and a reference."""
    row, column = np.divmod(places, columns)
    return Candidates(
        (row + query).astype(np.int32), (column + index).astype(np.int32), np.empty(0, np.float32)
    )


def _least(rank: Array, n: int) -> Array:
    """[Q, 1], such that at least n entries of each row, and not many more, are at most this.

    Of a row folded into columns, the n-th smallest column minimum: each of n columns holds one.
    """
    folds = max(1, min(_FOLDS, rank.shape[1] // n))
    columns = rank.shape[1] // folds
    folded = rank[:, : folds * columns].reshape(len(rank), folds, columns).min(axis=1)
    least: Array = np.partition(folded, n - 1, axis=1)[:, n - 1 : n]
    return least
