"""Tasks one after the other in this process, with progress bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from membench.errors import MembenchError
from membench.sweep import worker
from membench.sweep.agenda import Agenda, Told
from membench.sweep.folder import Sweep
from membench.sweep.snapshot import describe
from membench.sweep.tasks import EXIT, Cause, Report, Task

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
            code = worker.work(sweep.folder, task.id, desk=desk, progress=progress)
            agenda.ended(task)
            if code == EXIT[Cause.CANCELLED] or worker.STOP.is_set():
                return

    def ask(self, sweep: Sweep, tasks: Sequence[Task]) -> Mapping[str, Report]:
        """There is no queue: attempts on disk say everything."""
        return {}

    def cancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """The flag is enough: the running task looks for it at every step."""
