"""Tasks in processes of this machine: one for each GPU, else as many as there are cores.

Workers stay (`membench.sweep.worker --serve`) and take task after task, since to load torch takes
longer than many a task. A worker that dies, fails or runs into a time limit is replaced.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from membench.errors import MembenchError
from membench.sweep.agenda import Agenda, Told
from membench.sweep.folder import Sweep
from membench.sweep.oom import oom_kills
from membench.sweep.specs import Resources
from membench.sweep.tasks import EXIT, Cause, Report, Task

if TYPE_CHECKING:
    from rich.console import Console

GRACE = 30.0
"""Seconds from the request to stop at a batch boundary to SIGKILL."""
LOOK = 1.0
"""Seconds between looks at limits, at `cancelled`, and at tasks of other dispatchers."""
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")
WORKERS = "workers"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """GiB of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def gpus() -> tuple[str, ...]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name.strip())
    import torch

    return tuple(str(i) for i in range(torch.cuda.device_count()))


@dataclass
class Seat:
    """A worker, what it has of the machine, and the task it runs, if any.

    asked: when it was told to stop. late: killed because its time was up.
    """

    process: subprocess.Popen[str]
    cpus: int
    gpus: tuple[str, ...]
    log: Path
    ooms: int
    task: Task | None = None
    since: float = 0.0
    asked: float | None = None
    late: bool = False

    def stop(self) -> None:
        """Ask it to stop at the next batch boundary."""
        if self.asked is None:
            self.asked = time.monotonic()
        with suppress(ProcessLookupError):
            self.process.terminate()

    @property
    def pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout


class Local:
    """jobs: the most tasks at a time; None: one for each GPU, else what the cores are for."""

    name, detached = "local", False

    def __init__(
        self, jobs: int | None = None, console: Console | None = None, told: Told | None = None
    ):
        self.jobs, self.told = jobs, told

    def check(self, sweep: Sweep) -> None:
        """No task may ask for more than the machine has."""
        have, room, found = cores(), memory(), None
        for stage, ask in sweep.manifest.asked:
            if ask.cpus > have:
                raise MembenchError(
                    f"{sweep.name}: resources.{stage}.cpus: {ask.cpus}, this machine has {have}"
                )
            if ask.memory is not None and ask.memory > room:
                raise MembenchError(
                    f"{sweep.name}: resources.{stage}.memory: {ask.memory:g} GiB, this machine has "
                    f"{room:.4g}"
                )
            if ask.gpus:
                found = gpus() if found is None else found
                if ask.gpus > len(found):
                    raise MembenchError(
                        f"{sweep.name}: resources.{stage}.gpus: {ask.gpus}, this machine has "
                        f"{len(found)}"
                    )

    def start(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Run tasks until none is left that can be; KeyboardInterrupt leaves the rest for later."""
        pool = Pool(sweep, Agenda(sweep, tasks, self.told), self.jobs)
        try:
            pool.run()
        except KeyboardInterrupt:
            pool.stop_all()
            raise
        finally:
            pool.close()

    def ask(self, sweep: Sweep, tasks: Sequence[Task]) -> Mapping[str, Report]:
        """There is no queue: attempts on disk say everything."""
        return {}

    def cancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """The flag is enough: dispatcher and workers look for it."""


@dataclass
class Pool:
    """Workers, and what of the machine is free."""

    sweep: Sweep
    agenda: Agenda
    jobs: int | None
    seats: list[Seat] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _looked: float = 0.0
    _number: int = 0

    def __post_init__(self) -> None:
        asked = [resources for _, resources in self.sweep.manifest.asked]
        wanted = max((resources.cpus for resources in asked), default=1)
        self.cores = max(cores(), (self.jobs or 0) * wanted)
        self.gpus = gpus() if any(resources.gpus for resources in asked) else ()

    def run(self) -> None:
        """Hand tasks out until none is left that can be run."""
        while True:
            if not self.sweep.cancelled:
                self._hand_out()
            busy = [seat for seat in self.seats if seat.task is not None]
            if not busy and (self.sweep.cancelled or not self.agenda.left()):
                return
            self._listen(LOOK)
            if time.monotonic() - self._looked >= LOOK:
                self._looked = time.monotonic()
                self._look()

    # -- handing out ----------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for task in self.agenda.ready():
            if not self._may(task):
                continue
            seat = self._seat(task.resources)
            if seat is None:
                continue
            self.agenda.started(task)
            seat.task, seat.since = task, time.monotonic()
            with suppress(BrokenPipeError):  # it died just now: `_listen` will see that
                seat.pipes[0].write(f"{task.id}\n")
                seat.pipes[0].flush()

    def _may(self, task: Task) -> bool:
        """Whether the caps on tasks at a time, and the memory they ask for, allow this one."""
        running = [seat.task for seat in self.seats if seat.task is not None]
        caps = [cap for cap in (self.jobs, self.sweep.manifest.spec.concurrency) if cap is not None]
        if len(running) >= min(caps, default=len(running) + 1):
            return False
        if running and sum(t.resources.memory or 0.0 for t in (*running, task)) > memory():
            return False
        same = sum(other.stage == task.stage for other in running)
        return task.resources.concurrency is None or same < task.resources.concurrency

    def _seat(self, ask: Resources) -> Seat | None:
        """An idle worker with these cores and GPUs, else a new one if there is room."""
        idle = [seat for seat in self.seats if seat.task is None and seat.asked is None]
        for seat in idle:
            if seat.cpus == ask.cpus and len(seat.gpus) == ask.gpus:
                return seat
        taken = [seat for seat in self.seats if seat not in idle]
        busy_cpus = sum(seat.cpus for seat in taken)
        busy_gpus = {name for seat in taken for name in seat.gpus}
        free = [name for name in self.gpus if name not in busy_gpus]
        if busy_cpus + ask.cpus > self.cores and taken and not ask.gpus:
            return None
        if len(free) < ask.gpus:
            return None
        for seat in idle:  # of another kind: it makes room
            over = sum(s.cpus for s in self.seats) + ask.cpus > self.cores
            if over or set(seat.gpus) & set(free[: ask.gpus]):
                self._dismiss(seat)
        return self._hire(ask.cpus, tuple(free[: ask.gpus]))

    def _hire(self, cpus: int, names: tuple[str, ...]) -> Seat:
        folder = self.sweep.folder / WORKERS
        folder.mkdir(exist_ok=True)
        self._number += 1
        log = folder / f"{os.getpid()}-{self._number}.log"
        paths = [str(self.sweep.code), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(cpus),
            "CUDA_VISIBLE_DEVICES": ",".join(names),
        }
        command = [sys.executable, "-P", "-m", "membench.sweep.worker"]
        with open(log, "ab") as stream:
            process = subprocess.Popen(
                [*command, str(self.sweep.folder), "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
                bufsize=1,
                start_new_session=True,  # Ctrl-C is ours; we tell the workers
            )
        seat = Seat(process, cpus, names, log, oom_kills())
        self.seats.append(seat)
        self.selector.register(seat.pipes[1], selectors.EVENT_READ, seat)
        return seat

    def _dismiss(self, seat: Seat) -> None:
        """Let an idle worker go."""
        self.seats.remove(seat)
        self.selector.unregister(seat.pipes[1])
        for pipe in seat.pipes:
            with suppress(OSError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            seat.process.wait(10)
        if seat.process.poll() is None:
            seat.process.kill()
            seat.process.wait()
        if seat.log.is_file() and not seat.log.stat().st_size:
            seat.log.unlink()

    # -- listening ------------------------------------------------------------------------------

    def _listen(self, seconds: float) -> None:
        if not self.seats:
            time.sleep(seconds)
            return
        for key, _ in self.selector.select(seconds):
            seat: Seat = key.data
            line = seat.pipes[1].readline()
            if not line:
                self._died(seat)
            else:
                self._ended(seat, int(line.split()[0]))

    def _ended(self, seat: Seat, code: int) -> None:
        task, seat.task = seat.task, None
        assert task is not None
        if code == EXIT[Cause.DISK] and not self.sweep.attempts(task):
            self._close(task, Cause.DISK, "no space left on the disk to note anything")
        if code != 0:  # whatever it was, the next task gets a fresh process
            self._dismiss(seat)
        self.agenda.ended(task)

    def _died(self, seat: Seat) -> None:
        code = seat.process.wait()
        task, seat.task = seat.task, None
        words = seat.log.read_text("utf-8", "replace").splitlines() if seat.log.is_file() else []
        self._dismiss(seat)
        if task is None:
            return
        cause, reason = why_it_died(code, words, more_ooms=oom_kills() > seat.ooms)
        if seat.late:
            cause, reason = Cause.TIME, f"killed {GRACE:g} s after its time was up, within a batch"
        elif self.sweep.cancelled:
            cause, reason = Cause.CANCELLED, "while it ran"
        attempts = self.sweep.attempts(task)
        if not attempts or attempts[-1].state == "running" or cause is not Cause.CODE:
            self._close(task, cause, reason)
        self.agenda.ended(task)

    def _close(self, task: Task, cause: Cause, reason: str) -> None:
        with suppress(OSError):  # of a full disk
            self.sweep.close(task, cause, reason)

    # -- limits ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Time limits, cancelling, and tasks that workers of another dispatcher run."""
        now = time.monotonic()
        cancelled = self.sweep.cancelled
        for seat in self.seats:
            if seat.task is None:
                continue
            minutes = seat.task.resources.minutes
            if minutes is not None and now - seat.since > 60 * minutes + GRACE:
                seat.late = True  # it looks at the clock itself, but not within a batch
                seat.process.kill()
            if cancelled and seat.asked is None:
                seat.stop()
            if seat.asked is not None and now - seat.asked > GRACE:
                seat.process.kill()
        for task in self.agenda.elsewhere():
            if not self.sweep.held(task):
                self.agenda.ended(task)

    def stop_all(self) -> None:
        """Let running tasks come to a batch boundary, and wait for that; a second Ctrl-C kills."""
        with suppress(KeyboardInterrupt):
            for seat in self.seats:
                if seat.task is not None:
                    seat.stop()
            while any(seat.task is not None for seat in self.seats):
                self._listen(0.2)
                self._look()

    def close(self) -> None:
        """Let all workers go; one that still runs something is killed."""
        for seat in list(self.seats):
            if seat.task is not None:
                seat.process.kill()
            self._dismiss(seat)
        self.selector.close()


def why_it_died(code: int, words: Sequence[str], *, more_ooms: bool) -> tuple[Cause, str]:
    """The cause of a worker's end by its exit code, what it said last, and the kernel's count."""
    last = f": {words[-1]}" if words else ""
    if code >= 0:
        return Cause.CODE, f"its process left with code {code}{last}"
    name = signal.Signals(-code).name
    if name == "SIGKILL" and more_ooms:
        return Cause.MEMORY, "killed by the kernel, out of memory"
    if name in CRASHES:
        return Cause.CODE, f"crashed by {name}{last}"
    return Cause.KILLED, f"killed by {name}"
