"""What the Slurm executor works out by itself, without a cluster (tests/slurm has one)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import made, write_file, write_method

from membench.sweep import slurm, slurm_job
from membench.sweep.slurm import Slurm, _dependency, arrays, options, time_limit, warning_before
from membench.sweep.slurm_commands import UNLIMITED, fields, gpus_in, minutes, outside_of_jobs
from membench.sweep.slurm_job import why_it_died
from membench.sweep.slurm_state import InQueue
from membench.sweep.specs import Resources
from membench.sweep.tasks import EXIT, Cause, CellPlan, Task


def task(name: str, stage: str, cell: int, *needs: str, **resources: Any) -> Task:
    return Task(
        id=name, stage=stage, title=name, cell=cell, needs=needs, resources=Resources(**resources)
    )


def cells_on(*targets: str) -> list[CellPlan]:
    options = [{"dataset": "d", "target": target} for target in targets]
    return [CellPlan(options=option, title="") for option in options]


def shapes(
    cells: list[CellPlan], tasks: list[Task], largest: int, capped: bool = False
) -> list[list[str]]:
    return [[t.id for t in a.tasks] for a in arrays(cells, tasks, largest, capped=capped)]


def test_arrays_hold_tasks_of_one_depth_target_and_kind_and_come_after_what_they_need():
    tasks = [
        task("check-a", "check", 0),
        task("images-a", "images", 0, "check-a", gpus=1),
        task("record-a", "record", 0, "images-a"),
        task("check-b", "check", 1),
        task("images-b", "images", 1, "check-b", gpus=1),
        task("record-b", "record", 1, "images-b"),
    ]
    apart = [["check-a"], ["check-b"], ["images-a"], ["images-b"], ["record-a"], ["record-b"]]
    assert shapes(cells_on("a", "b"), tasks, 9) == apart
    assert shapes(cells_on("a", "a"), tasks, 9) == [
        ["check-a", "check-b"],
        ["images-a", "images-b"],
        ["record-a", "record-b"],
    ]
    assert shapes(cells_on("a", "b"), tasks, 9, capped=True) == shapes(cells_on("a", "a"), tasks, 9)
    assert shapes(cells_on("a", "a"), tasks, 1) == apart
    assert shapes(cells_on("a", "b"), tasks[1:3], 9) == [["images-a"], ["record-a"]]


def test_arrays_are_cut_where_resources_differ_and_at_the_largest_size():
    tasks = [task(f"images-{i}", "images", 0) for i in range(7)]
    assert [len(a) for a in shapes(cells_on("a"), tasks, 3)] == [3, 3, 1]
    tasks.append(task("images-large", "images", 0, memory=64.0))
    assert [len(a) for a in shapes(cells_on("a"), tasks, 9)] == [7, 1]


@given(count=st.integers(1, 60), per_job=st.integers(1, 20), largest=st.integers(1, 9))
def test_elements_hold_the_tasks_of_a_job_in_order_and_evenly(count, per_job, largest):
    tasks = [task(f"record-{i}", "record", 0, tasks_per_job=per_job) for i in range(count)]
    found = arrays(cells_on("a"), tasks, largest, capped=False)
    elements = [element for array in found for element in array.elements]
    assert [t for element in elements for t in element] == tasks
    assert len(elements) == -(-count // per_job) and all(len(a.elements) <= largest for a in found)
    sizes = {len(element) for element in elements}
    assert max(sizes) <= per_job and max(sizes) - min(sizes) <= 1


def test_many_elements_of_an_array_are_waited_for_together():
    assert _dependency(["7_0", "7_1", "9", "7_0"]) == ["7_0", "7_1", "9"]
    assert _dependency([f"7_{i}" for i in range(100)] + ["9"]) == ["7", "9"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2-03:00:00", 3060),
        ("1-00", 1440),
        ("03:00:00", 180),
        ("30:00", 30),
        ("90", 90),
        ("00:00:59", 0),
        ("UNLIMITED", UNLIMITED),
    ],
)
def test_times_of_slurm(text, expected):
    assert minutes(text) == expected


def test_gpus_and_fields_as_slurm_prints_them():
    assert gpus_in("gpu:a100:4(S:0-1),nvme:1") == 4
    assert gpus_in("gpu:2") == 2 and gpus_in("gpu") == 1 and gpus_in("(null)") == 0
    line = "PartitionName=main Default=YES MaxTime=01:00:00 TRES=cpu=12,mem=3G"
    assert fields(line)["TRES"] == "cpu=12,mem=3G" and fields(line)["Default"] == "YES"


def test_resources_become_options():
    asked = Resources(gpus=2, memory=1.5, partition="p", minutes=0.2, extra={"nice": 5, "a_b": "x"})
    expected = {"gpus-per-node": 2, "mem": "1536M", "partition": "p", "nice": 5, "a-b": "x"}
    assert options(asked) == expected
    assert (time_limit(asked), time_limit(Resources(minutes=61.5))) == (1, 62)
    assert [warning_before(m) for m in (1, 4, 600)] == [15, 60, 180]


def test_signals_tell_causes():
    assert why_it_died(9, out_of_memory=True)[0] == Cause.MEMORY
    assert why_it_died(9, out_of_memory=False) == (Cause.KILLED, "killed by SIGKILL")
    assert why_it_died(11, out_of_memory=False) == (Cause.CODE, "crashed by SIGSEGV")


def test_a_job_that_submits_others_hides_that_it_is_one_but_not_its_cluster(monkeypatch):
    import os

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with outside_of_jobs():
        assert "SLURM_JOB_ID" not in os.environ and "SBATCH_PARTITION" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_a_job_of_several_tasks_goes_on_after_one_that_fails_or_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All tasks of a sweep in one job; the one that was killed is done in the job's next run."""
    marker = tmp_path / "killed"
    file = write_file(tmp_path, methods=["killed", "broken", "random"])
    write_method(tmp_path / "plugins", "broken", body="raise ValueError('no labels')")
    once = f"import os; os.path.exists({str(marker)!r}) or "
    write_method(
        tmp_path / "plugins",
        "killed",
        body=once + f"(open({str(marker)!r}, 'w'), os.kill(os.getpid(), 9))",
    )
    sweep = made(file, tmp_path / "results")
    tasks = [task for task in sweep.tasks.values() if not task.after]
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(slurm_job, "ask", lambda command, **_: asked.append(command) or "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for task in tasks:
        sweep.submitted(task, "slurm", "7")
    code = slurm_job.one_by_one(sweep, tasks)
    tries = {task.id: sweep.attempts(task) for task in tasks}
    failed = {a.cause: name for name, found in tries.items() for a in found if a.state == "failed"}
    assert set(failed) == {Cause.CODE, Cause.KILLED}
    assert code != EXIT[None] and asked == [["scontrol", "requeue", "7"]]
    ran = sorted((a for found in tries.values() for a in found), key=lambda a: a.started)
    for before, after in itertools.pairwise(ran):
        assert (after.pid == before.pid) == (before.state == "done")
    assert 1 < len({a.pid for a in ran}) < len(ran)
    left = [t for t in tasks if not sweep.done(t)]
    assert len(left) > 2 and not any(tries[t.id] for t in left if t.id not in failed.values())

    for task in tasks:
        if not sweep.done(task):
            sweep.submitted(task, "slurm", "7")
    assert slurm_job.one_by_one(sweep, tasks) == EXIT[Cause.CODE]
    assert asked == [["scontrol", "requeue", "7"]], "an error in code is never tried again"
    again = {task.id: sweep.attempts(task) for task in tasks}
    assert [a.state for a in again[failed[Cause.KILLED]]] == ["failed", "done"]
    assert all(
        len(found) == 1 for name, found in again.items() if name != failed[Cause.KILLED] and found
    )
    missing = [task.stage for task in tasks if not sweep.done(task)]
    assert missing.count("record") == 1, "of the one whose labels fail"
    assert "killed by SIGKILL" not in capfd.readouterr().out


def test_what_slurm_says_of_tasks_that_share_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One had its turn and failed, one runs, one waits: the job as a whole only runs."""
    sweep = made(write_file(tmp_path), tmp_path / "results")
    over, now, later = list(sweep.tasks.values())[:3]
    for task in (over, now, later):
        sweep.submitted(task, "slurm", "7")
    sweep.close(over, Cause.CODE, "an error")
    queue = {"7": InQueue("RUNNING", "None", 0, "n1")}
    monkeypatch.setattr(slurm, "known", lambda jobs: ({}, queue))
    with sweep.working_on(now):
        found = Slurm().ask(sweep, [over, now, later])
    assert over.id not in found
    assert found[now.id].state == "running"
    assert (found[later.id].state, found[later.id].reason) == ("queued", "in its turn; job 7 runs")
    sweep.close(over, Cause.KILLED, "killed")  # to be tried again by the same job
    assert Slurm().ask(sweep, [over, now, later])[over.id].state == "running"
