"""What a sweep costs on Slurm over plain runs: 100 tiny cells on the tests' throw-away cluster.

    sudo python tests/benchmarks/slurm_overhead.py [CELLS] [TASKS_PER_JOB ...]

`plain`: the same runs one after another in this process. `sweep, N a job`: the sweep, N tasks in a
Slurm job. `Slurm alone, N a job`: as many jobs in the same arrays with the same dependencies, which
do nothing. Seconds of wall clock from the submission until the queue is empty, and of CPU of the
whole machine, daemons included, so nothing else should run beside. Records must be the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "slurm"))

from cluster import Cluster, shell, wait_until
from sweep_overhead import plain
from sweeps import planned, seals, write_file

from membench.sweep.dispatch import create, go
from membench.sweep.folder import Sweep
from membench.sweep.slurm import Slurm, arrays, largest_array

MEMORY = 0.5
"""GiB that a task asks for: the nodes have 4 each."""


def sweep_of(folder: Path, cells: int, per_job: int) -> Sweep:
    """A sweep of so many cells, planned and not queued."""
    asked = {"default": {"memory": MEMORY, "tasks_per_job": per_job}}
    file = write_file(folder, seeds=list(range(cells)), resources=asked)
    found, registry = planned(file, folder / "results", "slurm")
    return create(found, file, registry, folder / "results", "slurm")[0]


def queue_is_empty() -> bool:
    return not shell("squeue", "-h").strip()


def alone(sweep: Sweep) -> int:
    """Queue the sweep's arrays as jobs that do nothing; returns how many jobs."""
    tasks = [task for task in sweep.tasks.values() if not task.after]
    jobs: dict[str, str] = {}
    memory = f"--mem={int(1024 * MEMORY)}M"
    count = 1
    for array in arrays(sweep.manifest.cells, tasks, largest_array(), capped=False):
        count += len(array.elements)
        waits = sorted({jobs[need] for need in array.needs})
        after = [f"--dependency=afterany:{':'.join(waits)}"] if waits else []
        job = _true(memory, f"--array=0-{len(array.elements) - 1}", *after)
        jobs |= {task.id: job for task in array.tasks}
    _true(memory, f"--dependency=afterany:{':'.join(sorted(set(jobs.values())))}")
    return count


def _true(*options: str) -> str:
    return shell("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", "true").strip()


def busy() -> float:
    """CPU seconds of this machine so far: user, nice, system."""
    return sum(map(int, Path("/proc/stat").read_text().split()[1:4])) / os.sysconf("SC_CLK_TCK")


def timed(what: Callable[[], object]) -> tuple[float, float]:
    began, cpu = time.monotonic(), busy()
    what()
    return time.monotonic() - began, busy() - cpu


def main(cells: int = 100, *per_job: int) -> None:
    """Print one line for each way."""
    with tempfile.TemporaryDirectory(prefix="membench-slurm-") as name:
        place = Path(name)
        place.chmod(0o755)  # munge wants its socket to be reachable for all
        cluster = Cluster(place / "cluster")
        cluster.environment["MEMBENCH_SLURM_MAX_ARRAY"] = "1001"
        os.environ.update(cluster.environment)
        try:
            if cluster.up().returncode != 0:
                sys.exit(cluster.said().splitlines()[-1])
            compare(place, cells, per_job or (1, 10, 100))
        finally:
            cluster.down()


def compare(place: Path, cells: int, per_job: tuple[int, ...]) -> None:
    plain(write_file(place / "warm"), place / "warm" / "results")  # imports and caches
    file = write_file(place / "plain", seeds=list(range(cells)))
    expected: list[tuple[str, str]] = []
    wall, cpu = timed(lambda: expected.extend(plain(file, place / "plain" / "results")))
    print(f"{cells} cells\nplain{wall:36.1f} s  CPU {cpu:6.1f} s", flush=True)
    for number in per_job:
        sweep = sweep_of(place / f"slurm-{number}", cells, number)
        jobs = 0

        def nothing(sweep: Sweep = sweep) -> None:
            nonlocal jobs
            jobs = alone(sweep)
            wait_until(queue_is_empty, 3600, "the queue to empty")

        def whole(sweep: Sweep = sweep) -> None:
            go(sweep, Slurm())
            wait_until(queue_is_empty, 3600, "the queue to empty")

        for title, way in (("Slurm alone", nothing), ("sweep", whole)):
            wall, cpu = timed(way)
            what = f"{title}, {number} a job ({jobs} jobs)"
            print(f"{what:<37}{wall:6.1f} s  CPU {cpu:6.1f} s", flush=True)
        assert seals(sweep) == expected, "the same records"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
