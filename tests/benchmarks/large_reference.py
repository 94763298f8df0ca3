"""Seconds and peak memory of an exact search among a million descriptors on disk.

    OMP_NUM_THREADS=2 python tests/benchmarks/large_reference.py FOLDER

1,000,000 x 512 unit vectors (as SSCD's are) against 10,000 queries, half of them noisy copies, 50
neighbours, stored as float16 and as float32. The search runs in a process of its own; the peak is
that of its resident memory, pages of the maps included. Twenty queries are checked against brute
force in float64. FOLDER needs 3 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from membench.similarity import nearest

ROWS, QUERIES, VALUES, K, CHUNK = 1_000_000, 10_000, 512, 50, 20_000


def write(path: Path, chunks, rows: int, dtype: str) -> None:
    """A .npy written piece by piece, without a map whose pages would count."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, VALUES)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            chunk /= np.linalg.norm(chunk, axis=1, keepdims=True)
            chunk.astype(dtype).tofile(file)


def reference_chunks(rows: int):
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        yield rng.standard_normal((min(CHUNK, rows - start), VALUES), np.float32)


def query_chunks(reference: Path, queries: int):
    rng = np.random.default_rng(1)
    rows = np.load(reference, mmap_mode="r")
    out = rng.standard_normal((queries, VALUES), np.float32)
    half = queries // 2
    copied = rows[:: len(rows) // half][:half].astype(np.float32)
    out[:half] = copied + 0.03 * out[:half]
    yield out


def search(reference: Path, queries: Path) -> dict[str, float]:
    maps = [np.load(path, mmap_mode="r") for path in (queries, reference)]
    started = time.perf_counter()
    found = nearest(*maps, K)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    for i in np.linspace(0, len(maps[0]) - 1, 20).astype(int):
        squared = np.concatenate(
            [
                ((maps[1][s : s + CHUNK].astype(np.float64) - maps[0][i]) ** 2).sum(axis=1)
                for s in range(0, len(maps[1]), CHUNK)
            ]
        )
        np.testing.assert_array_equal(found.index[i], np.argsort(squared, kind="stable")[:K])
    return {"seconds": seconds, "peak_gb": peak / 1e9, "map_gb": maps[1].nbytes / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--search", choices=["float16", "float32"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.search:
        paths = [asked.folder / f"{name}_{asked.search}.npy" for name in ("reference", "queries")]
        print(json.dumps(search(*paths)))
        return
    for dtype in ("float16", "float32"):
        reference, queries = (
            asked.folder / f"{name}_{dtype}.npy" for name in ("reference", "queries")
        )
        write(reference, reference_chunks(asked.rows), asked.rows, dtype)
        write(queries, query_chunks(reference, asked.queries), asked.queries, dtype)
        command = [sys.executable, __file__, str(asked.folder), "--search", dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(dtype, {key: round(value, 2) for key, value in json.loads(done.stdout).items()})


if __name__ == "__main__":
    main()
