"""What the command line shows while it works: one progress bar per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Finished units a second, since the stage began."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        rate = task.completed / elapsed if elapsed > 0 else 0.0
        return Text(f"{rate:,.1f} {task.fields['unit']}/s", style="cyan")


class Stages:
    """Bars on a terminal; elsewhere (a log, a pipe) one line at the end of each stage."""

    def __init__(self, console: Console, *, quiet: bool = False):
        self.console = console
        self.quiet = quiet

    @contextmanager
    def __call__(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if self.quiet or not self.console.is_terminal:
            yield from self._line(title, total, unit)
            return
        columns = (
            TextColumn("{task.description:<27}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, unit=unit)
            yield lambda n: progress.advance(task, n)

    def _line(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        started = time.monotonic()
        yield lambda n: None
        if not self.quiet:
            seconds = time.monotonic() - started
            line = f"{title}: {total:,} {unit} in {seconds:.1f} s"
            self.console.print(line, highlight=False, markup=False)
