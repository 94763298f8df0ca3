"""Range search and counts: ours against brute force in one run.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_within.py -s

2,000 queries against 50,000 x 3,072 uint8 pixels, the data of `test_search`, at radii that hold
1e-5, 1e-3 and 0.1 of all pairs. Brute force is `torch.cdist` in float32, block by block (not exact)
and a float64 product in numpy (exact for 8-bit pixels). No time is asserted; counts must be the
same: exactly those of float64, and those of float32 but for pairs on the edge.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from test_search import data, unit  # noqa: F401

from membench.similarity import tally, within

SHARES, ROUNDS, BLOCK = (1e-5, 1e-3, 0.1), 3, 2_000


def blocks(x):
    return ((start, x[start : start + BLOCK]) for start in range(0, len(x), BLOCK))


def by_float64(queries, reference, radius):
    """Pairs per reference, exactly: all sums are integers below 2^53."""
    a = queries.reshape(len(queries), -1).astype(np.float64)
    count = np.zeros(len(reference), np.int64)
    for start, block in blocks(reference):
        b = block.reshape(len(block), -1).astype(np.float64)
        squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
        inside = (np.sqrt(squared) / 255).astype(np.float32) <= radius
        count[start : start + len(block)] = inside.sum(axis=0)
    return count


def by_cdist(queries, reference, radius):
    a = torch.from_numpy(unit(queries))
    count = np.zeros(len(reference), np.int64)
    for start, block in blocks(reference):
        inside = torch.cdist(a, torch.from_numpy(unit(block))) <= radius
        count[start : start + len(block)] = inside.sum(dim=0).numpy()
    return count


def by_within(queries, reference, radius):
    count = np.zeros(len(reference), np.int64)
    for _, index, _ in within(queries, reference, radius):
        count += np.bincount(index, minlength=len(reference))
    return count


def by_tally(queries, reference, radius):
    return tally(queries, reference, [radius]).count[0]


CONTENDERS = {
    "within": by_within,
    "tally": by_tally,
    "cdist": by_cdist,
    "float64": by_float64,
}


@pytest.mark.parametrize("share", SHARES)
def test_within(data, share):  # noqa: F811
    name, queries, reference = data
    rows = unit(queries[:200]), unit(reference[::10])
    sample = torch.cdist(*(torch.from_numpy(x) for x in rows)).numpy()
    radius = float(np.quantile(sample, share))
    seconds = {key: [] for key in CONTENDERS}
    count = {}
    for _ in range(ROUNDS):
        for key, run in CONTENDERS.items():
            started = time.process_time()
            count[key] = run(queries, reference, radius)
            seconds[key].append(time.process_time() - started)
    median = {key: round(statistics.median(times), 2) for key, times in seconds.items()}
    print(f"\n{name}, {count['tally'].sum():,} pairs within {radius:.3f}: CPU seconds {median}")
    np.testing.assert_array_equal(count["within"], count["float64"])
    np.testing.assert_array_equal(count["tally"], count["float64"])
    assert abs(count["cdist"].sum() - count["float64"].sum()) <= 1e-4 * count["float64"].sum() + 5
