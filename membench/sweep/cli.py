"""`membench sweep`, `status`, `logs`, `retry`, `cancel` and `collect`: parse, call, print."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from membench.errors import MembenchError
from membench.options import AsJson, Results

if TYPE_CHECKING:
    from rich.console import Console

    from membench.sweep.executor import Executor
    from membench.sweep.folder import Sweep
    from membench.sweep.plan import Plan
    from membench.sweep.tasks import Status, Task

Name = Annotated[str, typer.Argument(metavar="SWEEP", help="Its folder, or its name in RESULTS.")]
Where = Annotated[
    str | None,
    typer.Option("--executor", help="inline, local or slurm [default: the file's, then local]"),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Tasks at a time [default: one a GPU, else the cores]"),
]


def register(app: typer.Typer) -> None:
    """Add the commands of sweeps to the program."""
    for command in (sweep, status, logs, retry, cancel, collect):
        app.command()(command)


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep file; `membench new sweep` writes one.")],
    executor: Where = None,
    jobs: Jobs = None,
    results: Results = Path("results"),
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of prepared data sets [default: the file's, then "
                     "$MEMBENCH_DATA, else data]"),
    ] = None,
    plugins: Annotated[
        list[Path] | None,
        typer.Option("--plugins", help="Folder with your own plugins, besides the file's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, jobs, calls and hours only.")
    ] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run every cell of a sweep file; what they share is computed once. Run it again to go on.

    Example: `membench sweep fashion.toml --dry-run`

    Example: `membench sweep fashion.toml --executor local --jobs 2`
    """
    from rich.console import Console

    from membench.console import Stages
    from membench.registry import Registry
    from membench.sweep.specs import load_sweep

    spec = load_sweep(file)
    where = executor or spec.executor
    home = file.resolve().parent
    folders = [home / folder for folder in spec.plugins] + list(plugins or ())
    prepared = data or (None if spec.data is None else home / spec.data)
    registry = Registry(folders, prepared)
    from membench.sweep.executor import executor as named
    from membench.sweep.plan import plan as make

    console = Console(stderr=as_json)
    runner = named(where, jobs=jobs, console=None if as_json else console)
    plan = make(
        spec, file, registry, results.resolve(), Stages(console, quiet=True), executor=where
    )
    if dry_run:
        _dry_run(plan, results, console, as_json)
        return
    from membench.sweep.dispatch import create

    made, new = create(plan, file, registry, results, where)
    if not as_json:
        verb = "" if new else "; it goes on"
        console.print(f"sweep   {made.folder}{verb}", highlight=False, soft_wrap=True, markup=False)
    _go(made, runner, console, as_json)


def _dry_run(plan: Plan, results: Path, console: Console, as_json: bool) -> None:
    from membench.sweep import show
    from membench.sweep.estimate import estimate

    found = show.dry_run(plan, estimate(results, show.todo(plan), plan.device))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(show.plan_table(found))


def _go(
    made: Sweep, runner: Executor, console: Console, as_json: bool, *, failed: bool = False
) -> None:
    """Start or go on, then say what came of it; exit code 1 where a cell failed."""
    from membench.sweep.dispatch import go

    if hasattr(runner, "told") and not as_json:
        runner.told = _teller(console, made)
    with _interruptible(made):
        started = go(made, runner, failed=failed)
    if runner.detached and started:
        if as_json:
            print(json.dumps({"sweep": str(made.folder), "started": [t.id for t in started]}))
        else:
            console.print(f"queued  {len(started)} tasks; look: membench status {made.folder}")
        return
    _report(made, console, as_json)


def _teller(console: Console, made: Sweep) -> Any:
    """Prints a line for each task that ended."""
    count = 0

    def told(task: Task, status: Status) -> None:
        nonlocal count
        count += status.state in ("done", "failed", "skipped")
        last = status.last
        took = f" in {last.finished - last.started:.1f} s" if last and last.finished else ""
        line = f"[{count}/{len(made.tasks)}] {task.title}: {status.state}"
        if status.state == "done":
            line += took
        elif status.state == "skipped":
            line += f", not run, because {status.reason}"
        else:
            line += f", {status.cause}: {status.reason}" if status.cause else f", {status.reason}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return told


@contextmanager
def _interruptible(made: Sweep) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR2 end a dispatcher in order, and it says how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"membench: interrupted; go on with the same command, or: membench retry {made.folder}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(made: Sweep, console: Console, as_json: bool) -> None:
    from membench.sweep import show
    from membench.sweep.collect import rows

    statuses = made.statuses()
    found = rows(made, statuses)
    bad = [row for row in found if row["state"] != "done"]
    if as_json:
        print(json.dumps({"sweep": str(made.folder), "rows": found}, indent=1))
    else:
        console.print(show.status_table(made, statuses, found))
        for line in show.failures(found):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if (made.folder / "summary.csv").is_file():
            print(f"summary {made.folder / 'summary.csv'}")
    if bad:
        raise typer.Exit(1)


def status(
    name: Name,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until nothing runs.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Between two looks.")] = 2.0,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show what has become of a sweep's cells and tasks, from any machine that sees its folder.

    Example: `membench status results/sweeps/fashion-1a2b3c4d --watch`
    """
    from rich.console import Console
    from rich.live import Live

    from membench.sweep import show
    from membench.sweep.collect import rows
    from membench.sweep.dispatch import asked, last_executor
    from membench.sweep.executor import executor
    from membench.sweep.folder import find_sweep

    made = find_sweep(results, name)
    runner = executor(last_executor(made))

    def look() -> tuple[dict[str, Status], list[dict[str, Any]]]:
        made.refresh()
        found = asked(made, runner)
        return found, rows(made, found)

    statuses, cells = look()
    if as_json:
        tasks = [s.model_dump(mode="json") for s in statuses.values()]
        print(json.dumps({"sweep": made.name, "cells": cells, "tasks": tasks}, indent=1))
        return
    console = Console()
    if not watch:
        console.print(show.status_table(made, statuses, cells))
        return
    try:
        with Live(show.status_table(made, statuses, cells), console=console) as live:
            while any(s.state not in ("done", "failed", "skipped") for s in statuses.values()):
                time.sleep(seconds)
                statuses, cells = look()
                live.update(show.status_table(made, statuses, cells))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def logs(
    name: Name,
    task: Annotated[
        str | None, typer.Argument(help="Task, or the start of its name [default: what failed]")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines from the end of each log.")] = 40,
    results: Results = Path("results"),
) -> None:
    """Print the logs of a task's attempts; without a task, of everything that failed.

    Example: `membench logs fashion images-1a2b`
    """
    from membench.sweep.folder import find_sweep

    made = find_sweep(results, name)
    statuses = made.statuses()
    if task is None:
        chosen = [made.tasks[s.task] for s in statuses.values() if s.state in ("failed", "stopped")]
        if not chosen:
            print(f"{made.name}: nothing failed; name a task to see its log")
    else:
        chosen = [t for t in made.tasks.values() if t.id.startswith(task)]
        if not chosen:
            from membench.registry import unknown

            raise unknown(f"task of {made.name}", task, made.tasks)
    for one in chosen:
        for attempt in made.attempts(one):
            why = f", {attempt.cause}: {attempt.reason}" if attempt.cause else ""
            print(f"== {one.id}, attempt {attempt.number} on {attempt.host}: {attempt.state}{why}")
            found = made.tail(one, attempt.number, lines) or attempt.log_tail
            if found:
                print("\n".join(found))


def retry(
    name: Name,
    failed: Annotated[
        bool, typer.Option("--failed", help="Also what failed by an error in code or a mistake.")
    ] = False,
    executor: Where = None,
    jobs: Jobs = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Go on with a sweep: everything without a result, with the code as it was submitted.

    Example: `membench retry fashion --failed`
    """
    from rich.console import Console

    from membench.sweep.dispatch import last_executor
    from membench.sweep.executor import executor as named
    from membench.sweep.folder import find_sweep

    made = find_sweep(results, name)
    console = Console(stderr=as_json)
    runner = named(executor or last_executor(made), jobs=jobs, console=None if as_json else console)
    _go(made, runner, console, as_json, failed=failed)


def cancel(name: Name, results: Results = Path("results")) -> None:
    """Stop a sweep: nothing more starts, what runs stops at a batch boundary; `retry` goes on.

    Example: `membench cancel fashion`
    """
    from membench.sweep.dispatch import cancel as stop
    from membench.sweep.dispatch import last_executor
    from membench.sweep.executor import executor
    from membench.sweep.folder import find_sweep

    made = find_sweep(results, name)
    tasks = stop(made, executor(last_executor(made)))
    print(f"{made.name}: cancelled {len(tasks)} tasks; go on with: membench retry {made.folder}")


def collect(
    name: Name,
    folder: Annotated[
        Path, typer.Option("--dir", help="Folder of the boards and their records/.")
    ] = Path("leaderboards"),
    results: Results = Path("results"),
) -> None:
    """Verify a sweep's records, put them beside the boards, build these, and name what is missing.

    Example: `membench collect fashion --dir leaderboards`
    """
    from membench.sweep.collect import collect as gather
    from membench.sweep.collect import summarise
    from membench.sweep.folder import find_sweep

    made = find_sweep(results, name)
    written, missing = gather(made, folder)
    print(summarise(made))
    for path in written:
        print(os.fspath(path))
    for row in missing:
        print(f"missing: {row['title']}: {row['reason'] or row['state']}")
    if any(row["state"] != "done" for row in missing):
        raise MembenchError(
            f"{made.name}: {len(missing)} of {len(made.manifest.cells)} cells missing"
        )
