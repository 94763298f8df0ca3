"""Tasks one after the other in this process, with progress bars."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from membench.errors import MembenchError
from membench.sweep import worker
from membench.sweep.agenda import Agenda, Told
from membench.sweep.folder import Sweep
from membench.sweep.snapshot import describe
from membench.sweep.tasks import EXIT, STOPPED, Cause, Report, Task

if TYPE_CHECKING:
    from rich.console import Console


class Inline:
    """Needs no other process; where that crashes, the sweep can be gone on with."""

    name, detached = "inline", False

    def __init__(self, console: Console | None = None, told: Told | None = None):
        self.console, self.told = console, told

    def check(self, sweep: Sweep) -> None:
        """This process must run the code that was submitted."""
        manifest = sweep.manifest
        plugins = [sweep.code / name for name in manifest.plugins]
        if describe(plugins)["sha256"] != manifest.code["sha256"]:
            raise MembenchError(
                f"{sweep.name}: the code has changed since this sweep was submitted; run "
                "`membench sweep FILE` again (what is finished is kept), or use --executor local, "
                "whose workers run the code of then"
            )

    def start(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Run tasks until none is left that can be; KeyboardInterrupt leaves the rest for later."""
        from membench.console import Stages

        agenda = Agenda(sweep, tasks, self.told)
        desk = worker.Desk(sweep)
        progress = None if self.console is None else Stages(self.console)
        while ready := agenda.ready() or agenda.elsewhere():
            task = ready[0]
            agenda.started(task)
            with _time_limit(task.resources.minutes) as limit:
                code = worker.work(sweep.folder, task.id, desk=desk, progress=progress)
            if code == STOPPED and limit.is_set():
                note_time_limit(sweep, task)
            agenda.ended(task)
            if code == EXIT[Cause.CANCELLED]:
                return

    def ask(self, sweep: Sweep, tasks: Sequence[Task]) -> Mapping[str, Report]:
        """There is no queue: attempts on disk say everything."""
        return {}

    def cancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """The flag is enough: the running task looks for it at every step."""


def note_time_limit(sweep: Sweep, task: Task) -> None:
    """Write into the last attempt that its time was up."""
    last = sweep.attempts(task)[-1]
    reason = f"stopped after {task.resources.minutes:g} minutes"
    sweep.write(task, last.model_copy(update={"cause": Cause.TIME, "reason": reason}))


@contextmanager
def _time_limit(minutes: float | None) -> Iterator[threading.Event]:
    """Tell the running task to stop at a batch boundary after so long; the event says it was."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        worker.STOP.set()

    timer = threading.Timer(60 * (minutes or 0), stop)
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        if over.is_set():
            worker.STOP.clear()
