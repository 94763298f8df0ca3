"""What runs inside a Slurm job: a small process that starts the worker, watches it, and requeues.

The worker is a child process, so that whatever kills it (SIGKILL, a crash in C code, the kernel for
its memory) leaves somebody to write down the cause and, if the cause lies outside the code and
tries are left, to have Slurm start the job again. Signals go on to the worker, which stops at a
batch boundary; what it has made lies in the results folder: there is nothing else to checkpoint.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from membench.errors import MembenchError
from membench.files import locked
from membench.sweep.agenda import SETTLED
from membench.sweep.folder import GROWING, Sweep
from membench.sweep.slurm_commands import (
    PATIENCE,
    ask,
    is_preempted,
    known,
    outside_of_jobs,
    own_state,
)
from membench.sweep.slurm_state import ended_before
from membench.sweep.tasks import EXIT, RETRIED, STOPPED, Cause, Task

STOPS = (signal.SIGUSR2, signal.SIGTERM)
AGAIN = 1.0
"""Seconds between two reminders of a worker to stop: the first may come before it listens."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


def run(folder: str, name: str) -> NoReturn:
    """One element of an array. Leaves by `sys.exit`, past submitit and its result pickles."""
    _keep_signals()
    sweep = Sweep(Path(folder))
    with _full_disk_has_its_code():
        sys.exit(supervise(sweep, sweep.tasks[name]))


def run_last(folder: str, names: Sequence[str]) -> NoReturn:
    """The last job: queue again what may be tried again, or else make what comes after all."""
    _keep_signals()
    sweep = Sweep(Path(folder))
    with _full_disk_has_its_code():
        if not sweep.cancelled and retry(sweep, [sweep.tasks[name] for name in names]):
            sys.exit(0)
        codes = [supervise(sweep, sweep.tasks[name]) for name in names]
        sys.exit(max(codes, default=0))


@contextmanager
def _full_disk_has_its_code() -> Iterator[None]:
    """Where nothing can be written down, not even in the log, the exit code says why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            os._exit(EXIT[Cause.DISK])  # the interpreter's own exit would flush, and fail
        raise


# -- one task ------------------------------------------------------------------------------------

_received: list[int] = []
_preempted: list[str] = []
"""The job, once Slurm has said that it is being preempted."""


def _keep_signals() -> None:
    """Note the signals that say stop, in the place of submitit's handlers."""

    def note(number: int, frame: FrameType | None) -> None:
        _received.append(number)

    for number in STOPS:
        signal.signal(number, note)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def supervise(sweep: Sweep, task: Task) -> int:
    """Run one task in a process of its own; returns the job's exit code."""
    job = os.environ["SLURM_JOB_ID"]
    if sweep.done(task):
        return EXIT[None]
    if sweep.cancelled:
        return EXIT[Cause.CANCELLED]
    missing = [name for name in task.needs if not sweep.done(sweep.tasks[name])]
    if missing:
        print(f"{task.id}: {', '.join(missing)} not there; left to a later job", flush=True)
        note = sweep.read_submitted(task)
        if note is not None and note.job == job_name():
            sweep.withdraw(task)
        return EXIT[None]
    if not _account_for_the_dead(sweep, task, job):
        return 1
    if _received:
        return _stopped(sweep, task, job)
    ooms = oom_kills()
    code = _watch(_start(sweep, task), job)
    if code == STOPPED or -code in STOPS:
        return _stopped(sweep, task, job)
    if code < 0:
        cause, reason = why_it_died(-code, out_of_memory=oom_kills() > ooms)
        with suppress(OSError):  # of a full disk
            sweep.close(task, cause, reason)
    attempts = sweep.attempts(task)
    if code == EXIT[Cause.DISK] and not (attempts and attempts[-1].cause is Cause.DISK):
        with suppress(OSError):
            sweep.close(task, Cause.DISK, "no space left on the disk to note anything")
    if task.stage == "plan" and code == EXIT[None]:
        _queue_the_new(sweep)
    last = attempts[-1] if attempts else None
    if code != 0 and last is not None and last.cause in RETRIED and sweep.attempts_left(task):
        _requeue(sweep, task, job)
    return code if code >= 0 else STOPPED


def _account_for_the_dead(sweep: Sweep, task: Task, job: str) -> bool:
    """Give an attempt that a lost node or a preemption ended its cause; False: no try is left."""
    attempts = sweep.attempts(task)
    last, again = attempts[-1] if attempts else None, os.environ.get("SLURM_RESTART_COUNT", "0")
    if last is not None and last.state == "running" and not sweep.held(task):
        cause, reason = Cause.KILLED, "its process is gone and left no word"
        if again != "0":
            runs, _ = known([job_name()])
            cause, reason = ended_before(runs.get(job_name(), [])) or (cause, reason)
        sweep.close(task, cause, reason)
    elif last is not None and last.cause is Cause.CANCELLED and again != "0":
        # Slurm took the job down and up again: nobody had cancelled it.
        change = {"cause": Cause.KILLED, "reason": "ended by Slurm, which started it again"}
        sweep.write(task, last.model_copy(update=change))
    return not attempts or sweep.attempts_left(task)


def _start(sweep: Sweep, task: Task) -> subprocess.Popen[bytes]:
    """The worker, deaf to SIGUSR2 until it listens: by default the signal would end it."""
    heard = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        command = [sys.executable, "-P", "-m", "membench.sweep.worker"]
        return subprocess.Popen([*command, str(sweep.folder), task.id])
    finally:
        signal.signal(signal.SIGUSR2, heard)


def _watch(worker: subprocess.Popen[bytes], job: str) -> int:
    """Wait for the worker's end, passing signals on; its exit code, negative for a signal."""
    asked = False
    while True:
        try:
            return worker.wait(AGAIN if _received else 0.2)
        except subprocess.TimeoutExpired:
            if _received:
                worker.send_signal(signal.SIGUSR2)
                if not asked:
                    asked = True
                    _was_preempted(job)


def _was_preempted(job: str) -> bool:
    """Whether the signal was a preemption's.

    To be asked as soon as it comes, and again at the end: the controller forgets it when the grace
    time is over and the job is back in the queue.
    """
    if not _preempted and is_preempted(job):
        _preempted.append(job)
    return bool(_preempted)


def _stopped(sweep: Sweep, task: Task, job: str) -> int:
    """The worker stopped at a batch boundary: by scancel for good, else the job goes on later."""
    attempts = sweep.attempts(task)
    last = attempts[-1] if attempts and attempts[-1].state == "stopped" else None
    if sweep.cancelled or _is_cancelled(job):
        reason = "with its sweep" if sweep.cancelled else f"job {job_name()} was cancelled"
        if last is None:
            sweep.close(task, Cause.CANCELLED, reason)
        else:
            change = {"state": "failed", "cause": Cause.CANCELLED, "reason": reason}
            sweep.write(task, last.model_copy(update=change))
        return EXIT[Cause.CANCELLED]
    if last is not None:
        preempted = _was_preempted(job)
        reason = "preempted" if preempted else "stopped before Slurm's time limit"
        cause = Cause.KILLED if preempted else Cause.TIME
        sweep.write(task, last.model_copy(update={"cause": cause, "reason": reason}))
    if sweep.attempts_left(task):
        _requeue(sweep, task, job)
    return STOPPED


def _is_cancelled(job: str) -> bool:
    """Whether somebody has ended this job for good: Slurm is ending it, but gave no warning.

    A job that is warned of its limit, or of a preemption, runs on for a while; after that, Slurm
    ends it, too.
    """
    ending = own_state(job) in ("CANCELLED", "COMPLETING")
    return ending and signal.SIGUSR2 not in _received and not _was_preempted(job)


def _requeue(sweep: Sweep, task: Task, job: str) -> None:
    """Have Slurm start this job again; where it will not, the last job queues the task anew."""
    try:
        ask(["scontrol", "requeue", job], patience=PATIENCE)
        sweep.submitted(task, "slurm", job_name())
        print(f"{task.id}: job {job_name()} is queued again", flush=True)
    except MembenchError as error:
        print(f"{task.id}: {error}", flush=True)


def why_it_died(number: int, *, out_of_memory: bool) -> tuple[Cause, str]:
    """The cause of a worker's end by signal `number`."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL and out_of_memory:
        return Cause.MEMORY, "killed by the kernel, out of memory; ask for more"
    if number in CRASHES:
        return Cause.CODE, f"crashed by {name}"
    return Cause.KILLED, f"killed by {name}"


def oom_kills() -> int:
    """How many processes of this job the kernel has killed for their memory, where it tells."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":  # cgroup v1
            path = Path(f"/sys/fs/cgroup/memory{place}/memory.oom_control")
        elif not controllers:
            path = Path(f"/sys/fs/cgroup{place}/memory.events")
        else:
            continue
        with suppress(OSError, ValueError, KeyError):
            return int(dict(row.split() for row in path.read_text().splitlines())["oom_kill"])
    return 0


def job_name() -> str:
    """As submitit, sacct and squeue name this job: `7` or `7_0`."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is None:
        return os.environ["SLURM_JOB_ID"]
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _queue_the_new(sweep: Sweep) -> None:
    """Queue what a plan has added; what waits for its end already stays in the queue."""
    from membench.sweep.slurm import Slurm

    slurm = Slurm()
    with locked(sweep.folder / GROWING):
        sweep.refresh()
        open_ = [task for task in sweep.tasks.values() if not sweep.done(task)]
        statuses = sweep.statuses(slurm.ask(sweep, open_))
        tasks = [task for task in open_ if statuses[task.id].state not in SETTLED]
        with outside_of_jobs():
            slurm.start(sweep, tasks)


# -- the last job --------------------------------------------------------------------------------


def retry(sweep: Sweep, last: Sequence[Task]) -> bool:
    """Queue again what may be tried again, and another last job; False: nothing is left."""
    from membench.sweep.slurm import Slurm

    slurm, names = Slurm(), {task.id for task in last}
    tasks = [task for task in sweep.tasks.values() if task.id not in names]
    waiting = [task for task in tasks if not sweep.done(task)]
    reports = slurm.ask(sweep, waiting)
    for task in waiting:  # what jobs did not live to write down themselves
        report, note = reports.get(task.id), sweep.read_submitted(task)
        if report is None or report.state != "failed" or note is None or sweep.held(task):
            continue
        attempts = sweep.attempts(task)
        ended = attempts[-1].finished if attempts else None
        if ended is None or ended < note.at:
            sweep.close(task, report.cause or Cause.KILLED, report.reason)
    statuses = sweep.statuses(slurm.ask(sweep, waiting))
    again = [t for t in waiting if statuses[t.id].state in ("stopped", "ready", "waiting")]
    if not any(statuses[task.id].state in ("stopped", "ready") for task in again):
        return False
    for task in (*again, *last):
        sweep.withdraw(task)
    print(f"queued again: {', '.join(task.id for task in again)}", flush=True)
    with outside_of_jobs():
        slurm.start(sweep, [*again, *last])
    return True
