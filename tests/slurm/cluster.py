"""A real Slurm cluster on this machine, a sweep on it, and what can be done to both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from membench.contract import silent
from membench.registry import Registry
from membench.sweep.dispatch import create, go
from membench.sweep.folder import Sweep
from membench.sweep.plan import plan
from membench.sweep.slurm import Slurm
from membench.sweep.specs import load_sweep
from membench.sweep.tasks import Attempt, Task

HERE = Path(__file__).parent
PLUGINS = HERE / "plugins"
UNAVAILABLE = 3
"""Exit code of up.sh where no cluster can be had."""


def shell(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout


class Cluster:
    """Three nodes of four cores and two fake GPUs; `up` restarts what is down."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            "MEMBENCH_SLURM_DIR": str(folder),
            "MEMBENCH_SLURM_MAX_ARRAY": "4",
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }

    def up(self) -> subprocess.CompletedProcess[str]:
        with open(self.folder.with_suffix(".log"), "a") as log:  # daemons keep what they are given
            return subprocess.run(
                [HERE / "up.sh"],
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | self.environment,
            )

    def down(self) -> None:
        shell(HERE / "down.sh", "--purge")

    def said(self) -> str:
        return self.folder.with_suffix(".log").read_text(encoding="utf-8").strip()

    def pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    @property
    def saved(self) -> float:
        """When the controller last wrote down what it knows of jobs, in seconds since 1970."""
        return (self.folder / "state" / "job_state").stat().st_mtime

    def kill(self, daemon: str) -> None:
        """SIGKILL, by the daemon's pid file."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, f"{daemon} to die")

    def lose(self, node: str) -> None:
        """A node loses power: its slurmd and every process of its jobs are gone at once."""
        victims = list(processes_of(node))
        os.kill(self.pid(f"slurmd.{node}"), signal.SIGKILL)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_with(setting: str) -> list[int]:
    """Processes that were started with this in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            if place.name.isdigit() and setting.encode() in (place / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(place.name))
    return found


def processes_of(node: str) -> Iterator[int]:
    """Everything that jobs run on a node, their slurmstepd first."""
    workers = processes_with(f"SLURMD_NODENAME={node}")
    parents = {parent_of(pid) for pid in workers}
    for pid in parents:
        with suppress(OSError):
            if b"slurmstepd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid
    yield from workers


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_until(what: Callable[[], Any], seconds: float, name: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"waited {seconds:g} s for {name}"
        time.sleep(0.1)
    return found


@dataclass
class Trial:
    """One sweep on the cluster, in a results folder of its own, every batch written down."""

    folder: Path
    results: Path
    sweep: Sweep = field(init=False)
    plugins: Sequence[Path] = (PLUGINS,)

    def write(self, **content: Any) -> Path:
        """The sweep file, TOML."""
        path = self.folder / "trial.toml"
        path.write_text("\n".join(_toml(content)) + "\n", encoding="utf-8")
        return path

    def create(self, file: Path, executor: str = "slurm", results: Path | None = None) -> Sweep:
        registry, where = Registry(self.plugins), results or self.results
        made = plan(load_sweep(file), file, registry, where, silent, executor=executor)
        sweep, new = create(made, file, registry, where, executor)
        assert new
        return sweep

    def submit(self, *, pace: float = 0.0, failed: bool = False, **more: str) -> float:
        """Start or go on; returns the seconds it took. more: of jobs' environment."""
        tally = {"MEMBENCH_TALLY": str(self.tally), "MEMBENCH_PACE": str(pace)}
        before = dict(os.environ)
        os.environ.update(tally | more)
        began = time.monotonic()
        try:
            go(self.sweep, Slurm(), failed=failed)
        finally:
            os.environ.clear()
            os.environ.update(before)
        return time.monotonic() - began

    @property
    def tally(self) -> Path:
        return self.folder / "tally.jsonl"

    def batches(self, event: str) -> list[dict[str, Any]]:
        if not self.tally.is_file():
            return []
        lines = self.tally.read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def after_batches(self, count: int, seconds: float = 60) -> None:
        """Wait until so many batches are made."""
        wait_until(lambda: len(self.batches("end")) >= count, seconds, f"{count} batches")

    def running(self, stage: str = "images") -> list[tuple[Task, Attempt]]:
        """Tasks of a stage that a live worker has, with the attempt it is at."""
        tasks = [task for task in self.sweep.tasks.values() if task.stage == stage]
        found = [(task, self.sweep.attempts(task)) for task in tasks]
        return [
            (t, a[-1]) for t, a in found if a and a[-1].state == "running" and self.sweep.held(t)
        ]

    def finish(self, seconds: float = 150) -> None:
        """Wait until no job of the sweep is in the queue."""
        name = self.sweep.manifest.name

        def gone() -> bool:
            done = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True)
            jobs = [job.partition(":")[0] for job in done.stdout.splitlines()]
            return done.returncode == 0 and name not in jobs

        wait_until(gone, seconds, f"{name} to end")

    def summary(self) -> dict[str, Any]:
        return json.loads((self.sweep.folder / "summary.json").read_text(encoding="utf-8"))

    def attempts(self, stage: str = "images") -> list[Attempt]:
        tasks = [task for task in self.sweep.tasks.values() if task.stage == stage]
        return [attempt for task in tasks for attempt in self.sweep.attempts(task)]

    def twice(self, unsaved: Sequence[dict[str, Any]] = ()) -> int:
        """Batches that were made, whole, more than once; `unsaved` ones could not be written."""
        made = [
            (line["target"], line["seed"], line["first"])
            for line in self.batches("end")
            if line not in unsaved
        ]
        return len(made) - len(set(made))

    def lost(self, event: float) -> float:
        """Seconds spent on batches that were under way at `event` and never ended."""
        ended = {(line["pid"], line["first"], line["seed"]) for line in self.batches("end")}
        return sum(
            event - line["at"]
            for line in self.batches("begin")
            if line["at"] < event and (line["pid"], line["first"], line["seed"]) not in ended
        )


def _toml(content: dict[str, Any], place: str = "") -> Iterator[str]:
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key not in tables:
            yield f"{key} = {_inline(value)}"
    for key, value in tables.items():
        yield f"\n[{place}{key}]"
        yield from _toml(value, f"{place}{key}.")


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{k} = {_inline(v)}' for k, v in value.items())} }}"
    return json.dumps(value)


def sbatch(*options: str, command: str) -> str:
    """Submit a job of somebody else; returns its id."""
    return shell("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", command).strip()


def nodes_up() -> Sequence[str]:
    return shell("sinfo", "-h", "-N", "-p", "main", "-t", "idle,mix,alloc", "-o", "%N").split()
