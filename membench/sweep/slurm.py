"""Sweeps on Slurm: the whole graph is queued at once, by submitit, and nothing stays behind.

**Arrays.** Tasks of one stage, depth, data set and target that ask for the same resources are
elements of one array, cut to the cluster's MaxArraySize. An element does one task, or up to
`tasks_per_job` of them.

**Dependencies** are `afterany`, and each job looks for its inputs itself (`slurm_job`). With
`afterok`, an array, which has one dependency for all its elements, would lose them all to one
failed cell, and a job whose dependency failed would wait for ever. What is lost is one second of a
job that finds an input missing.

**Caps.** `%N` holds one array; arrays under one cap follow each other.

**Last** comes a job that queues again what failed for a cause outside the code, followed by another
last job, until nothing is left to try; then it makes the board. So retries need nobody on the login
node either.

submitit writes the sbatch file and starts `slurm_job.run` with two strings; its result pickles, its
signal handler and its idea of a job's state are not used. It would not requeue a job with a limit
below ten minutes, and calls a job lost whose node failed, though Slurm has queued it again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.errors import MembenchError
from membench.sweep import slurm_job
from membench.sweep.folder import Sweep
from membench.sweep.slurm_commands import (
    AWAY,
    PATIENCE,
    UNLIMITED,
    Node,
    ask,
    known,
    largest_array,
    nodes,
    outside_of_jobs,
    partitions,
)
from membench.sweep.slurm_state import judge
from membench.sweep.specs import Resources
from membench.sweep.tasks import Cause, CellPlan, Report, Task

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "slurm"
"""Of submitit's files and of what jobs print themselves, in the sweep's folder."""
MINUTES = 60
"""Time limit of a job that names none: longer tasks stop at a batch boundary and go on."""
MOST_ELEMENTS = 40
"""Elements of one array in a dependency, above which the whole array is waited for."""


@dataclass(frozen=True)
class Array:
    """Tasks that become one sbatch, by its elements: all with the same resources."""

    elements: tuple[tuple[Task, ...], ...]

    @property
    def tasks(self) -> list[Task]:
        return [task for element in self.elements for task in element]

    @property
    def resources(self) -> Resources:
        return self.tasks[0].resources

    @property
    def needs(self) -> set[str]:
        return {need for task in self.tasks for need in task.needs}


class Slurm:
    """jobs: the most tasks of a sweep at a time, besides what its file says."""

    name, detached = "slurm", True

    def __init__(self, jobs: int | None = None, console: Console | None = None):
        self.jobs, self.console = jobs, console

    def check(self, sweep: Sweep) -> None:
        """Every stage must fit a node of its partition; Slurm itself is asked, too."""
        asked: dict[str, tuple[str, Resources]] = {}
        for stage, resources in sweep.manifest.asked:
            asked.setdefault(resources.model_dump_json(), (stage, resources))
        found = partitions()
        for stage, resources in asked.values():
            where = f"{sweep.name}: resources.{stage}"
            name = _check_partition(where, resources, found)
            _check_nodes(where, resources, name, nodes(name))
            _test_only(where, resources)

    def start(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Queue what is not queued yet; raises only if the controller stays away."""
        reports = self.ask(sweep, tasks)
        alive = {name for name, r in reports.items() if r.state in ("queued", "running")}
        last = [task for task in tasks if task.after]
        self._scancel(sweep, [task for task in last if task.id in alive])
        fresh = [task for task in tasks if not task.after and task.id not in alive]
        jobs = {
            task.id: note.job
            for task in tasks
            if task.id in alive and not task.after and (note := sweep.read_submitted(task))
        }
        cap = _least(self.jobs, sweep.manifest.spec.concurrency)
        before: dict[str | None, str] = {}  # the array to follow, by stage; None: any
        refused: set[str] = set()
        cells = sweep.manifest.cells
        for array in arrays(cells, fresh, largest_array(), capped=cap is not None):
            if refused & array.needs:  # these rows are settled: they are skipped
                refused |= {task.id for task in array.tasks}
                continue
            stage, own = array.tasks[0].stage, array.resources.concurrency
            waits = _dependency([jobs[need] for need in array.needs if need in jobs])
            if cap is not None and None in before:
                waits.append(before[None])
            elif own is not None and stage in before:
                waits.append(before[stage])
            width = _least(cap, own) or len(array.elements)
            try:
                names = submit(sweep, array.elements, waits, width)
            except MembenchError as error:
                if AWAY.search(str(error)):
                    raise
                for task in array.tasks:
                    sweep.close(task, Cause.REFUSED, str(error))
                refused |= {task.id for task in array.tasks}
                continue
            jobs |= names
            before[None] = before[stage] = next(iter(names.values())).partition("_")[0]
        everything = {job.partition("_")[0] for job in jobs.values()}
        submit_last(sweep, last, sorted(everything, key=int))

    def ask(self, sweep: Sweep, tasks: Sequence[Task]) -> Mapping[str, Report]:
        """One question to the controller and one to accounting, whatever the number of tasks."""
        notes = {task.id: sweep.read_submitted(task) for task in tasks}
        jobs = {name: n.job for name, n in notes.items() if n is not None and n.executor == "slurm"}
        runs, queue = known(jobs.values())
        sharing = Counter(jobs.values())
        found = {}
        for name, job in jobs.items():
            report: Report | None = judge(job, runs, queue)
            if sharing[job] > 1 and report is not None and report.state == "running":
                report = _in_turn(sweep, sweep.tasks[name], job, report)
            if report is not None:
                found[name] = report
        return found

    def cancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        """Take the sweep's jobs out of the queue; running ones get SIGTERM."""
        self._scancel(sweep, [*tasks, *(task for task in sweep.tasks.values() if task.after)])

    def _scancel(self, sweep: Sweep, tasks: Sequence[Task]) -> None:
        notes = [note for task in tasks if (note := sweep.read_submitted(task)) is not None]
        jobs = {note.job for note in notes if note.executor == "slurm"}
        if jobs:
            ask(["scancel", "-Q", *sorted(jobs)], patience=PATIENCE)


# -- the shape of a submission -------------------------------------------------------------------


def _in_turn(sweep: Sweep, task: Task, job: str, running: Report) -> Report | None:
    """Of one of several tasks of a running job: None if its turn is over, and for good."""
    note, attempts = sweep.read_submitted(task), sweep.attempts(task)
    ended = attempts[-1].finished if attempts else None
    if note is not None and ended is not None and ended > note.at:
        return running if sweep.attempts_left(task) else None
    if sweep.held(task):
        return running
    return Report(state="queued", reason=f"in its turn; job {job} runs")


def arrays(
    cells: Sequence[CellPlan], tasks: Sequence[Task], largest: int, *, capped: bool
) -> list[Array]:
    """Tasks in arrays of at most `largest` elements, each after all that it needs.

    cells: of the sweep. capped: the arrays will follow each other, so that telling targets apart
    gains nothing.
    """
    depth: dict[str, int] = {}
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:  # each comes after all that it needs
        depth[task.id] = 1 + max((depth[need] for need in task.needs if need in depth), default=-1)
        place = "" if capped or task.resources.concurrency else _place(cells, task)
        key = (depth[task.id], task.stage, place, task.resources.model_dump_json())
        groups.setdefault(key, []).append(task)
    found = []
    for key in sorted(groups, key=lambda key: key[0]):
        elements = _elements(groups[key])
        found += [
            Array(tuple(elements[start : start + largest]))
            for start in range(0, len(elements), largest)
        ]
    return found


def _elements(tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """Tasks in as few jobs as `tasks_per_job` allows, as evenly as that goes."""
    count = math.ceil(len(tasks) / tasks[0].resources.tasks_per_job)
    ends = [len(tasks) * i // count for i in range(count + 1)]
    return [tuple(tasks[start:end]) for start, end in itertools.pairwise(ends)]


def _place(cells: Sequence[CellPlan], task: Task) -> str:
    """Data set and target of a task: those of different ones do not wait for each other."""
    if task.target is not None:
        return "/".join(task.target)
    if task.cell is None:
        return ""
    options = cells[task.cell].options
    return f"{options.get('dataset')}/{options.get('target')}"


def _dependency(jobs: Sequence[str]) -> list[str]:
    """Jobs to wait for, whole arrays in the place of many of their elements."""
    elements: dict[str, list[str]] = {}
    for job in dict.fromkeys(jobs):
        elements.setdefault(job.partition("_")[0], []).append(job)
    found: list[str] = []
    for array, members in elements.items():
        found += [array] if len(members) > MOST_ELEMENTS else members
    return found


def _least(*caps: int | None) -> int | None:
    return min((cap for cap in caps if cap is not None), default=None)


# -- submitting ----------------------------------------------------------------------------------


def submit(
    sweep: Sweep, elements: Sequence[Sequence[Task]], waits: Sequence[str], width: int
) -> dict[str, str]:
    """Queue one array and note the job of each task; at most `width` elements run at a time."""
    first = elements[0][0]
    executor = _executor(sweep, first.resources, first.stage, waits, array_parallelism=width)
    names = [[task.id for task in element] for element in elements]
    with _cleared(sweep):
        jobs = _patiently(
            lambda: executor.map_array(slurm_job.run, [str(sweep.folder)] * len(names), names)
        )
    found = {}
    for element, job in zip(elements, jobs, strict=True):
        for task in element:
            found[task.id] = str(job.job_id)
            sweep.submitted(task, "slurm", found[task.id])
    return found


def submit_last(sweep: Sweep, last: Sequence[Task], waits: Sequence[str]) -> None:
    """Queue the job that retries, and then makes the board."""
    resources = last[0].resources if last else Resources()
    executor = _executor(sweep, resources, "last", waits)
    with _cleared(sweep):
        names = [task.id for task in last]
        job = _patiently(lambda: executor.submit(slurm_job.run_last, str(sweep.folder), names))
    for task in last:
        sweep.submitted(task, "slurm", str(job.job_id))


def _executor(
    sweep: Sweep, ask_for: Resources, stage: str, waits: Sequence[str], **parameters: Any
) -> Any:
    import submitit

    found = submitit.SlurmExecutor(sweep.folder / FOLDER, python=f"{_python()} -P")
    extra: dict[str, Any] = {"requeue": True} | options(ask_for)
    if waits:
        extra["dependency"] = "afterany:" + ":".join(waits)
    minutes = time_limit(ask_for)
    found.update_parameters(
        job_name=f"{sweep.manifest.name}:{stage}",
        time=minutes,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=ask_for.cpus,
        signal_delay_s=warning_before(minutes),
        stderr_to_stdout=True,
        srun_args=[f"--cpus-per-task={ask_for.cpus}"],
        setup=[
            f"export PYTHONPATH={_quoted(sweep.code)}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={ask_for.cpus}",
            # Until our own handler is there, submitit's would call a preempted job failed.
            "export SUBMITIT_PREEMPT_SIGNAL=USR1",
        ],
        additional_parameters=extra,
        **parameters,
    )
    return found


def options(ask_for: Resources) -> dict[str, Any]:
    """Resources as options of sbatch, without time and cores."""
    found: dict[str, Any] = {}
    if ask_for.gpus:
        found["gpus-per-node"] = ask_for.gpus
    if ask_for.memory is not None:
        found["mem"] = f"{math.ceil(1024 * ask_for.memory)}M"
    for name in ("partition", "account", "constraint"):
        if getattr(ask_for, name) is not None:
            found[name] = getattr(ask_for, name)
    return found | {name.replace("_", "-"): value for name, value in ask_for.extra.items()}


def time_limit(ask_for: Resources) -> int:
    """Whole minutes, at least one; Slurm knows no less."""
    return max(1, math.ceil(ask_for.minutes if ask_for.minutes is not None else MINUTES))


def warning_before(minutes: int) -> int:
    """Seconds before the limit at which SIGUSR2 comes: a batch must fit, twice if there is time."""
    return min(180, max(15, 60 * minutes // 4))


def _patiently(call: Any) -> Any:
    """Submit; wait for a controller that is being restarted."""
    import submitit

    end = time.monotonic() + PATIENCE
    while True:
        try:
            with outside_of_jobs():
                return call()
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
            lines = [line for line in str(e).splitlines() if line.strip()] or ["no word of why"]
            if not AWAY.search(str(e)):
                raise MembenchError(f"Slurm refused the job: {lines[-1].strip()}") from None
            if time.monotonic() >= end:
                raise MembenchError(
                    f"Slurm's controller does not answer: {lines[-1].strip()}; what is queued "
                    "stays queued; go on with `membench retry`"
                ) from None
        time.sleep(2)


@contextmanager
def _cleared(sweep: Sweep) -> Iterator[None]:
    """Remove what submitit leaves of a submission that Slurm refused."""
    folder = sweep.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def _python() -> str:
    return _quoted(sys.executable)


def _quoted(path: str | Path) -> str:
    import shlex

    return shlex.quote(os.fspath(path))


# -- checks before anything is queued ------------------------------------------------------------


def _check_partition(where: str, ask_for: Resources, found: Mapping[str, Any]) -> str:
    name = ask_for.partition or str(ask_for.extra.get("partition", ""))
    if not name:
        defaults = [p.name for p in found.values() if p.default]
        if not defaults:
            raise MembenchError(
                f"{where}.partition: missing, and this cluster has no default; expected one of "
                + ", ".join(sorted(found))
            )
        name = defaults[0]
    partition = found.get(name)
    if partition is None:
        raise MembenchError(
            f"{where}.partition: {name!r}, expected one of {', '.join(sorted(found))}"
        )
    if not partition.up:
        raise MembenchError(f"{where}.partition: {name!r} is not up; choose another")
    minutes = time_limit(ask_for)
    if minutes > partition.minutes < UNLIMITED:
        given = "" if ask_for.minutes is not None else " (what a stage gets that names none)"
        raise MembenchError(
            f"{where}.minutes: {minutes}{given}, partition {name!r} allows {partition.minutes}"
        )
    return name


def _check_nodes(where: str, ask_for: Resources, partition: str, found: Sequence[Node]) -> None:
    """Some node must have all of it at once."""
    memory = 0 if ask_for.memory is None else math.ceil(1024 * ask_for.memory)
    for field, asked, have in (
        ("gpus", ask_for.gpus, max((node.gpus for node in found), default=0)),
        ("cpus", ask_for.cpus, max((node.cpus for node in found), default=0)),
        ("memory", memory, max((node.memory for node in found), default=0)),
    ):
        if asked > have:
            unit = (
                f"{asked / 1024:g} GiB, but {have / 1024:.4g} GiB"
                if field == "memory"
                else f"{asked}, but {have}"
            )
            raise MembenchError(
                f"{where}.{field}: {unit} is the most that a node of partition {partition!r} has"
            )


def _test_only(where: str, ask_for: Resources) -> None:
    """Let Slurm say whether such a job could ever start; nothing is queued."""
    flags = [f"--time={time_limit(ask_for)}", f"--cpus-per-task={ask_for.cpus}"]
    for name, value in options(ask_for).items():
        if value is not False:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    with outside_of_jobs():
        try:
            ask(["sbatch", "--test-only", *flags, "--wrap", "true"], patience=PATIENCE)
        except MembenchError as error:
            asked = json.dumps(ask_for.model_dump(exclude_defaults=True))
            raise MembenchError(f"{where}: {asked}: {error}") from None
