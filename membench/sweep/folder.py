"""A sweep on disk: its manifest, what its workers wrote, and what has become of every task."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from membench.errors import MembenchError
from membench.files import read_json, replace_atomically
from membench.specs import explain
from membench.specs_base import Spec
from membench.store import MANIFEST as ARTIFACT
from membench.store import part_marker
from membench.sweep.specs import STAGES, Resources, SweepSpec
from membench.sweep.tasks import (
    RETRIED,
    Attempt,
    Cause,
    CellPlan,
    Product,
    Report,
    Status,
    Submitted,
    Task,
)

SCHEMA = 1
SWEEPS, MANIFEST, CODE, TASKS, CANCELLED = "sweeps", "sweep.json", "code", "tasks", "cancelled"
SUMMARY, BOARD, EXECUTOR = "summary", "board", "executor"
LOCK, SUBMITTED, GROWING = "lock", "submitted.json", "growing"
ENDLESS = 100
"""Attempts of one task, stopped ones included, after which nobody believes in progress."""
TAIL = 20
"""Lines of a log that go with a failure."""


class Manifest(Spec):
    """What was submitted: everything a worker needs besides the data sets themselves.

    file: the sweep file, absolute; what it names lies beside it. plugins: folders inside `code/`.
    data, descriptor_weights: absolute paths. code: hash of the snapshot, and the commit it was
    taken from.
    """

    schema_: int = SCHEMA
    name: str
    id: str
    created: str
    spec: SweepSpec
    file: str = ""
    executor: str
    device: str
    data: str
    plugins: tuple[str, ...] = ()
    descriptor_weights: str | None = None
    code: dict[str, Any]
    cells: tuple[CellPlan, ...]
    tasks: tuple[Task, ...]

    @property
    def asked(self) -> list[tuple[str, Resources]]:
        """Stage and resources of all tasks, also of those that are planned after a training."""
        found = [(task.stage, task.resources) for task in self.tasks]
        if any(cell.waits for cell in self.cells):
            found += [(stage, self.spec.resources_of(stage, self.device)) for stage in STAGES]
        return found


class Sweep:
    """The folder of a sweep; the results folder is where it lies, `FOLDER/../..`.

    What the manifest says is read once, and again by `refresh` after the sweep has grown.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.results = self.folder.parent.parent
        self._stamp = _stamp_of(self.folder / MANIFEST)

    @cached_property
    def manifest(self) -> Manifest:
        """Read once; raises `MembenchError` for a folder that holds no sweep."""
        path = self.folder / MANIFEST
        try:
            return Manifest.model_validate(read_json(path))
        except ValidationError as error:
            raise MembenchError(f"{path}: {explain(error)}; written by another membench") from None

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """By id, each after all that it needs."""
        return {task.id: task for task in self.manifest.tasks}

    def grow(self, manifest: Manifest) -> None:
        """Write another manifest in the place of this one, whose targets are trained now."""
        write_manifest(self.folder, manifest)
        self.refresh()

    def refresh(self) -> None:
        """Forget the manifest if the one on disk is another."""
        if self._stamp != (stamp := _stamp_of(self.folder / MANIFEST)):
            self._stamp = stamp
            for name in ("manifest", "tasks"):
                self.__dict__.pop(name, None)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def code(self) -> Path:
        """What belongs on PYTHONPATH of workers."""
        return self.folder / CODE

    def place(self, task: Task | str) -> Path:
        """The folder of one task."""
        return self.folder / TASKS / (task if isinstance(task, str) else task.id)

    def log(self, task: Task, number: int) -> Path:
        return self.place(task) / f"attempt-{number}.log"

    # -- what is there --------------------------------------------------------------------------

    def done(self, task: Task) -> bool:
        """Whether the task's product is there; nobody's word counts."""
        if task.product is None:
            return any(a.state == "done" and not a.forgiven for a in self.attempts(task))
        return product_is_there(self.results, task.product)

    def attempts(self, task: Task) -> list[Attempt]:
        """All tries so far, the last one last."""
        return _attempts(self.place(task))

    def held(self, task: Task) -> bool:
        """Whether a worker runs the task at this moment, on any machine."""
        try:
            with open(self.place(task) / LOCK) as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def needed(self) -> set[str]:
        """Tasks that the missing records rest on: those behind a product that is there are not."""
        return needed_of(self.tasks, self.done)

    @property
    def cancelled(self) -> bool:
        return (self.folder / CANCELLED).exists()

    def read_submitted(self, task: Task) -> Submitted | None:
        path = self.place(task) / SUBMITTED
        return Submitted.model_validate(read_json(path)) if path.is_file() else None

    # -- what workers and executors write -------------------------------------------------------

    @contextmanager
    def working_on(self, task: Task) -> Iterator[bool]:
        """Hold the task's lock while it runs; False if another worker does."""
        place = self.place(task)
        place.mkdir(parents=True, exist_ok=True)
        with open(place / LOCK, "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def write(self, task: Task, attempt: Attempt) -> None:
        _write(self.place(task) / f"attempt-{attempt.number}.json", attempt.model_dump(mode="json"))

    def submitted(self, task: Task, executor: str, job: str) -> None:
        """An executor queued the task as `job`."""
        place = self.place(task)
        place.mkdir(parents=True, exist_ok=True)
        note = Submitted(executor=executor, job=job, at=time.time())
        _write(place / SUBMITTED, note.model_dump(mode="json"))

    def withdraw(self, task: Task) -> None:
        """The task is not queued any more."""
        (self.place(task) / SUBMITTED).unlink(missing_ok=True)

    def close(self, task: Task, cause: Cause, reason: str) -> Attempt:
        """End the last attempt of a worker that could not say why it died.

        Without an attempt, or where the last one has ended, this is an attempt of its own: the job
        died before it came to the worker, or was refused.
        """
        attempts, now = self.attempts(task), time.time()
        last = attempts[-1] if attempts else None
        if last is None or last.state != "running":
            number = last.number + 1 if last else 1
            last = Attempt(number=number, state="running", started=now)
            self.place(task).mkdir(parents=True, exist_ok=True)
        change = {"state": "failed", "cause": cause, "reason": reason, "finished": now}
        closed = last.model_copy(update=change | {"log_tail": self.tail(task, last.number)})
        self.write(task, closed)
        return closed

    def forgive(self, task: Task) -> None:
        """Let the task be tried again as if it had never failed."""
        for attempt in self.attempts(task):
            if attempt.state == "running":  # nobody holds the lock, or it would not be retried
                attempt = self.close(task, Cause.KILLED, DIED)
            if not attempt.forgiven:
                self.write(task, attempt.model_copy(update={"forgiven": True}))

    def tail(self, task: Task, number: int, lines: int = TAIL) -> tuple[str, ...]:
        """The last lines that an attempt printed."""
        try:
            with open(self.log(task, number), "rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - 16384))
                text = stream.read().decode("utf-8", "replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-lines:])

    # -- what has become of it ------------------------------------------------------------------

    def failures(self, attempts: Iterable[Attempt]) -> int:
        """Attempts that count against `retries`: stopped ones do where they got no further."""
        count, reached = 0, 0
        for attempt in attempts:
            if attempt.forgiven or attempt.state == "done":
                continue
            further = (attempt.done or 0) > reached
            reached = max(reached, attempt.done or 0)
            count += not (attempt.state == "stopped" and further)
        return count

    def attempts_left(self, task: Task) -> bool:
        """Whether the task may be tried again, as far as its last attempt's cause allows."""
        attempts = self.attempts(task)
        return self._again(attempts)

    def _again(self, attempts: Sequence[Attempt]) -> bool:
        if not attempts or attempts[-1].forgiven:
            return True
        last = attempts[-1]
        cause = Cause.KILLED if last.state == "running" else last.cause
        if last.state != "stopped" and cause not in RETRIED:
            return False
        count = sum(not attempt.forgiven for attempt in attempts)
        return self.failures(attempts) <= self.manifest.spec.retries and count < ENDLESS

    def statuses(self, reports: Mapping[str, Report] | None = None) -> dict[str, Status]:
        """What has become of every task, by id.

        reports: what the executor's queue says; results and attempts on disk come first.
        """
        found: dict[str, Status] = {}
        needed = self.needed()
        for task in self.tasks.values():
            if task.id in needed:
                found[task.id] = self.status(task, found, (reports or {}).get(task.id))
            else:
                found[task.id] = _status(task, "done", self.attempts(task))
        return found

    def status(
        self, task: Task, before: Mapping[str, Status], report: Report | None = None
    ) -> Status:
        """What has become of one task, given what has of those `before` it."""
        attempts = self.attempts(task)
        last = attempts[-1] if attempts else None
        if self.done(task):
            return _status(task, "done", attempts)
        held = last is not None and last.state == "running" and self.held(task)
        if last is not None and last.state == "running" and not held:
            attempts = self.attempts(task)  # it may have ended while we looked
            last = attempts[-1]
        if held:
            return _status(task, "running", attempts)
        queued = self.read_submitted(task)
        ended = 0.0 if last is None else (last.finished or last.started)
        if queued is not None and (last is None or last.forgiven or queued.at > ended):
            return self._queued(task, attempts, report)
        if report is not None and report.state in ("queued", "running"):
            return _status(task, report.state, attempts, reason=report.reason)
        if last is not None and not last.forgiven:
            return self._ended(task, attempts, report)
        for need in task.needs:
            if before[need].state in ("failed", "skipped"):
                root = before[need].reason if before[need].state == "skipped" else f"{need} failed"
                return _status(task, "skipped", attempts, reason=root)
        if self.cancelled:
            return _status(task, "failed", attempts, Cause.CANCELLED, "before it began")
        ready = all(before[need].state == "done" for need in task.needs)
        ready = ready and all(
            before[other].state in ("done", "failed", "skipped") for other in task.after
        )
        return _status(task, "ready" if ready else "waiting", attempts)

    def _queued(self, task: Task, attempts: list[Attempt], report: Report | None) -> Status:
        if report is None or report.state in ("queued", "unknown"):
            return _status(task, "queued", attempts, reason=report.reason if report else "")
        return _status(task, report.state, attempts, report.cause, report.reason)

    def _ended(self, task: Task, attempts: list[Attempt], report: Report | None) -> Status:
        last = attempts[-1]
        cause, reason = last.cause, last.reason
        if last.state == "running":  # died without a word
            known = report if report is not None and report.state == "failed" else None
            cause = known.cause if known else Cause.KILLED
            reason = known.reason if known else DIED
        again = self._again(attempts) and not self.cancelled
        again = again and (last.state != "running" or cause in RETRIED)
        return _status(task, "stopped" if again else "failed", attempts, cause, reason)


DIED = "its process is gone and left no word"


def _status(
    task: Task,
    state: Any,
    attempts: Sequence[Attempt],
    cause: Cause | None = None,
    reason: str = "",
) -> Status:
    last = attempts[-1] if attempts else None
    return Status(
        task=task.id, state=state, cause=cause, reason=reason, attempts=len(attempts), last=last
    )


def needed_of(tasks: Mapping[str, Task], done: Callable[[Task], bool]) -> set[str]:
    """Ids of the tasks that missing records rest on, or that will plan such; and the board's."""
    found: set[str] = set()
    waiting = [task for task in tasks.values() if task.stage in ("plan", "record", "board")]
    while waiting:
        task = waiting.pop()
        if task.id not in found and not done(task):
            found.add(task.id)
            waiting += [tasks[need] for need in task.needs]
    return found


def product_is_there(results: Path, product: Product) -> bool:
    """Whether an artifact is whole, or its parts are, or a record or weights are written."""
    path = results / product.path
    if path.suffix in (".json", ".safetensors"):
        return path.is_file()
    if (path / ARTIFACT).is_file():
        return True
    if product.parts is None:
        return False
    partial = path.with_suffix(".partial")
    if all(part_marker(partial, i).is_file() for i in range(*product.parts)):
        return True
    return (path / ARTIFACT).is_file()  # joined between the two looks


def find_sweep(results: Path, name: str) -> Sweep:
    """The sweep of a path, a folder's name, or the newest of a sweep's name."""
    path = Path(name)
    if (path / MANIFEST).is_file():
        return Sweep(path)
    found = [p.parent for p in (results / SWEEPS).glob(f"*/{MANIFEST}")]
    exact = [p for p in found if p.name == name]
    named = exact or [p for p in found if p.name.rpartition("-")[0] == name]
    if not named:
        known = ", ".join(sorted(p.name for p in found)) or "none"
        raise MembenchError(f"no sweep named {name!r} in {results / SWEEPS}; there are: {known}")
    return Sweep(max(named, key=lambda p: (p / MANIFEST).stat().st_mtime))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    _write(folder / MANIFEST, manifest.model_dump(mode="json"))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced by another; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _attempts(place: Path) -> list[Attempt]:
    found = []
    try:
        names = [path for path in place.iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return []
    for path in names:
        if path.name.startswith("attempt-"):
            found.append(Attempt.model_validate(json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda attempt: attempt.number)


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
