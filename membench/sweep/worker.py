"""One task, wherever it runs: `python -m membench.sweep.worker SWEEP TASK`.

The task is found in the sweep's manifest, plugins are resolved here. What happens is written into
the sweep's folder (`membench.sweep`), so that the exit code is only a hint. With `--serve` in the
place of TASK the process takes task after task from its standard input, which saves what it costs
to load torch and a target each time.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from membench.errors import DiskFull, MembenchError
from membench.sweep.folder import CANCELLED, TAIL, Sweep
from membench.sweep.tasks import EXIT, STOPPED, Attempt, Cause, Task

if TYPE_CHECKING:
    from membench.lab import Advance, Progress
    from membench.registry import Registry
    from membench.run import Cell, Loaded
    from membench.store import Artifact

BEAT = 2.0
"""Seconds between two looks at the sweep's `cancelled`, and two notes of progress."""
clock = time.monotonic
STOP = threading.Event()
"""Set by SIGTERM and SIGUSR2: stop at the next batch boundary."""


class Stopped(BaseException):
    """The task stops at a batch boundary; cause: None for a signal."""

    def __init__(self, cause: Cause | None, reason: str):
        self.cause, self.reason = cause, reason
        super().__init__(reason)


def stop_on_signals() -> None:
    """SIGTERM and SIGUSR2 (Slurm's warning before a limit) stop the task at a batch boundary."""

    def stop(number: int, frame: FrameType | None) -> None:
        STOP.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR2, stop)


class Desk:
    """What a process keeps from one task of a sweep to the next: registry, data and targets."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    @cached_property
    def registry(self) -> Registry:
        from membench.registry import Registry

        manifest = self.sweep.manifest
        return Registry([self.sweep.code / n for n in manifest.plugins], Path(manifest.data))

    @cached_property
    def loaded(self) -> Loaded:
        from membench.run import Loaded

        return Loaded()

    def cell(self, task: Task, progress: Progress) -> Cell:
        """The cell a task belongs to; on this machine's device if the task computes there."""
        from membench.sweep.plan import prepare_cell
        from membench.sweep.specs import ON_DEVICE

        assert task.cell is not None
        manifest = self.sweep.manifest
        weights = manifest.descriptor_weights
        return prepare_cell(
            self.registry,
            self.sweep.results,
            progress,
            manifest.cells[task.cell].options,
            here=task.stage in ON_DEVICE,
            loaded=self.loaded,
            descriptor_weights=None if weights is None else Path(weights),
            search_on=search_on(task),
        )


def search_on(task: Task) -> tuple[str, ...]:
    """The GPUs that filter a search: those that were asked for `matches`."""
    gpus = task.resources.gpus if task.stage == "matches" else 0
    return tuple(f"cuda:{i}" for i in range(gpus))


def work(
    folder: Path,
    name: str,
    *,
    desk: Desk | None = None,
    progress: Progress | None = None,
    redirect: bool = False,
) -> int:
    """Run one task to its end and return its exit code (`membench.sweep.tasks.EXIT`).

    redirect: send everything printed, by C code and child processes too, to the attempt's log.
    Never raises for what goes wrong in the task: that is written into the sweep's folder.
    """
    sweep = desk.sweep if desk is not None else Sweep(folder)
    sweep.refresh()
    task = sweep.tasks.get(name)
    if task is None:
        raise MembenchError(f"{sweep.folder}: no task named {name!r}")
    while True:
        if sweep.done(task):
            return EXIT[None]
        if sweep.cancelled:
            return EXIT[Cause.CANCELLED]
        if STOP.is_set():
            return STOPPED
        with sweep.working_on(task) as mine:
            if mine:
                return _attempt(sweep, task, desk, progress, redirect)
        time.sleep(0.2)  # another worker is at it: its end is ours


def _attempt(
    sweep: Sweep, task: Task, desk: Desk | None, progress: Progress | None, redirect: bool
) -> int:
    if sweep.done(task):
        return EXIT[None]
    before = sweep.attempts(task)
    for dead in before:  # we hold the lock, so its process is gone
        if dead.state == "running":
            sweep.close(task, Cause.KILLED, "its process is gone and left no word")
    attempt = Attempt(
        number=len(before) + 1,
        state="running",
        host=socket.gethostname(),
        pid=os.getpid(),
        job=_job(),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        threads=task.resources.cpus,
        started=time.time(),
    )
    try:
        sweep.write(task, attempt)
    except OSError as error:
        print(f"membench: {sweep.place(task)}: {error}", file=sys.stderr)
        return EXIT[Cause.DISK] if _is_full(error) else EXIT[Cause.MISTAKE]
    log = sweep.log(task, attempt.number)
    watch = Watch(sweep, task, attempt, progress)
    cause: Cause | None = None
    reason, state = "", "done"
    tail: tuple[str, ...] = ()
    interrupted: BaseException | None = None
    with _logged(log) if redirect else nullcontext():
        try:
            _run(sweep, task, desk, watch)
        except Stopped as stop:
            cause, reason = stop.cause, stop.reason
            state = "failed" if cause is Cause.CANCELLED else "stopped"
        except KeyboardInterrupt as stop:
            interrupted, state, reason = stop, "stopped", "told to stop"
        except BaseException as error:  # a plugin may fail in any way at all
            state, (cause, reason) = "failed", classify(error)
            text = traceback.format_exc()
            if cause is Cause.MISTAKE:
                text = f"membench: {error}\n"
            _say(text, None if redirect else log)
            tail = tuple(text.splitlines()[-TAIL:])
    ended = {"state": state, "cause": cause, "reason": reason, "log_tail": tail}
    attempt = watch.attempt.model_copy(update=ended | {"finished": time.time()})
    with suppress(OSError):  # of a full disk the exit code tells
        sweep.write(task, attempt)
    if interrupted is not None:
        raise interrupted
    return STOPPED if state == "stopped" else EXIT[cause]


def _run(sweep: Sweep, task: Task, desk: Desk | None, watch: Watch) -> None:
    """What the task is for."""
    if task.stage == "board":
        from membench.sweep.collect import summarise

        summarise(sweep)
        return
    from membench.run import run
    from membench.store import with_inputs

    desk = desk or Desk(sweep)
    with threads(task.resources.cpus):
        if task.stage == "train":
            _train(sweep, task, desk, watch)
            return
        if task.stage == "plan":
            from membench.sweep.growth import grow

            grow(sweep, desk.registry, watch)
            return
        cell = desk.cell(task, watch)
        if task.stage == "check":
            return  # data, weights and device are there
        if task.stage == "record":
            run(cell)
            return
        wanted = [a for a in with_inputs(cell.artifacts) if a.key == task.key]
        if not wanted:
            raise MembenchError(
                f"{task.id}: the code that runs here describes another artifact than the plan; "
                "is another version of a plugin installed on this machine?"
            )
        _make(task, cell, wanted[0], watch)


def _train(sweep: Sweep, task: Task, desk: Desk, watch: Watch) -> None:
    """Train a target by its card's recipe; a stop leaves a checkpoint of the step it came at."""
    from membench.run import resolve_device
    from membench.training import train_recipe

    assert task.target is not None
    dataset, name = task.target
    card = desk.registry.card(dataset)
    recipe = card.recipe(name)
    with watch(task.title, recipe.training.last_step, "steps") as advance:
        at = 0

        def report(step: int, loss: float) -> None:
            nonlocal at
            at, before = step, at
            advance(step - before)

        train_recipe(
            desk.registry,
            card,
            name,
            sweep.results,
            recipe,
            device=resolve_device(sweep.manifest.device),
            resume=True,
            report=report,
            say=print,
        )


def _make(task: Task, cell: Cell, artifact: Artifact[Any], watch: Watch) -> None:
    store = cell.lab.store
    parts = task.product.parts if task.product is not None else None
    if parts is None:
        store.ensure(artifact)
        return
    which = range(*parts)
    with watch(task.title, len(which), "batches") as advance:
        store.make_parts(artifact, which, advance)


class Watch:
    """The progress of a task: looks for a reason to stop at every step, and notes how far it is."""

    def __init__(self, sweep: Sweep, task: Task, attempt: Attempt, shown: Progress | None):
        self.sweep, self.task, self.attempt, self.shown = sweep, task, attempt, shown
        self._began = self._looked = clock()

    @contextmanager
    def __call__(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        done = 0
        shown = nullcontext(_nothing) if self.shown is None else self.shown(title, total, unit)
        with shown as advance:

            def step(n: int) -> None:
                nonlocal done
                done += n
                advance(n)
                self._note(title, done, total)

            self._note(title, 0, total)
            yield step

    def _note(self, title: str, done: int, total: int) -> None:
        change = {"doing": title, "done": done, "total": total}
        self.attempt = self.attempt.model_copy(update=change)
        if done >= total:
            return  # all is made: to finish is quicker than to come back
        if STOP.is_set():
            raise Stopped(None, "told to stop")
        now, minutes = clock(), self.task.resources.minutes
        if minutes is not None and now - self._began > 60 * minutes:
            raise Stopped(Cause.TIME, f"stopped after {minutes:g} minutes")
        if now - self._looked < BEAT:
            return
        self._looked = now
        if (self.sweep.folder / CANCELLED).exists():
            raise Stopped(Cause.CANCELLED, "while it ran")
        with suppress(OSError):
            self.sweep.write(self.task, self.attempt)


def _nothing(n: int) -> None:
    pass


def classify(error: BaseException) -> tuple[Cause, str]:
    """The cause of a failure by its exception, and one line that says what it was."""
    line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and _is_full(error)):
        return Cause.DISK, str(error)
    if isinstance(error, MembenchError):
        return Cause.MISTAKE, str(error)
    name = type(error).__name__
    text = str(error).lower()
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return Cause.MEMORY, line
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return Cause.MEMORY, line
    if isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text):
        return Cause.MEMORY, line
    return Cause.CODE, line


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads in torch and in the libraries of numpy; no result depends on it."""
    from threadpoolctl import threadpool_limits

    from membench.diffusion.threads import torch_threads

    with torch_threads(count), threadpool_limits(count):
        yield


def _job() -> str | None:
    """Slurm's name of this job."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID")


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to `path` for a while."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with open(path, "ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        yield
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, saved in enumerate(kept, 1):
            os.dup2(saved, number)
            os.close(saved)


def _say(text: str, log: Path | None) -> None:
    with suppress(OSError):
        if log is None:
            print(text, file=sys.stderr, flush=True)
        else:
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(text)


# -- as a process -------------------------------------------------------------------------------


def serve(folder: Path, read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Run the tasks named in the lines that `read` returns until it returns nothing.

    `write` gets `CODE TASK` after each, CODE being its exit code, and nothing else: who reads it
    may wait for one line at a time.
    """
    from membench.console import Stages

    desk, progress = Desk(Sweep(folder)), Stages(Console(stderr=True))
    while name := read().strip():
        code = work(folder, name, desk=desk, progress=progress, redirect=True)
        write(f"{code} {name}\n")
        if STOP.is_set():
            return


def main(arguments: list[str]) -> int:
    """The command line of a worker."""
    stop_on_signals()
    folder, name = Path(arguments[0]), arguments[1]
    if name != "--serve":
        from membench.console import Stages

        return work(folder, name, progress=Stages(Console(stderr=True)), redirect=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the dispatcher's
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what tasks print must not be taken for an answer
    serve(folder, sys.stdin.readline, talk.write)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MembenchError as error:
        print(f"membench: {error}", file=sys.stderr)
        sys.exit(EXIT[Cause.MISTAKE])
