"""A reference made ready for searches: its centre, and the sketch that makes them quickest.

What is fitted to the reference, and its features if they fit into memory, is kept, so that several
searches (plain and mirrored queries, neighbours and bands, one batch of queries after another) pay
for it once. Nothing of it ever changes an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from membench.similarity.filter import (
    COMPILED,
    Array,
    Candidates,
    centre_of,
    evenly_spread,
    flat_rows,
    n_features,
    refine,
)
from membench.similarity.pages import gather
from membench.similarity.products import Float32, engines, fits, quickest, seconds
from membench.similarity.sketch import Features, Sketch, SketchFilter, principal_directions

WIDTHS = (64, 128, 256, 512)
"""Candidates for the columns of features: directions, and one for what they do not see."""

WORTH = 2**35  # multiplications of a search from which on a sketch may pay
_SAMPLE = 1024  # references that directions are fitted to and tried on
_TRIED = 128  # queries of the trial
_FITTED = 256  # directions fitted at first; more only where so many pay

Limits = Callable[[Array, Array], list[tuple[Array, Array]]]


class Index:
    """References [N, ...], and what searches of them share.

    rows: as for `nearest`, where an index may stand in place of the array. devices: as torch names
    them, on which neighbours (not bands) are filtered; none: the CPU's own way. It holds on to the
    features that a search made if they fit into an eighth of that search's memory_bytes.
    """

    def __init__(self, rows: Array, devices: Sequence[str] = ()) -> None:
        self.rows = np.asarray(rows) if isinstance(rows, np.ndarray) else rows  # a map stays one
        self.devices = tuple(devices)
        self._sketches: dict[int | None, Sketch] = {}
        self._features: tuple[Sketch, Features] | None = None
        self._basis: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, reference: Array | Index) -> Index:
        return reference if isinstance(reference, Index) else cls(reference)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _centre(self) -> tuple[Array, bool]:
        return centre_of(self.rows)

    @property
    def centre(self) -> Array:
        """A point near the mean."""
        return self._centre[0]

    @property
    def smooth(self) -> bool:
        """Whether sums of patches may tell images apart."""
        return self._centre[1]

    @cached_property
    def sample(self) -> Array:
        """Some rows, evenly spread."""
        return gather(self.rows, evenly_spread(len(self.rows), _SAMPLE))

    def sketch(self, width: int | None) -> Sketch:
        """A sketch by principal directions with features of that width; None: all values."""
        if width not in self._sketches:
            directions = None if width is None else self._directions(width - 1)
            self._sketches[width] = Sketch(quickest(), self.centre, self.sample, directions)
        return self._sketches[width]

    def _directions(self, m: int) -> NDArray[np.float32]:
        if self._basis is None or len(self._basis) < m:
            most = min(len(self.sample) // 2, n_features(self.rows))
            self._basis = principal_directions(self.sample, self.centre, min(most, max(m, _FITTED)))
        return self._basis[:m]

    def blocks(
        self, sketch: Sketch, r_rows: int, memory_bytes: int
    ) -> Iterator[tuple[int, Features]]:
        """(first row, features) of blocks of r_rows references, front to back."""
        if not self._holds(sketch) and self._may_hold(sketch, memory_bytes):
            self._features = sketch, sketch.features(self.rows)
        for start in range(0, len(self.rows), r_rows):
            rows = slice(start, start + r_rows)
            if self._features is not None and self._holds(sketch):
                yield start, self._features[1][rows]
            else:
                yield start, sketch.features(self.rows[rows])

    def passes(self, sketch: Sketch, groups: int, memory_bytes: int) -> int:
        """How often a search of groups of queries makes the features of all references."""
        if self._holds(sketch):
            return 0
        return 1 if self._may_hold(sketch, memory_bytes) else groups

    def _holds(self, sketch: Sketch) -> bool:
        return self._features is not None and self._features[0] is sketch

    def _may_hold(self, sketch: Sketch, memory_bytes: int) -> bool:
        return len(self.rows) * sketch.row_bytes() <= memory_bytes // 8


def choose(
    index: Index, queries: Array, limits: Limits, memory_bytes: int, group: int
) -> Sketch | None:
    """The sketch that is expected to make a search quickest; None where plain blocks are.

    limits: of the rows of some queries, and of their squared distances [T, n] to an even sample of
    the reference, the squared distances [T] that decide: (at most, surely within), one pair for
    each radius. memory_bytes: of the search; None as well if a sketch would not fit into it.
    group: queries that are compared in one pass over the references.

    Features of the sample are made and compared; their speed and what they leave to compare in full
    are measured. Widths are tried in turn, until a wider one costs more.
    """
    n_queries, n, d = len(queries), len(index), n_features(index.rows)
    if n_queries * n * d < WORTH:
        return None
    tried = evenly_spread(n_queries, _TRIED)
    sample, asked = index.sample, gather(queries, tried)
    squared = _all_squared(asked, sample, index.centre)
    asked_limits = limits(tried, squared)
    per_pair = _seconds_per_pair(asked, index.rows)
    plain, engine = engines()[Float32()], quickest()
    speed = engines()[engine]

    def cost(width: int | None) -> tuple[float, Sketch | None]:
        columns = d if width is None else width
        fixed = n_queries * n * (columns * speed.product + speed.compared)
        if fixed > least or not fits(engine, columns):
            return math.inf, None
        sketch = index.sketch(width)
        if sketch.working_bytes() > memory_bytes // 4:
            return math.inf, None
        start = time.perf_counter()
        share = _unsure(sketch, asked, sample, asked_limits)
        made = (time.perf_counter() - start) / (len(sample) + len(asked))
        rows = n_queries + n * index.passes(sketch, -(-n_queries // group), memory_bytes)
        return fixed + made * rows + share * n_queries * n * per_pair, sketch

    unsure = _union([(squared <= x[:, None]) ^ (squared <= y[:, None]) for x, y in asked_limits])
    best: Sketch | None = None
    least = n_queries * n * (d * plain.product + plain.compared + unsure * per_pair)
    for widths in ([w for w in WIDTHS if w <= min(d, len(sample) // 2)], [None]):
        for width in widths:
            expected, sketch = cost(width)
            if expected >= least and best is not None:
                break  # wider ones cost more
            if expected < least:
                best, least = sketch, expected
    return best


def _all_squared(queries: Array, reference: Array, centre: Array) -> NDArray[np.float64]:
    """All squared distances [Q, n], about."""
    a, b = (
        np.subtract(flat_rows(x), centre.ravel(), dtype=np.float32) for x in (queries, reference)
    )
    squares = [np.einsum("ij,ij->i", x, x) for x in (a, b)]
    squared = squares[0][:, None] + squares[1] - 2 * (a @ b.T)
    return np.maximum(0, squared.astype(np.float64))


def _unsure(
    sketch: Sketch, queries: Array, reference: Array, limits: list[tuple[Array, Array]]
) -> float:
    """Share of pairs that the sketch leaves to compare in full."""
    out = np.empty(len(queries) * len(reference), sketch.engine.dtype)
    filter_ = SketchFilter(sketch, sketch.features(queries), out)
    rank = filter_.ranks(sketch.features(reference))
    if sketch.exact:
        return 0.0
    return _union([(rank <= filter_.most(x)) ^ (rank <= filter_.surely(y)) for x, y in limits])


def _union(marked: list[Array]) -> float:
    """Share of pairs that are marked in any of the arrays."""
    return float(np.logical_or.reduce(marked).mean())


def _seconds_per_pair(queries: Array, reference: Array) -> float:
    """Time to compare a pair in full, where hardly two are of the same reference."""
    reference = reference[:COMPILED]
    count = np.arange(COMPILED, dtype=np.int32)
    query, index = count % len(queries), count % len(reference)
    pairs = Candidates(query, index, np.empty(0, np.float32))
    return seconds(lambda: refine(pairs, queries, reference)) / len(pairs)
