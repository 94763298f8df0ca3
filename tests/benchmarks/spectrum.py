"""From which spectrum on do directions pay, and where does the search fall back?

    OMP_NUM_THREADS=1 python tests/benchmarks/spectrum.py

Descriptors of 512 values (as SSCD's) whose i-th principal variance is i^-alpha, Gaussian; and unit
vectors like SSCD's: flat, and in clusters. 1,000 queries, 100,000 references, 50 neighbours. A line
of the table: the share of the variance in the first 64 directions, what `choose` takes, how many
references it leaves to compare in full per query, and CPU seconds of the search as chosen, of the
search in plain float32 blocks and of the bare matrix product, in turns, medians of three. Writes
results/spectrum.md.
"""

from __future__ import annotations

import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import machine
import numpy as np

from membench.similarity import nearest, pruned, search

ROWS, QUERIES, VALUES, K, ROUNDS = 100_000, 1_000, 512, 50, 3
OUT = Path(__file__).parent / "results" / "spectrum.md"
ALPHAS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)


def power_law(rng, n, alpha):
    scale = np.arange(1, VALUES + 1) ** (-alpha / 2)
    return (rng.standard_normal((n, VALUES), np.float32) * scale).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clusters(rng, n):
    """Unit vectors about 1,000 centres, half of their variance inside the clusters."""
    centres = np.random.default_rng(7).standard_normal((1000, VALUES), np.float32)
    return unit(centres[rng.integers(0, 1000, n)] + rng.standard_normal((n, VALUES), np.float32))


KINDS = {f"alpha {alpha}": lambda rng, n, a=alpha: power_law(rng, n, a) for alpha in ALPHAS} | {
    "unit, flat": lambda rng, n: unit(power_law(rng, n, 0)),
    "unit, alpha 1": lambda rng, n: unit(power_law(rng, n, 1)),
    "unit, clusters": clusters,
}


def line(name, make):
    rng = np.random.default_rng(0)
    reference, queries = make(rng, ROWS), make(rng, QUERIES)
    product = np.empty((QUERIES, ROWS), np.float32)
    chosen, left = [], []
    choose, refine = search.choose, pruned.refine

    def spied_choose(*asked):
        chosen.append(choose(*asked))
        return chosen[-1]

    def spied_refine(found, *rest, **options):
        left.append(len(found))
        return refine(found, *rest, **options)

    def plain():
        with mock.patch.object(search, "choose", return_value=None):
            nearest(queries, reference, K)

    contenders = {
        "chosen": lambda: nearest(queries, reference, K),
        "plain": plain,
        "gemm": lambda: np.matmul(queries, reference.T, out=product),
    }
    seconds = {key: [] for key in contenders}
    patched = mock.patch.object(search, "choose", spied_choose)
    with patched, mock.patch.object(pruned, "refine", spied_refine):
        for _ in range(ROUNDS):
            for key, run in contenders.items():
                start = time.process_time()
                run()
                seconds[key].append(time.process_time() - start)
    values = np.sort(np.linalg.eigvalsh(np.cov(reference[:20_000].T)))[::-1]
    share = values[:64].sum() / values.sum()
    times = " | ".join(f"{statistics.median(x):.2f}" for x in seconds.values())
    per_query = sum(left) / ROUNDS / QUERIES
    return f"| {name} | {share:.2f} | {chosen[-1]} | {per_query:,.0f} | {times} |"


def main() -> None:
    load = os.getloadavg()[0]
    table = [
        "| spectrum | in 64 | chosen | left per query | s | plain s | GEMM s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, make in KINDS.items():
        table.append(line(name, make))
        print(table[-1], flush=True)
    text = [
        "# Where directions pay, by spectrum",
        "",
        f"{QUERIES:,} queries, {ROWS:,} references, {VALUES} values, {K} neighbours; variances "
        "i^-alpha, and unit vectors. in 64: share of the variance in the first 64 directions; "
        "chosen: of what features are made, None for plain float32 blocks; left: references to "
        f"compare in full; CPU seconds, medians of {ROUNDS}, in turns.",
        "",
        *machine.lines(machine.here()),
        f"- measured: {datetime.now(UTC):%Y-%m-%d}, load {load:.1f} at the start",
        "",
        *table,
    ]
    OUT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
