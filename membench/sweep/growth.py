"""Sweeps whose targets are trained on the way: planned again as soon as one has its weights."""

from __future__ import annotations

from pathlib import Path

from membench.files import locked
from membench.lab import Progress
from membench.registry import Registry
from membench.sweep.folder import GROWING, Sweep
from membench.sweep.plan import plan, with_board
from membench.sweep.tasks import Task


def grow(sweep: Sweep, registry: Registry, progress: Progress) -> list[Task]:
    """Plan the sweep again with what is trained by now; returns the tasks that are new.

    The trainings stay among its tasks. Two at a time follow each other, and the second one sees
    what the first one saw, and more.
    """
    with locked(sweep.folder / GROWING):
        sweep.refresh()
        manifest, before = sweep.manifest, sweep.tasks
        found = plan(
            manifest.spec,
            Path(manifest.file),
            registry,
            sweep.results,
            progress,
            executor=manifest.executor,
            device=manifest.device,
        )
        here = {task.id for task in found.tasks}
        trained = [t for t in before.values() if t.target is not None and t.id not in here]
        planned = [task for task in found.tasks if task.stage != "board"]
        tasks = with_board(manifest.spec, manifest.device, [*trained, *planned])
        sweep.grow(manifest.model_copy(update={"cells": found.cells, "tasks": tuple(tasks)}))
    return [task for task in tasks if task.id not in before]
