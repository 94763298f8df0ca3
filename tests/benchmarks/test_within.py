"""Range search and counts: ours against faiss, a plain GEMM and float64 in one run.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_within.py -s

2,000 queries (or MEMBENCH_QUERIES) against 50,000 x 3,072 uint8 pixels, the data of `test_search`,
at radii that hold 1e-5, 1e-3 and 0.1 of all pairs. Contenders take turns; CPU time is counted (of
all threads); `ours` means from the memory map, all preparation included, `indexed` with an `Index`.
faiss's index is filled beforehand; its range search returns what `within` does, in float32. The
GEMM is the matrix product alone. No time is asserted; counts must be the same: exactly those of
float64, and those of faiss but for pairs on the edge.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from test_search import data, faiss, unit  # noqa: F401

from membench.similarity import Index, tally, within

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


@pytest.fixture(scope="module")
def prepared(data):  # noqa: F811
    """(queries and reference in [0, 1], a full faiss index, an index of ours)."""
    _, queries, reference = data
    a, b = unit(queries), unit(reference)
    full = faiss.IndexFlatL2(b.shape[1])
    full.add(b)
    return a, b, full, Index(reference)


@pytest.mark.parametrize("share", SHARES)
def test_within(data, prepared, share):  # noqa: F811
    name, queries, reference = data
    a, b, full, index = prepared
    sample = torch.cdist(torch.from_numpy(a[:200]), torch.from_numpy(b[::10])).numpy()
    radius = float(np.quantile(sample, share))
    product = np.empty((len(a), len(b)), np.float32)
    contenders = {
        "within": lambda: by_within(queries, reference, radius),
        "within_indexed": lambda: by_within(queries, index, radius),
        "tally": lambda: by_tally(queries, reference, radius),
        "tally_indexed": lambda: by_tally(queries, index, radius),
        "faiss": lambda: np.bincount(full.range_search(a, radius**2)[2], minlength=len(b)),
        "gemm": lambda: np.matmul(a, b.T, out=product),
    }
    seconds = {key: [] for key in contenders}
    count = {}
    for _ in range(ROUNDS):
        for key, run in contenders.items():
            started = time.process_time()
            count[key] = run()
            seconds[key].append(time.process_time() - started)
    median = {key: round(statistics.median(times), 2) for key, times in seconds.items()}
    ratio = {
        f"{peer}/{key}": round(
            statistics.median(x / y for x, y in zip(seconds[peer], seconds[key], strict=True)), 1
        )
        for peer in ("faiss", "gemm")
        for key in ("within", "within_indexed", "tally", "tally_indexed")
    }
    print(f"\n{name}, {count['tally'].sum():,} pairs within {radius:.3f}: CPU s {median}, {ratio}")
    exact = by_float64(queries, reference, radius)
    for key in ("within", "within_indexed", "tally", "tally_indexed"):
        np.testing.assert_array_equal(count[key], exact)
    assert abs(count["faiss"].sum() - exact.sum()) <= 1e-4 * exact.sum() + 5
