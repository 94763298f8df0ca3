"""Making a sweep's folder, and starting, going on with and cancelling what is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from membench.errors import MembenchError
from membench.files import writing
from membench.hashing import content_hash
from membench.registry import Registry
from membench.sweep import snapshot
from membench.sweep.executor import Executor
from membench.sweep.folder import (
    CANCELLED,
    CODE,
    EXECUTOR,
    MANIFEST,
    SWEEPS,
    Manifest,
    Sweep,
    write_manifest,
)
from membench.sweep.plan import Plan
from membench.sweep.tasks import RETRIED, Cause, Report, Status, Task


def create(
    plan: Plan, file: Path, registry: Registry, results: Path, executor: str
) -> tuple[Sweep, bool]:
    """The sweep's folder, its code copied and its manifest written; True if it is a new one.

    The same file, cells and code are the same sweep: its folder is found again.
    """
    code = snapshot.describe(registry.folders)
    spec = plan.spec.model_dump(mode="json")
    cells = [row.id or [row.options, row.failed] for row in plan.cells]
    name = content_hash({"spec": spec, "cells": cells, "code": code["sha256"]})[:8]
    folder = results.resolve() / SWEEPS / f"{plan.spec.name}-{name}"
    if (folder / MANIFEST).is_file():
        return Sweep(folder), False
    for before in sorted(folder.parent.glob(f"{plan.spec.name}-*/{MANIFEST}")):
        if _has_grown_into(Sweep(before.parent).manifest, plan, code):
            return Sweep(before.parent), False
    weights = plan.spec.descriptor_weights
    manifest = Manifest(
        name=plan.spec.name,
        id=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=plan.spec,
        file=str(file.resolve()),
        executor=executor,
        device=plan.device,
        data=str(registry.data.resolve()),
        plugins=tuple(f"plugins-{i}" for i in range(1, len(registry.folders) + 1)),
        descriptor_weights=None if weights is None else str((file.parent / weights).resolve()),
        code=code,
        cells=plan.cells,
        tasks=plan.tasks,
    )
    with writing(folder):
        snapshot.take(registry.folders, folder / CODE, code)
        write_manifest(folder, manifest)
    return Sweep(folder), True


def _has_grown_into(manifest: Manifest, plan: Plan, code: dict[str, Any]) -> bool:
    """Whether a sweep that began with trainings is, or is about to be, the planned one."""
    if manifest.spec != plan.spec or manifest.code["sha256"] != code["sha256"]:
        return False
    if all(task.target is None for task in manifest.tasks):
        return False
    waiting = any(row.waits for row in manifest.cells)
    ids = {row.id for row in plan.cells}
    return all(row.waits or row.id in ids for row in manifest.cells) and (
        waiting or len(manifest.cells) == len(plan.cells)
    )


def go(
    sweep: Sweep, executor: Executor, *, failed: bool = False, ask: Callable[[], None] | None = None
) -> list[Task]:
    """Start what is not done, or go on with it; returns the tasks that were started.

    Failures for causes outside the code get their attempts back, so do cancelled tasks; failed: all
    others too. ask: called when everything is checked, before anything starts.
    """
    executor.check(sweep)
    if ask is not None:
        ask()
    _leave_the_queue(sweep, executor)
    with writing(sweep.folder):
        (sweep.folder / CANCELLED).unlink(missing_ok=True)
        (sweep.folder / EXECUTOR).write_text(executor.name, "utf-8")
        tasks = _unfinished(sweep, executor, failed)
        if tasks:
            executor.start(sweep, tasks)
    return tasks


def _unfinished(sweep: Sweep, executor: Executor, failed: bool) -> list[Task]:
    """What to start, in order, with what may be tried again forgiven."""
    statuses = asked(sweep, executor)
    again: set[Cause | None] = {*RETRIED, None, Cause.CANCELLED}
    if failed:
        again |= set(Cause)
    for task in sweep.tasks.values():
        status = statuses[task.id]
        if status.state in ("failed", "stopped") and status.cause in again:
            sweep.forgive(task)
            sweep.withdraw(task)
    statuses = asked(sweep, executor)
    tasks = [t for t in sweep.tasks.values() if statuses[t.id].state not in SETTLED]
    if tasks and tasks[-1].stage != "board":  # the board was made without these
        board = sweep.tasks["board"]
        sweep.forgive(board)
        tasks.append(board)
    return tasks


SETTLED = ("done", "failed", "skipped")


def _leave_the_queue(sweep: Sweep, executor: Executor) -> None:
    """A sweep that is queued somewhere else must be cancelled there first."""
    before = last_executor(sweep)
    if before == executor.name:
        return
    from membench.sweep.executor import executor as named

    queued = [task for task in sweep.tasks.values() if sweep.read_submitted(task) is not None]
    if not queued:
        return
    reports = named(before).ask(sweep, queued)
    alive = [name for name, report in reports.items() if report.state in ("queued", "running")]
    if alive:
        raise MembenchError(
            f"{sweep.name}: {len(alive)} tasks are queued on {before}; run first: "
            f"membench cancel {sweep.name}"
        )
    for task in queued:
        sweep.withdraw(task)


def last_executor(sweep: Sweep) -> str:
    """The name of the executor that started the sweep last."""
    path = sweep.folder / EXECUTOR
    return path.read_text("utf-8").strip() if path.is_file() else sweep.manifest.executor


def asked(sweep: Sweep, executor: Executor) -> dict[str, Status]:
    """What has become of every task, the executor's queue asked."""
    reports: dict[str, Report] = {}
    if executor.detached:
        reports = dict(executor.ask(sweep, _open(sweep)))
    return sweep.statuses(reports)


def _open(sweep: Sweep) -> Sequence[Task]:
    return [task for task in sweep.tasks.values() if not sweep.done(task)]


def cancel(sweep: Sweep, executor: Executor) -> list[Task]:
    """Stop everything that is not done, for good; returns those tasks."""
    tasks = [sweep.tasks[name] for name, s in sweep.statuses().items() if s.state not in SETTLED]
    with writing(sweep.folder):
        (sweep.folder / CANCELLED).touch()
    executor.cancel(sweep, tasks)
    return tasks
