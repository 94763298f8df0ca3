"""What has become of a Slurm job: pure functions on the text of one `sacct` and one `squeue`.

submitit's own states mislead: it never hears of a job that was killed without accounting, calls a
requeued job done, and does not look at steps, where Slurm says "out of memory". So both are read
here. `squeue` (the controller) knows what is queued now; `sacct -D` (accounting) remembers every
run of a job, of a requeued one all of them. A job is over only if the controller does not hold it
any more, whatever became of its earlier runs. Results on disk come before all of this
(`membench.sweep.folder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import SIGABRT, SIGBUS, SIGINT, SIGKILL, SIGSEGV, SIGTERM, SIGUSR2

from membench.sweep.tasks import EXIT, STOPPED, Cause, Report

SACCT_FORMAT = "JobID,JobName,State,ExitCode,Reason,NodeList,Submit,Start,End,ElapsedRaw"
"""For `sacct -D -P --format=...`: with its header, separated by |."""
SQUEUE_FORMAT = "JobArrayID:|,Name:|,State:|,Reason:|,RestartCnt:|,NodeList:|"
"""For `squeue -h -r -t all -O ...`: one job a line, elements of an array one by one."""

QUEUED = frozenset(
    "PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD".split()  # noqa: SIM905
)
RUNNING = frozenset(
    "RUNNING CONFIGURING COMPLETING SUSPENDED RESIZING SIGNALING STAGE_OUT STOPPED".split()  # noqa: SIM905
)
ALIVE = (QUEUED | RUNNING) - {"REQUEUED"}
"""States of a run that is not over; REQUEUED is how accounting ends one that will have another."""
REQUEUEABLE = frozenset({"REQUEUED", "PREEMPTED", "NODE_FAIL"})
STUCK = {
    "DependencyNeverSatisfied": "what it depends on can never end as asked",
    "PartitionTimeLimit": "it asks for more minutes than the partition allows",
    "PartitionNodeLimit": "it asks for more nodes than the partition has",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionConfig": "the partition can never hold it",
    "BadConstraints": "no node satisfies its constraints",
    "InvalidAccount": "its account is not known",
    "InvalidQOS": "its QOS is not known",
    "JobHeldUser": "held; scontrol release JOB",
    "JobHeldAdmin": "held by the administrator",
    "launch failed requeued held": "it could not be started; scontrol release JOB",
    "ReqNodeNotAvail": "the nodes it asks for are down or drained",
    "AccountNotAllowed": "its account may not use the partition",
    "QOSMaxWallDurationPerJobLimit": "it asks for more minutes than its QOS allows",
    "AssocMaxWallDurationPerJobLimit": "it asks for more minutes than its account allows",
}
"""Reasons to wait that do not pass by themselves."""
LAUNCH = 53
"""Slurm's code for a job whose folder or log it could not open: it stands where a signal would."""
SIGNALS = {int(s): s.name for s in (SIGINT, SIGABRT, SIGBUS, SIGKILL, SIGSEGV, SIGUSR2, SIGTERM)}


@dataclass(frozen=True)
class Step:
    """One step of a run: `batch` (the script), `extern`, or `0` (what srun started)."""

    name: str
    state: str
    exit_code: int
    signal: int


@dataclass
class Run:
    """One start of a job, as accounting remembers it; a requeued job has several."""

    state: str
    exit_code: int
    signal: int
    node: str
    submitted: str
    seconds: int
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class InQueue:
    """What the controller says of a job now."""

    state: str
    reason: str
    restarts: int
    node: str


def read_sacct(text: str) -> dict[str, list[Run]]:
    """Runs by job id (`7`, `7_0`), the latest last.

    text: of `sacct -D -P --format=SACCT_FORMAT`. Elements of an array that were not started come
    as one line (`7_[1-3%2]`) and are told apart here.
    """
    lines = text.splitlines()
    if not lines:
        return {}
    names = lines[0].split("|")
    runs: dict[str, list[Run]] = {}
    for line in lines[1:]:
        row = dict(zip(names, line.split("|"), strict=True))
        code, _, signal = row["ExitCode"].partition(":")  # empty for steps of a lost node
        exit_code, signal_number = int(code or 0), int(signal or 0)
        state = row["State"].partition(" ")[0]  # CANCELLED by UID
        job, _, step = row["JobID"].partition(".")
        if step:
            if job in runs:
                runs[job][-1].steps.append(Step(step, state, exit_code, signal_number))
            continue
        for element in expand(job):
            run = Run(state, exit_code, signal_number, row["NodeList"], row["Submit"],
                      int(row["ElapsedRaw"] or 0))  # fmt: skip
            runs.setdefault(element, []).append(run)
    for found in runs.values():
        found.sort(key=lambda run: run.submitted)  # stable: lines come in this order already
    return runs


def read_squeue(text: str) -> dict[str, InQueue]:
    """What the controller holds, by job id; text: of `squeue -h -r -t all -O SQUEUE_FORMAT`."""
    jobs = {}
    for line in text.splitlines():
        job, _name, state, reason, restarts, node = line.split("|")[:6]
        for element in expand(job):
            jobs[element] = InQueue(state, reason, int(restarts or 0), node)
    return jobs


def expand(job: str) -> list[str]:
    """`7` and `7_0` as they are; `7_[0-1,4%2]` as `7_0`, `7_1`, `7_4`."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    found = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        found += [f"{match[1]}_{i}" for i in range(int(first), int(last or first) + 1)]
    return found


def judge(job: str, runs: Mapping[str, list[Run]], queue: Mapping[str, InQueue] | None) -> Report:
    """What Slurm says of one job.

    queue: None if the controller did not answer: then a job is believed over only if its last run
    ended in a way from which Slurm does not requeue.
    """
    past, now = runs.get(job, []), None if queue is None else queue.get(job)
    before = [run for run in past if run.state not in ALIVE]
    if now is not None and now.state in QUEUED:
        return Report(state="queued", reason=_waiting(now, before))
    if now is not None and now.state in RUNNING:
        where = f"on {now.node}" if now.node else ""
        return Report(
            state="running", reason="; ".join(filter(None, [where, _again(now.restarts, before)]))
        )
    if past and (now is None or past[-1].state not in ALIVE):
        last = past[-1]
        if queue is None and last.state in QUEUED | RUNNING | {
            "PREEMPTED",
            "NODE_FAIL",
            "REQUEUED",
        }:
            return Report(
                state="unknown", reason=f"the controller does not answer; last: {last.state}"
            )
        cause, reason = _ended(last)
        return Report(state="failed", cause=cause, reason=reason)
    if now is not None:  # over, but accounting is late
        run = Run(now.state, 0, 0, now.node, "", 0)
        if now.state == "FAILED":  # of an error in code, the attempt on disk tells
            how = f"failed on {now.node}; accounting does not say how"
            return Report(state="failed", cause=Cause.KILLED, reason=how)
        cause, reason = _ended(run)
        return Report(state="failed", cause=cause, reason=reason)
    if queue is None:
        return Report(state="unknown", reason="the controller does not answer")
    return Report(state="failed", cause=Cause.KILLED, reason=f"Slurm knows no job {job} any more")


def ended_before(runs: list[Run]) -> tuple[Cause, str] | None:
    """Why the run before the present one ended, if accounting remembers it."""
    before = [run for run in runs if run.state not in ALIVE]
    return _ended(before[-1]) if before else None


def _waiting(now: InQueue, before: list[Run]) -> str:
    """Why a queued job waits, `stuck: ...` if that does not pass by itself."""
    reason = now.reason
    for prefix, why in STUCK.items():
        if reason.startswith(prefix):
            reason = f"stuck: {reason} ({why})"
            break
    return "; ".join(filter(None, [reason, _again(now.restarts, before)]))


def _again(restarts: int, before: list[Run]) -> str:
    if restarts == 0:
        return ""
    times = "once" if restarts == 1 else f"{restarts} times"
    last = f", last {before[-1].state} on {before[-1].node}" if before else ""
    return f"requeued {times}{last}"


def _ended(run: Run) -> tuple[Cause, str]:
    """Cause and reason of a run that ended without the result it should have left."""
    at = f" on {run.node}" if run.node and run.node != "None assigned" else ""
    states = {run.state} | {step.state for step in run.steps}
    if "OUT_OF_MEMORY" in states:
        return Cause.MEMORY, f"out of memory{at}; ask for more"
    if run.state in ("TIMEOUT", "DEADLINE"):
        return Cause.TIME, f"{run.state} after {run.seconds} s{at}"
    if run.state in ("CANCELLED", "REVOKED"):
        return Cause.CANCELLED, f"cancelled{at}"
    if run.state in ("NODE_FAIL", "BOOT_FAIL"):
        return Cause.NODE, f"{run.state}{at}"
    if run.state in ("PREEMPTED", "REQUEUED"):
        return Cause.KILLED, f"{run.state}{at} and not queued again"
    if run.state in QUEUED | RUNNING:
        return (
            Cause.KILLED,
            f"accounting says {run.state}{at}, but the controller knows no such job",
        )
    if LAUNCH in (run.signal, run.exit_code):
        return Cause.NODE, f"could not be started{at}: its folder or log cannot be opened there"
    signal = _signal(run)
    if signal:
        return Cause.KILLED, f"ended by {SIGNALS.get(signal, f'signal {signal}')}{at}"
    if run.state == "COMPLETED":
        return Cause.KILLED, f"ended well{at}, but left no result"
    return _by_exit_code(run.exit_code, at)


def _signal(run: Run) -> int:
    """What killed the run's work: the step says so, or the job, or a shell's 128 + signal.

    srun passes the number of a signal on as if it were an exit code, so steps come first.
    """
    for step in run.steps:
        if step.name not in ("batch", "extern") and step.signal:
            return step.signal
    if run.signal:
        return run.signal
    codes = [step.exit_code for step in run.steps] + [run.exit_code]
    return next(
        (code - 128 for code in codes if code - 128 in SIGNALS and code != EXIT[Cause.CANCELLED]), 0
    )


def _by_exit_code(code: int, at: str) -> tuple[Cause, str]:
    known = {number: cause for cause, number in EXIT.items() if cause is not None}
    if code == STOPPED:
        return Cause.TIME, f"stopped at a batch boundary{at} and not queued again"
    if code in SIGNALS and code not in known:  # as Slurm gives srun's 128 + signal of a lost step
        return Cause.KILLED, f"ended by {SIGNALS[code]}{at}"
    return known.get(code, Cause.CODE), f"exit code {code}{at}"
