"""What a sweep costs over plain runs: 100 tiny cells by `membench.run`, inline and local.

    python tests/benchmarks/sweep_overhead.py [CELLS] [ROUNDS]

Every way gets a results folder of its own; the same records come out. Seconds of wall clock and of
CPU (workers' too), medians of ROUNDS after a warm-up; `local` with one worker, so that the same
work is done one by one, and its start (importing torch) is part of it.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sweeps import made, planned, seals, write_file

from membench import run as engine
from membench.sweep.dispatch import go
from membench.sweep.inline import Inline
from membench.sweep.local import Local


def plain(file: Path, results: Path) -> list[tuple[str, str]]:
    """As many `membench run`s would, in one process that keeps data and target open."""
    found, _ = planned(file, results)
    done = [engine.run(cell) for cell in found.prepared.values()]
    return [(record["id"], record["results_sha256"]) for record in done]


def swept(runner: Callable[[], Inline | Local]) -> Callable[[Path, Path], list[tuple[str, str]]]:
    def run(file: Path, results: Path) -> list[tuple[str, str]]:
        sweep = made(file, results)
        go(sweep, runner())
        return seals(sweep)

    return run


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in whose)


def main(cells: int = 100, rounds: int = 3) -> None:
    """Print one line for each way."""
    ways = {"plain": plain, "inline": swept(Inline), "local": swept(lambda: Local(jobs=1))}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:  # imports and caches
        plain(write_file(Path(folder)), Path(folder) / "results")
    results: dict[str, list[tuple[str, str]]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                file = write_file(Path(folder), seeds=list(range(cells)))
                began, cpu = time.monotonic(), cpu_seconds()
                results[name] = way(file, Path(folder) / "results")
                seconds[name].append((time.monotonic() - began, cpu_seconds() - cpu))
    assert results["plain"] == results["inline"] == results["local"]
    middle = {
        name: [statistics.median(times) for times in zip(*found, strict=True)]
        for name, found in seconds.items()
    }
    for name, (wall, cpu) in middle.items():
        more = [100 * (a / b - 1) for a, b in zip(middle[name], middle["plain"], strict=True)]
        print(
            f"{name:<7} {wall:6.1f} s ({more[0]:+.0f} %)  CPU {cpu:6.1f} s ({more[1]:+.0f} %), "
            f"{1000 * (cpu - middle['plain'][1]) / cells:+.0f} ms a cell"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
