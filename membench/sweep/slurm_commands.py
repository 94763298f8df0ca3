"""Slurm's commands, asked and read: what the cluster allows, and what it knows of jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from membench.errors import MembenchError
from membench.sweep.slurm_state import (
    SACCT_FORMAT,
    SQUEUE_FORMAT,
    InQueue,
    Run,
    read_sacct,
    read_squeue,
)

PATIENCE = 180.0
"""Seconds to wait for a controller that does not answer (it may be restarted)."""
AWAY = re.compile(
    "Unable to contact slurm controller|Connection refused|Socket timed out|"
    "Zero Bytes were transmitted|Unexpected message received|"
    "temporarily unable to accept job|Connection timed out"
)
"""What commands say when the controller is away or too busy: no answer to the question."""
INSIDE = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
UNLIMITED = 365 * 24 * 60


@dataclass(frozen=True)
class Partition:
    """One partition; minutes: its MaxTime."""

    name: str
    default: bool
    up: bool
    minutes: int


@dataclass(frozen=True)
class Node:
    """What a node has; memory in MB."""

    name: str
    cpus: int
    memory: int
    gpus: int
    features: frozenset[str]


def ask(command: Sequence[str], *, patience: float = 0.0) -> str:
    """The standard output of a command; raises `MembenchError` with its last word if it fails.

    patience: seconds to ask again while the controller is away.
    """
    if shutil.which(command[0]) is None:
        raise MembenchError(f"--executor slurm: there is no {command[0]} on this machine")
    end = time.monotonic() + patience
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        words = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        if not AWAY.search(words) or time.monotonic() >= end:
            raise MembenchError(f"{command[0]}: {words.splitlines()[-1]}")
        time.sleep(2)


def fields(line: str) -> dict[str, str]:
    """`KEY=VALUE ...` as `scontrol -o` prints it; values with spaces are cut."""
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def largest_array() -> int:
    """How many elements an array may have."""
    for line in ask(["scontrol", "show", "config"], patience=PATIENCE).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return 1000


def partitions() -> dict[str, Partition]:
    found = {}
    for line in ask(["scontrol", "-o", "show", "partition"], patience=PATIENCE).splitlines():
        row = fields(line)
        if "PartitionName" in row:
            found[row["PartitionName"]] = Partition(
                row["PartitionName"],
                row.get("Default") == "YES",
                row.get("State") == "UP",
                minutes(row.get("MaxTime", "UNLIMITED")),
            )
    return found


def minutes(text: str) -> int:
    """`2-03:00:00`, `03:00:00`, `30:00` or `UNLIMITED` in minutes, rounded down."""
    if text in ("UNLIMITED", "NONE", "INFINITE"):
        return UNLIMITED
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts += [0] * (3 - len(parts))  # D-HH, D-HH:MM
    elif len(parts) == 1:
        parts.append(0)  # minutes
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + part
    return int(days or 0) * 24 * 60 + seconds // 60


def nodes(partition: str) -> list[Node]:
    """The nodes of a partition, in whatever state."""
    found = []
    for line in ask(["sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G|%f"]).splitlines():
        name, cpus, memory, gres, features = line.split("|")
        found.append(
            Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus_in(gres),
                 frozenset(features.split(",")))
        )  # fmt: skip
    return found


def gpus_in(gres: str) -> int:
    """GPUs in a list of generic resources, as in `gpu:a100:4(S:0-1),nvme:1`."""
    count = 0
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = entry.split(":")
        if parts[0] == "gpu":
            count += int(parts[-1]) if parts[-1].isdigit() else 1
    return count


def known(jobs: Iterable[str]) -> tuple[dict[str, list[Run]], dict[str, InQueue] | None]:
    """What accounting and the controller know of these jobs and arrays, by one question each.

    Without accounting there are no runs; None: the controller does not answer.
    """
    names = sorted({job.partition("_")[0] for job in jobs}, key=int)
    if not names:
        return {}, {}
    runs: dict[str, list[Run]] = {}
    queue: dict[str, InQueue] | None = {}
    try:
        # The controller first: a job that ends between the two answers must be in the second.
        command = ["squeue", "-h", "-r", "-t", "all", "-O", SQUEUE_FORMAT, "-j", ",".join(names)]
        queue = read_squeue(ask(command, patience=10))
    except MembenchError as error:
        if "Invalid job id" not in str(error):  # it has forgotten them: an answer, too
            queue = None
    try:
        command = ["sacct", "-D", "-P", f"--format={SACCT_FORMAT}", "-j", ",".join(names)]
        runs = read_sacct(ask(command))
    except MembenchError:
        pass
    return runs, queue


def own_state(job: str) -> str:
    """The controller's word for the state of a running job; empty if there is no answer."""
    try:
        return fields(ask(["scontrol", "-o", "show", "job", job], patience=PATIENCE))["JobState"]
    except (MembenchError, KeyError):
        return ""


def is_preempted(job: str) -> bool:
    """Whether a running job is being preempted."""
    try:
        row = fields(ask(["scontrol", "-o", "show", "job", job]))
    except MembenchError:
        return False
    return row.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide that this process is a job, so that it can submit others; the cluster stays the same."""
    hidden = {n: v for n, v in os.environ.items() if n.startswith(INSIDE) and n != "SLURM_CONF"}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
