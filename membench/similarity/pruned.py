"""k nearest neighbours by a sketch: a product filters, survivors are compared in full at once.

The references are read once for as many queries as fit; each block of them is compared with blocks
of queries, and every query's k-th distance so far limits what survives in the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from membench.similarity.filter import Array, Candidates, refine
from membench.similarity.pages import blocks
from membench.similarity.sketch import Features, Sketch, SketchFilter

_SURVIVORS = 48  # working memory of a pair that survives
_ROWS = 512  # queries that are compared with a block of references at a time
_MOST = 2**16  # references of a block


def nearest_by_sketch(
    queries: Array,
    reference: Array,
    k: int,
    sketch: Sketch,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
    """Squared distances [q, k] and indices [q, k] of blocks of queries; see `search.nearest`."""
    group, q_rows, r_rows = shape(queries, reference, k, sketch, memory_bytes)
    out = np.empty(q_rows * r_rows, sketch.engine.dtype)
    most_pairs = max(r_rows, memory_bytes // 4 // _SURVIVORS)
    for _, block in blocks(queries, group):
        block = np.ascontiguousarray(block)  # mirrored images are a view
        features = sketch.queries(block)
        found = [_Nearest(block[rows], features[rows], k) for rows in _parts(len(block), q_rows)]
        for start in range(0, len(reference), r_rows):
            b = sketch.references(reference[start : start + r_rows])
            for part in found:
                part.compare(sketch, b, start, reference, out, most_pairs)
            if progress is not None:
                progress(len(block) * len(b.length))
        yield (
            np.concatenate([part.squared for part in found]),
            np.concatenate([part.index for part in found]),
        )


def shape(
    queries: Array, reference: Array, k: int, sketch: Sketch, memory_bytes: int
) -> tuple[int, int, int]:
    """Queries whose state is held at a time, those compared at a time, references of a block.

    An eighth of the memory each for the features of references and what is kept of queries, a
    quarter for the products, a quarter for survivors; the rest is for making features.
    """
    eighth = memory_bytes // 8
    r_rows = max(1, min(len(reference), _MOST, eighth // sketch.row_bytes()))
    q_rows = max(1, min(len(queries), _ROWS, 2 * eighth // (r_rows * (sketch.engine.bytes + 3))))
    group = max(q_rows, min(len(queries), eighth // (sketch.row_bytes() + 12 * k)))
    return group, q_rows, r_rows


def _parts(n: int, rows: int) -> list[slice]:
    return [slice(start, min(n, start + rows)) for start in range(0, n, rows)]


class _Nearest:
    """The nearest references so far of one block of queries."""

    def __init__(self, queries: Array, features: Features, k: int) -> None:
        self.queries = queries
        self.features = features
        self.k = k
        self.squared = np.full((len(queries), k), np.inf)
        self.index = np.full((len(queries), k), -1, np.int32)

    def compare(
        self,
        sketch: Sketch,
        references: Features,
        start: int,
        reference: Array,
        out: Array,
        most_pairs: int,
    ) -> None:
        """Takes a block of references, which begins at row `start`, into account."""
        filter_ = SketchFilter(sketch, self.features, out)
        rank = filter_.ranks_of(references)
        seen = None
        if np.isinf(self.squared[:, -1]).any() and rank.shape[1] > self.k:
            # the k likely nearest first: their distances limit all others
            seen = rank <= np.partition(rank, self.k - 1, axis=1)[:, self.k - 1 : self.k]
            self._settle(seen, start, reference, most_pairs)
        near = rank <= filter_.most(self.squared[:, -1])
        if seen is not None:
            near &= ~seen
        self._settle(near, start, reference, most_pairs)

    def _settle(self, near: Array, start: int, reference: Array, most_pairs: int) -> None:
        """Compares the marked pairs [Q, r] in full, as many at a time as fit."""
        rows = len(near)
        if np.count_nonzero(near) > most_pairs:
            rows = max(1, most_pairs // near.shape[1])
        for first in range(0, len(near), rows):
            part = slice(first, first + rows)
            query, column = np.divmod(np.flatnonzero(near[part]), near.shape[1])
            pairs = Candidates(
                (query + first).astype(np.int32),
                (column + start).astype(np.int32),
                np.empty(0, np.float32),
            )
            squared = refine(pairs, self.queries, reference)
            self._merge(pairs.query, pairs.index, squared, part)

    def _merge(self, query: Array, index: Array, squared: Array, part: slice) -> None:
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
