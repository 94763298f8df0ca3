"""Where tasks run: the interface of executors, and how one is found by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from membench.errors import MembenchError
from membench.sweep.tasks import Report, Task

if TYPE_CHECKING:
    from rich.console import Console

    from membench.sweep.folder import Sweep

NAMES = ("inline", "local", "slurm")


class Executor(Protocol):
    """See `membench.sweep` for what each must do.

    detached: whether `start` returns while tasks still wait.
    """

    name: str
    detached: bool

    def check(self, sweep: Sweep) -> None:
        """Refuse what cannot run here; a MembenchError names the stage and the resource."""

    def start(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Run, or queue, `tasks`: none is done, and each comes after all that it needs."""

    def ask(self, sweep: Sweep, tasks: Sequence[Task]) -> Mapping[str, Report]:
        """What the queue says of `tasks`, by id; those it does not know are left out."""

    def cancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Take `tasks` out of the queue and stop those that run; the flag is set already."""


def executor(name: str, *, jobs: int | None = None, console: Console | None = None) -> Executor:
    """The executor of that name; jobs: the most tasks at a time (None: what the machine has).

    console: where an attached one tells what it does; None is silence.
    """
    if name == "inline":
        from membench.sweep.inline import Inline

        return Inline(console)
    if name == "local":
        from membench.sweep.local import Local

        return Local(jobs, console)
    if name == "slurm":
        from membench.sweep.slurm import Slurm

        return Slurm(jobs, console)
    raise MembenchError(f"--executor {name}: expected one of {', '.join(NAMES)}")
