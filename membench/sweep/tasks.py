"""The words sweeps are described in: tasks, attempts, states and causes."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from membench.specs_base import Spec
from membench.sweep.specs import Resources


class Cause(StrEnum):
    """Why a task failed."""

    CODE = "error in code"
    MISTAKE = "user mistake"
    MEMORY = "out of memory"
    DISK = "disk full"
    TIME = "time limit"
    CANCELLED = "cancelled"
    KILLED = "killed"
    NODE = "node failure"
    REFUSED = "refused"


RETRIED = frozenset({Cause.MEMORY, Cause.TIME, Cause.KILLED, Cause.NODE})
"""Causes that lie outside the code: tried again, up to the sweep's `retries`."""

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
EXIT: dict[Cause | None, int] = {
    None: 0,
    Cause.CODE: 1,
    Cause.MISTAKE: 2,
    Cause.MEMORY: 12,  # ENOMEM
    Cause.DISK: 28,  # ENOSPC
    Cause.CANCELLED: 130,
}
"""Exit codes of a worker by cause; `STOPPED` for one that has more to do. Others never reach it."""


class Product(Spec):
    """What a task leaves in the results folder: `path` there is a folder, a record or weights.

    parts: first and last (exclusive) part of a sharded artifact, for a task that makes only these.
    """

    path: str
    parts: tuple[int, int] | None = None


class Task(Spec):
    """One node of the graph: what one job does.

    stage: `train`, `plan`, `check`, an artifact's kind (`images`, `classifier`, `matches`, ...),
    `record` or `board`; it decides the resources. cell: the first cell that needs it, by whose
    options a worker finds the artifact `key`. target: data set and recipe, of a `train` or `plan`.
    needs: tasks that must be done first. after: tasks that must have ended, whatever became of
    them. unet_calls, classifier_calls: model calls it will make.
    """

    id: str
    stage: str
    title: str
    cell: int | None = None
    key: str | None = None
    target: tuple[str, str] | None = None
    product: Product | None = None
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resources: Resources
    unet_calls: int = 0
    classifier_calls: int = 0


class CellPlan(Spec):
    """One row of the sweep: options of `membench.run.prepare`, and what they came to.

    id, folder: of the record (folder below the results). failed: why the cell cannot be planned
    (its plugin is broken), with `log`, the end of the traceback. waits: the task that will plan the
    cell, once its target is trained. calls: model calls of this cell alone, in an empty results
    folder: (U-Net, classifier).
    """

    options: dict[str, Any]
    title: str
    id: str | None = None
    folder: str | None = None
    record: str | None = Field(default=None, description="id of the task that writes the record")
    failed: str | None = None
    waits: str | None = None
    log: tuple[str, ...] = ()
    calls: tuple[int, int] = (0, 0)


AttemptState = Literal["running", "done", "stopped", "failed"]
TaskState = Literal["waiting", "ready", "queued", "running", "stopped", "done", "failed", "skipped"]
"""`stopped`: at a batch boundary, to be gone on with; `skipped`: something it needs failed."""


class Attempt(Spec):
    """One try at a task, as its worker wrote it; times are seconds since 1970.

    forgiven: `membench retry` took it out of the count. restart: Slurm's count of requeues.
    """

    number: int
    state: AttemptState
    cause: Cause | None = None
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    host: str = ""
    pid: int = 0
    job: str | None = None
    restart: int = 0
    gpus: str | None = None
    threads: int | None = None
    started: float = 0.0
    finished: float | None = None
    done: int | None = None
    total: int | None = None
    doing: str = ""
    forgiven: bool = False


class Submitted(Spec):
    """A task that an executor queued."""

    executor: str
    job: str
    at: float


class Report(Spec):
    """What an executor's queue says of a task that no result on disk settles.

    reason: of a pending job, why it waits; of a failed one, what happened.
    """

    state: Literal["queued", "running", "failed", "unknown"]
    cause: Cause | None = None
    reason: str = ""


class Status(Spec):
    """What has become of a task."""

    task: str
    state: TaskState
    cause: Cause | None = None
    reason: str = ""
    attempts: int = 0
    last: Attempt | None = None
