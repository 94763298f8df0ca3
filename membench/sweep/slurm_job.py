"""What runs inside a Slurm job: a small process that starts a worker, watches it, and requeues.

A job does one task or several, one after the other, by the same worker as long as nothing fails.
The worker is a child process, so that whatever kills it (SIGKILL, a crash in C code, the kernel for
its memory) leaves somebody to write down the cause and, if the cause lies outside the code and
tries are left, to have Slurm start the job again. Signals go on to the worker, which stops at a
batch boundary; what it has made lies in the results folder: there is nothing else to checkpoint.
"""

from __future__ import annotations

import errno
import os
import select
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
from membench.sweep.oom import oom_kills
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
GOODBYE = 10.0
"""Seconds that an idle worker has to end."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


def run(folder: str, names: Sequence[str]) -> NoReturn:
    """One element of an array. Leaves by `sys.exit`, past submitit and its result pickles."""
    _keep_signals()
    sweep = Sweep(Path(folder))
    with _full_disk_has_its_code():
        sys.exit(one_by_one(sweep, [sweep.tasks[name] for name in names]))


def run_last(folder: str, names: Sequence[str]) -> NoReturn:
    """The last job: queue again what may be tried again, or else make what comes after all."""
    _keep_signals()
    sweep = Sweep(Path(folder))
    with _full_disk_has_its_code():
        if not sweep.cancelled and retry(sweep, [sweep.tasks[name] for name in names]):
            sys.exit(0)
        sys.exit(one_by_one(sweep, [sweep.tasks[name] for name in names]))


@contextmanager
def _full_disk_has_its_code() -> Iterator[None]:
    """Where nothing can be written down, not even in the log, the exit code says why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            os._exit(EXIT[Cause.DISK])  # the interpreter's own exit would flush, and fail
        raise


# -- the tasks of a job --------------------------------------------------------------------------

_received: list[int] = []
_preempted: list[str] = []
"""The job, once Slurm has said that it is being preempted."""
_cancelled: dict[str, bool] = {}
"""Whether the job was ended for good, once that was asked."""


def _keep_signals() -> None:
    """Note the signals that say stop, in the place of submitit's handlers."""

    def note(number: int, frame: FrameType | None) -> None:
        _received.append(number)

    for number in STOPS:
        signal.signal(number, note)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def one_by_one(sweep: Sweep, tasks: Sequence[Task]) -> int:
    """Run tasks, and have Slurm start this job again for those that may be tried again.

    Returns the job's exit code: that of the first task that was not done.
    """
    job = os.environ["SLURM_JOB_ID"]
    worker, codes, again = Worker(sweep), [], []
    try:
        for task in tasks:
            code, more = supervise(worker, task, job)
            codes.append(code)
            if more:
                again.append(task)
    finally:
        worker.dismiss()
    if again:
        _requeue(sweep, again, job)
    return next((code for code in codes if code), EXIT[None])


def supervise(worker: Worker, task: Task, job: str) -> tuple[int, bool]:
    """Have the worker run one task; returns its exit code, and whether it may be tried again."""
    sweep = worker.sweep
    if sweep.done(task):
        return EXIT[None], False
    if sweep.cancelled:
        return EXIT[Cause.CANCELLED], False
    missing = [name for name in task.needs if not sweep.done(sweep.tasks[name])]
    if missing:
        print(f"{task.id}: {', '.join(missing)} not there; left to a later job", flush=True)
        note = sweep.read_submitted(task)
        if note is not None and note.job == job_name():
            sweep.withdraw(task)
        return EXIT[None], False
    if not _account_for_the_dead(sweep, task):
        return EXIT[Cause.CODE], False
    if _received:
        return _stopped(sweep, task, job)
    ooms = oom_kills()
    code = worker.run(task, job)
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
    more = code != 0 and last is not None and last.cause in RETRIED and sweep.attempts_left(task)
    return (code if code >= 0 else STOPPED), more


def _account_for_the_dead(sweep: Sweep, task: Task) -> bool:
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


class Worker:
    """The process that runs a job's tasks; a fresh one after whatever did not end well."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.process: subprocess.Popen[str] | None = None

    def run(self, task: Task, job: str) -> int:
        """The task's exit code, or minus the signal that ended the process; passes signals on."""
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it died just now
            process.stdin.write(f"{task.id}\n")
            process.stdin.flush()
        asked = False
        while not select.select([process.stdout], [], [], AGAIN if _received else 0.2)[0]:
            if _received:
                process.send_signal(signal.SIGUSR2)
                if not asked:
                    asked = True
                    _was_preempted(job)
        line = process.stdout.readline()
        code = int(line.split()[0]) if line else process.wait()
        if code != EXIT[None]:
            self.dismiss()
        return code

    def _start(self) -> subprocess.Popen[str]:
        """Deaf to SIGUSR2 until it listens: by default the signal would end it."""
        heard = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        try:
            command = [sys.executable, "-P", "-m", "membench.sweep.worker"]
            self.process = subprocess.Popen(
                [*command, str(self.sweep.folder), "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGUSR2, heard)
        return self.process

    def dismiss(self) -> None:
        """Let the process go: it ends when nobody has another task for it."""
        process, self.process = self.process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe and pipe.close()
        try:
            process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _was_preempted(job: str) -> bool:
    """Whether the signal was a preemption's.

    To be asked as soon as it comes, and again at the end: the controller forgets it when the grace
    time is over and the job is back in the queue.
    """
    if not _preempted and is_preempted(job):
        _preempted.append(job)
    return bool(_preempted)


def _stopped(sweep: Sweep, task: Task, job: str) -> tuple[int, bool]:
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
        return EXIT[Cause.CANCELLED], False
    if last is not None:
        preempted = _was_preempted(job)
        reason = "preempted" if preempted else "stopped before Slurm's time limit"
        cause = Cause.KILLED if preempted else Cause.TIME
        sweep.write(task, last.model_copy(update={"cause": cause, "reason": reason}))
    return STOPPED, sweep.attempts_left(task)


def _is_cancelled(job: str) -> bool:
    """Whether somebody has ended this job for good: Slurm is ending it, but gave no warning.

    A job that is warned of its limit, or of a preemption, runs on for a while; after that, Slurm
    ends it, too.
    """
    if job not in _cancelled:
        ending = own_state(job) in ("CANCELLED", "COMPLETING")
        _cancelled[job] = ending and signal.SIGUSR2 not in _received and not _was_preempted(job)
    return _cancelled[job]


def _requeue(sweep: Sweep, tasks: Sequence[Task], job: str) -> None:
    """Have Slurm start this job again; where it will not, the last job queues the tasks anew."""
    names = ", ".join(task.id for task in tasks)
    try:
        ask(["scontrol", "requeue", job], patience=PATIENCE)
    except MembenchError as error:
        for task in tasks:
            if not sweep.attempts(task):  # nothing to blame it for
                sweep.withdraw(task)
        print(f"{names}: {error}", flush=True)
        return
    for task in tasks:
        sweep.submitted(task, "slurm", job_name())
    print(f"{names}: job {job_name()} is queued again", flush=True)


def why_it_died(number: int, *, out_of_memory: bool) -> tuple[Cause, str]:
    """The cause of a worker's end by signal `number`."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL and out_of_memory:
        return Cause.MEMORY, "killed by the kernel, out of memory; ask for more"
    if number in CRASHES:
        return Cause.CODE, f"crashed by {name}"
    return Cause.KILLED, f"killed by {name}"


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
