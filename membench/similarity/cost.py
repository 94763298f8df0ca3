"""What an exact k-nearest search costs: multiplications, bytes, memory and seconds, by a model.

Q queries and N references of D values go through five steps. With w = D values of a row, or w = m
where m directions sketch it (`membench.similarity.sketch`):

    features   2 (Q + N) D m         FLOPs to project (none without directions)
    filter     2 Q N w               FLOPs of one matrix product
    compare    Q N                   results held against the limit of their query
    select     Q k (1 + ln(N / k))   sorted: references that are among the k nearest when they come
    refine     3 D s Q               FLOPs for s survivors a query, which the filter cannot settle

(In random order the i-th reference is among the k nearest so far with probability k / i.)

Each moves bytes: rows as stored and their features once; the features of all references once for
every group of queries; the product, written and read, where it leaves the chip; whole rows of
survivors. A step takes as long as the slower of its arithmetic and its bytes (the roofline of
Williams, Waterman and Patterson 2009), and steps follow each other. With the peaks of a data sheet
that is a lower bound: products reach some 60 to 80 % of such a peak.

So the cost grows as Q N D, without directions in each alone; with directions as Q N m, which does
not depend on D, plus (Q + N) D m and s Q D. s depends on the data and grows with N, at most
linearly. How near measured searches come to this is in `tests/benchmarks/scale.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from membench.errors import MembenchError
from membench.similarity.products import seconds

BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "int8": 1}
"""Of a feature, by the precision of the product; its results are summed in 4 bytes each."""
STORED = {"float32": 4, "float16": 2, "uint8": 1}
"""Bytes of a value as it is kept: descriptors in float32 or float16, pixels in uint8."""
_RESULT = 4
_NEIGHBOUR = 8  # a float32 distance and an int32 index; also a key to sort by
_REFERENCES_AT_ONCE = 65_536
TIMES = 5
"""Runs of which the quickest says how fast a processor is."""


@dataclass(frozen=True)
class Search:
    """Q queries against N references of D values stored in `itemsize` bytes, k neighbours each.

    directions: m of a sketch; None for the full product. survivors: references a query that are
    compared in full; without directions little more than k.
    Raises MembenchError for numbers below 1, more directions than dimensions, and directions
    without survivors.
    """

    queries: int
    references: int
    dimensions: int
    itemsize: int = 4
    neighbours: int = 50
    directions: int | None = None
    survivors: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise MembenchError(f"{field.name}: {value}, expected at least 1")
        if self.directions is not None and self.directions > self.dimensions:
            raise MembenchError(
                f"directions: {self.directions}, expected at most the {self.dimensions} dimensions"
            )
        if self.directions is not None and self.survivors is None:
            raise MembenchError(
                "survivors: not given; say how many references a query the directions leave to "
                "compare in full, which depends on the data"
            )

    @property
    def width(self) -> int:
        """Values of a row's features."""
        return self.directions or self.dimensions

    @property
    def candidates(self) -> float:
        """References of all queries that are among the nearest so far when they come."""
        k = min(self.neighbours, self.references)
        return self.queries * k * (1 + math.log(self.references / k))

    @property
    def refined(self) -> float:
        """Pairs that are compared in full."""
        each = 2 * self.neighbours if self.survivors is None else self.survivors
        return self.queries * min(each, self.references)


@dataclass(frozen=True)
class Hardware:
    """What a machine does in a second.

    products: FLOPs of a matrix product by precision (a multiplication and an addition are two);
    plain: float32 FLOPs of anything else; bandwidth: bytes read or written; results: results of a
    product compared with a limit, its writing and reading included; keys: sorted, of 8 bytes;
    memory: bytes. queries_at_once: of a group, for which all features of the references are read
    once.
    """

    name: str
    products: Mapping[str, float]
    plain: float
    bandwidth: float
    results: float
    keys: float
    memory: int
    queries_at_once: int
    source: str


H100 = Hardware(
    name="H100 SXM",
    products={"float32": 67e12, "tf32": 989e12 / 2, "bfloat16": 1979e12 / 2, "int8": 3958e12 / 2},
    plain=67e12,
    bandwidth=3.35e12,
    results=3.35e12 / (2 * _RESULT),
    keys=3.35e12 / (2 * _NEIGHBOUR * 8),
    memory=80 * 10**9,
    queries_at_once=16_384,
    source="NVIDIA H100 data sheet; its peaks of tensor cores with sparsity, halved",
)
"""Results and keys by bandwidth: results are written and read once, keys by each of the 8 passes of
a radix sort."""


@dataclass(frozen=True)
class Step:
    """One step of a search and what it takes on some hardware."""

    name: str
    flops: float
    bytes: float
    seconds: float


def steps(search: Search, hardware: Hardware, precision: str) -> list[Step]:
    """The steps of a search on hardware that multiplies in `precision`.

    Raises MembenchError for a precision that the hardware has no figure for.
    """
    if precision not in hardware.products:
        known = ", ".join(hardware.products)
        raise MembenchError(f"precision: {precision!r}, {hardware.name} has figures for {known}")
    q, n, d, width = search.queries, search.references, search.dimensions, search.width
    feature, pairs = BYTES[precision] * width, float(q) * n
    groups = math.ceil(q / hardware.queries_at_once)

    def step(name: str, flops: float, moved: float, rate: float) -> Step:
        return Step(name, flops, moved, max(flops / rate, moved / hardware.bandwidth))

    product = hardware.products[precision]
    projection = 0.0 if search.directions is None else 2.0 * (q + n) * d * width
    made = (q + n) * (d * search.itemsize + feature)
    read = (q + groups * n) * feature
    refined = search.refined * d * search.itemsize + q * search.neighbours * _NEIGHBOUR
    return [
        step("features", projection, made, product),
        step("filter", 2.0 * pairs * width, read, product),
        Step("compare", pairs, 2 * pairs * _RESULT, pairs / hardware.results),
        Step(
            "select",
            0.0,
            2 * search.candidates * _NEIGHBOUR,
            search.candidates / hardware.keys,
        ),
        step("refine", 3.0 * d * search.refined, refined, hardware.plain),
    ]


def total(found: list[Step]) -> Step:
    """All steps, one after the other."""
    parts = ((step.flops, step.bytes, step.seconds) for step in found)
    return Step("all", *map(sum, zip(*parts, strict=True)))


def memory(search: Search, hardware: Hardware, precision: str) -> int:
    """Bytes that are held if nothing but queries is streamed.

    The references as stored and their features (one of them, where they are the same), a group of
    queries, its product with a block of references, and all neighbours that are found.
    """
    feature = BYTES[precision] * search.width
    row = search.dimensions * search.itemsize
    same = search.directions is None and BYTES[precision] == search.itemsize
    kept = row if same else row + feature
    group = min(search.queries, hardware.queries_at_once)
    product = group * min(search.references, _REFERENCES_AT_ONCE) * _RESULT
    found = search.queries * search.neighbours * _NEIGHBOUR
    return (search.references + group) * kept + product + found


def this_cpu() -> Hardware:
    """The processor at hand with as many threads as torch has, measured in some tenths of a second.

    Products are those of numpy (float32) and torch (bfloat16, int8), of 512 x 4,096 rows of 512.
    """
    import os

    import torch

    rng = np.random.default_rng(0)
    rows, columns, terms = 512, 4096, 512
    a, b = (rng.random((n, terms), np.float32) for n in (rows, columns))
    out = np.empty((rows, columns), np.float32)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    runs: dict[str, Callable[[], Any]] = {"float32": lambda: np.matmul(a, b.T, out=out)}
    half = [v.to(torch.bfloat16) for v in (x, y)]
    runs["bfloat16"] = lambda: torch.mm(half[0], half[1].T)
    whole = [(v * 127).to(torch.int8) for v in (x, y)]
    runs["int8"] = lambda: torch._int_mm(whole[0], whole[1].T)
    flops = 2.0 * rows * columns * terms
    products = {}
    for precision, run in runs.items():
        try:
            products[precision] = flops / seconds(run, TIMES)
        except (RuntimeError, AttributeError):  # this torch has no such product on the CPU
            continue
    limit = np.full((rows, 1), -1.0, np.float32)  # holds nothing
    at_random = rng.integers(0, columns, rows)
    large = np.zeros(2**26, np.uint8)
    keys = rng.integers(0, 2**62, 2**19)
    copy = np.empty_like(large)
    return Hardware(
        name=f"this CPU on {torch.get_num_threads()}",
        products=products,
        plain=3.0 * rows * terms / seconds(lambda: _squared_l2(a, b[at_random]), TIMES),
        bandwidth=2.0 * large.size / seconds(lambda: np.copyto(copy, large), TIMES),
        results=out.size / seconds(lambda: np.flatnonzero(out <= limit), TIMES),
        keys=len(keys) / seconds(lambda: np.argsort(keys), TIMES),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        queries_at_once=2048,
        source="measured just now",
    )


def _squared_l2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    difference = x - y
    found: np.ndarray = np.einsum("ij,ij->i", difference, difference)
    return found
