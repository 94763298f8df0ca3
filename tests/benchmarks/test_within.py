"""Range search and counts: ours against faiss, a plain GEMM and float64 in one run.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_within.py -s

2,000 queries (or MEMBENCH_QUERIES) against 50,000 x 3,072 uint8 pixels, the data of `test_search`,
at radii that hold 1e-5, 1e-3 and 0.1 of all pairs. Ours is timed from the memory map, all
preparation included, and with an `Index`. faiss's index is filled beforehand; its range search
returns what `within` does, in float32. No time is asserted; counts must be the same: exactly those
of float64, and those of faiss but for pairs on the edge.
"""

import numpy as np
import pytest
import torch
from test_search import GEMM, WITH_INDEX, data, filled  # noqa: F401
from turns import take_turns

from membench.similarity import tally, within

SHARES, ROUNDS, BLOCK = (1e-5, 1e-3, 0.1), 5, 2_000


def by_float64(queries, reference, radius):
    """Pairs per reference, exactly: all sums are integers below 2^53."""
    a = queries.reshape(len(queries), -1).astype(np.float64)
    count = np.zeros(len(reference), np.int64)
    for start in range(0, len(reference), BLOCK):
        b = reference[start : start + BLOCK].reshape(-1, a.shape[1]).astype(np.float64)
        squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
        inside = (np.sqrt(squared) / 255).astype(np.float32) <= radius
        count[start : start + len(b)] = inside.sum(axis=0)
    return count


def by_within(queries, reference, radius):
    count = np.zeros(len(reference), np.int64)
    for _, index, _ in within(queries, reference, radius):
        count += np.bincount(index, minlength=len(reference))
    return count


def by_tally(queries, reference, radius):
    return tally(queries, reference, [radius]).count[0]


@pytest.mark.parametrize("share", SHARES)
def test_within(benchmark, data, filled, share):  # noqa: F811
    name, queries, reference = data
    a, b, full, index = filled
    sample = torch.cdist(torch.from_numpy(a[:200]), torch.from_numpy(b[::10])).numpy()
    radius = float(np.quantile(sample, share))
    product = np.empty((len(a), len(b)), np.float32)
    theirs = "faiss.IndexFlatL2, range_search"
    found = take_turns(
        benchmark,
        f"the nearest {100 * share:g} % of all pairs of {len(a):,} x {len(b):,} {name} images",
        lambda: by_within(queries, reference, radius),
        {
            theirs: lambda: np.bincount(full.range_search(a, radius**2)[2], minlength=len(b)),
            GEMM: lambda: np.matmul(a, b.T, out=product),
        },
        more={
            WITH_INDEX: lambda: by_within(queries, index, radius),
            "counted": lambda: by_tally(queries, reference, radius),
            "counted, with an Index": lambda: by_tally(queries, index, radius),
        },
        rounds=ROUNDS,
    )
    del found[GEMM]
    exact = by_float64(queries, reference, radius)
    assert abs(found.pop(theirs).sum() - exact.sum()) <= 1e-4 * exact.sum() + 5
    for count in found.values():
        np.testing.assert_array_equal(count, exact)
