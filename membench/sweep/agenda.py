"""What to do next, for executors that stay with their tasks: ready ones, as others end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from membench.sweep.folder import Sweep
from membench.sweep.tasks import Status, Task

SETTLED = ("done", "failed", "skipped")
Told = Callable[[Task, Status], None]


class Agenda:
    """Tasks of a sweep and what has become of them; looks at the disk where one ended."""

    def __init__(self, sweep: Sweep, tasks: Sequence[Task], told: Told | None = None):
        self.sweep = sweep
        self.told = told
        self._take(tasks)

    def _take(self, tasks: Sequence[Task]) -> None:
        self._known = set(self.sweep.tasks)
        self.statuses = self.sweep.statuses()
        self.waiting = {task.id: task for task in tasks if not self._settled(task.id)}
        self._users: dict[str, list[str]] = {}
        for task in self.waiting.values():
            for other in (*task.needs, *task.after):
                self._users.setdefault(other, []).append(task.id)

    def _settled(self, name: str) -> bool:
        return self.statuses[name].state in SETTLED

    def ready(self) -> list[Task]:
        """Tasks that can start now, in the order of the graph; also those to be gone on with."""
        return [
            task
            for task in self.waiting.values()
            if self.statuses[task.id].state in ("ready", "stopped")
        ]

    def elsewhere(self) -> list[Task]:
        """Tasks that a worker runs whom this process did not start."""
        return [t for t in self.waiting.values() if self.statuses[t.id].state == "running"]

    def left(self) -> bool:
        """Whether anything can still be run, here or by another process."""
        return bool(self.ready() or self.elsewhere())

    def started(self, task: Task) -> None:
        """Take a task off the list until `ended`."""
        del self.waiting[task.id]

    def ended(self, task: Task) -> Status:
        """Look what has become of a task; it is on the list again if it can be tried again."""
        self.waiting.pop(task.id, None)
        status = self.statuses[task.id] = self.sweep.status(task, self.statuses)
        if status.state not in SETTLED:
            self.waiting[task.id] = task
        if self.told is not None:
            self.told(task, status)
        if status.state in SETTLED:
            self._look_again(task.id)
        if task.stage == "plan" and status.state == "done":
            self._grow()
        return status

    def _grow(self) -> None:
        """Take over what a `plan` task has added; the board, too, now waits for more."""
        self.sweep.refresh()
        now, known = self.sweep.tasks, self._known
        self._take([t for name, t in now.items() if name in self.waiting or name not in known])

    def _look_again(self, name: str) -> None:
        for user in self._users.get(name, ()):
            task = self.waiting.get(user)
            if task is None or self.statuses[user].state not in ("waiting", "ready"):
                continue
            status = self.statuses[user] = self.sweep.status(task, self.statuses)
            if status.state in SETTLED:  # skipped, or made by somebody else
                del self.waiting[user]
                if self.told is not None:
                    self.told(task, status)
                self._look_again(user)
