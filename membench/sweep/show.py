"""What people see of a sweep: the plan, the table of its cells, and what went wrong."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from membench.report.table import new_table, percent
from membench.store import with_inputs
from membench.sweep.collect import Row
from membench.sweep.estimate import Line
from membench.sweep.folder import Sweep
from membench.sweep.plan import Plan
from membench.sweep.slurm import arrays
from membench.sweep.tasks import Status

COLOURS = {"done": "green", "failed": "red", "skipped": "red", "running": "cyan"}


def dry_run(plan: Plan, lines: Sequence[Line]) -> dict[str, Any]:
    """Everything `membench sweep FILE --dry-run` says, JSON-able."""
    cached = {key for key, a in plan.artifacts.items() if _is_cached(plan, key)}
    open_tasks = [task for task in plan.tasks if _is_open(plan, task.id)]
    todo = [a.planned for key, a in plan.artifacts.items() if key not in cached]
    each = [task for task in open_tasks if not task.after]
    queued = arrays(plan.cells, each, len(each), capped=plan.spec.concurrency is not None)
    return {
        "name": plan.spec.name,
        "device": plan.device,
        "cells": [
            {
                "title": row.title,
                "id": row.id,
                "failed": row.failed,
                "waits": row.waits,
                "cached": i in plan.prepared and _recorded(plan, i),
                "stages": len(keys := _keys(plan, i)),
                "stages_cached": len(keys & cached),
            }
            for i, row in enumerate(plan.cells)
        ],
        "tasks": dict(Counter(task.stage for task in open_tasks)),
        "slurm_jobs": sum(len(array.elements) for array in queued) + 1,
        "trainings": [
            {"dataset": dataset, "target": target, "steps": steps}
            for (dataset, target), steps in plan.trainings.items()
        ],
        "artifacts": {"all": len(plan.artifacts), "cached": len(cached)},
        "model_calls": {
            "to_do": [sum(w.unet_calls for w in todo), sum(w.classifier_calls for w in todo)],
            "together": list(plan.calls),
            "apart": list(plan.calls_apart),
        },
        "estimate": [vars(line) for line in lines],
    }


def todo(plan: Plan) -> list[Any]:
    """Artifacts that are not cached and that a missing record rests on."""
    wanted = set().union(*(_keys(plan, i) for i in plan.prepared if not _recorded(plan, i)), set())
    return [a for k, a in plan.artifacts.items() if k in wanted and not _is_cached(plan, k)]


def _keys(plan: Plan, number: int) -> set[str]:
    if number not in plan.prepared:
        return set()
    return {artifact.key for artifact in with_inputs(plan.prepared[number].artifacts)}


def _is_cached(plan: Plan, key: str) -> bool:
    cell = next(iter(plan.prepared.values()))
    return cell.lab.store.has(plan.artifacts[key])


def _recorded(plan: Plan, number: int) -> bool:
    return (plan.prepared[number].folder / "record.json").is_file()


def _is_open(plan: Plan, name: str) -> bool:
    return name in plan.needed


def plan_table(found: Mapping[str, Any]) -> RenderableType:
    """The dry run for people."""
    table = new_table(f"Sweep {found['name']}, on {found['device']}")
    table.add_column("cell")
    table.add_column("stages", justify="right")
    table.add_column("cached", justify="right")
    table.add_column("")
    for cell in found["cells"]:
        state = "to do"
        if cell["failed"]:
            state = f"[red]cannot be planned: {escape(cell['failed'])}"
        elif cell["waits"]:
            state = "[yellow]after training"
        elif cell["cached"]:
            state = "[green]record there"
        table.add_row(escape(cell["title"]), str(cell["stages"]), str(cell["stages_cached"]), state)
    calls = found["model_calls"]
    tasks = ", ".join(f"{count} {stage}" for stage, count in found["tasks"].items())
    total = sum(found["tasks"].values())
    lines = [
        f"tasks        {total}" + (f": {tasks}" if tasks else ""),
        *([f"             on Slurm {jobs} jobs"] if (jobs := found["slurm_jobs"]) < total else []),
        f"artifacts    {found['artifacts']['all']}, {found['artifacts']['cached']} of them cached",
        f"model calls  {calls['to_do'][0]:,} U-Net and {calls['to_do'][1]:,} classifier to do",
        f"             all cells {_both(calls['together'])}, as runs of their own "
        f"{_both(calls['apart'])}",
        f"             that is {_percent(calls, 0)} of the U-Net calls, {share(calls)} of all",
        *_estimates(found["estimate"]),
        *_trainings(found["trainings"]),
    ]
    return Group(table, Text(), Text("\n".join(lines)))


def _trainings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    told = ", ".join(f"{t['dataset']}/{t['target']} ({t['steps']:,} steps)" for t in found)
    return [f"training     {told}; not counted above, nor its cells"]


def share(calls: Mapping[str, Any]) -> str:
    """`62 %`: what a sweep takes of the model calls of as many separate runs."""
    apart = sum(calls["apart"])
    return f"{100 * sum(calls['together']) / apart:.0f} %" if apart else "–"


def _percent(calls: Mapping[str, Any], which: int) -> str:
    apart = calls["apart"][which]
    return f"{100 * calls['together'][which] / apart:.0f} %" if apart else "–"


def _both(calls: Sequence[int]) -> str:
    return f"{calls[0]:,} + {calls[1]:,}"


def _estimates(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lines:
        return ["estimate     nothing to compute"]
    found, known = [], 0.0
    for line in lines:
        what = f"{line['artifacts']} {line['kind']}"
        if line["seconds"] is None:
            found.append(f"  {what}: no earlier record")
            continue
        known += line["seconds"]
        rate = f"{1000 * line['seconds'] / line['units']:.3g} ms" if line["units"] else "–"
        found.append(
            f"  {what}: {line['seconds'] / 3600:.3g} h at {rate} for each of {line['units']:,} "
            f"{line['unit']} (from {line['earlier']} earlier)"
        )
    unit = "GPU" if lines[0]["device"].startswith("cuda") else "CPU"
    missing = any(line["seconds"] is None for line in lines)
    more = " and what has no earlier record" if missing else ""
    return [f"estimate     {known / 3600:.3g} {unit} hours{more}", *found]


def status_table(
    sweep: Sweep, statuses: Mapping[str, Status], rows: Sequence[Row]
) -> RenderableType:
    """One line for each cell, then what runs, and why something waits or failed."""
    counts = Counter(status.state for status in statuses.values())
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    cells = sum(row["state"] == "done" for row in rows)
    head = f"{sweep.name}: {cells} of {len(rows)} cells done; tasks: {told}"
    table = new_table("")
    for name in ("cell", "state", "done", "AMS %", "false %", "why"):
        table.add_column(name, justify="right" if "%" in name or name == "done" else "left")
    for cell, row in zip(sweep.manifest.cells, rows, strict=True):
        state = row["state"]
        done, total = _progress(sweep, cell.record or cell.waits, statuses)
        why = row["reason"] or ""
        if row["cause"]:
            why = f"{row['cause']}: {why}"
        table.add_row(
            escape(row["title"]),
            Text(state, style=COLOURS.get(state, "")),
            f"{done}/{total}",
            percent(row.get("ams")),
            percent(row.get("ams_heldout")),
            escape(why),
        )
    parts: list[RenderableType] = [Text(head, style="bold"), table]
    running = [s for s in statuses.values() if s.state == "running"]
    if running:
        parts.append(_running(sweep, running))
    waiting = [s for s in statuses.values() if s.state == "queued" and s.reason]
    parts += [Text(f"{s.task} is queued: {s.reason}", style="dim") for s in waiting[:10]]
    return Group(*parts)


def _progress(sweep: Sweep, name: str | None, statuses: Mapping[str, Status]) -> tuple[int, int]:
    """How many of the tasks behind a record are done, and how many there are."""
    if name is None:
        return 0, 0
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        task = waiting.pop()
        if task not in seen:
            seen.add(task)
            waiting += sweep.tasks[task].needs
    return sum(statuses[task].state == "done" for task in seen), len(seen)


def _running(sweep: Sweep, running: Sequence[Status]) -> RenderableType:
    table = new_table("")
    for name in ("running", "doing", "done", "for", "where", "try"):
        table.add_column(name)
    for status in running:
        last = status.last
        if last is None:
            table.add_row(status.task, status.reason, "", "", "", "")
            continue
        done = f"{last.done:,}/{last.total:,}" if last.total else ""
        where = f"{last.host}:{last.pid}" + (f" job {last.job}" if last.job else "")
        seconds = f"{max(0.0, time.time() - last.started):.0f} s"
        table.add_row(status.task, escape(last.doing), done, seconds, where, str(last.number))
    return table


def failures(rows: Sequence[Row]) -> list[str]:
    """Lines that name every failed cell, why, and the end of its log."""
    found = []
    for row in rows:
        if row["state"] in ("failed", "skipped"):
            found.append(f"{row['title']}: {row['cause'] or ''}: {row['reason']}")
            found += [f"    {line}" for line in row["log"][-5:]]
    return found
