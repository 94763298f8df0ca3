"""What the Slurm executor works out by itself, without a cluster (tests/slurm has one)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from membench.sweep.slurm import _dependency, arrays, options, time_limit, warning_before
from membench.sweep.slurm_commands import UNLIMITED, fields, gpus_in, minutes, outside_of_jobs
from membench.sweep.slurm_job import why_it_died
from membench.sweep.specs import Resources
from membench.sweep.tasks import Cause, Task


def task(name: str, stage: str, cell: int, *needs: str, **resources: Any) -> Task:
    return Task(
        id=name, stage=stage, title=name, cell=cell, needs=needs, resources=Resources(**resources)
    )


def sweep_on(*targets: str) -> Any:
    cells = [SimpleNamespace(options={"dataset": "d", "target": target}) for target in targets]
    return SimpleNamespace(manifest=SimpleNamespace(cells=cells))


def shapes(sweep: Any, tasks: list[Task], largest: int, capped: bool = False) -> list[list[str]]:
    return [[t.id for t in a.tasks] for a in arrays(sweep, tasks, largest, capped=capped)]


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
    assert shapes(sweep_on("a", "b"), tasks, 9) == apart
    assert shapes(sweep_on("a", "a"), tasks, 9) == [
        ["check-a", "check-b"],
        ["images-a", "images-b"],
        ["record-a", "record-b"],
    ]
    assert shapes(sweep_on("a", "b"), tasks, 9, capped=True) == shapes(sweep_on("a", "a"), tasks, 9)
    assert shapes(sweep_on("a", "a"), tasks, 1) == apart
    assert shapes(sweep_on("a", "b"), tasks[1:3], 9) == [["images-a"], ["record-a"]]


def test_arrays_are_cut_where_resources_differ_and_at_the_largest_size():
    tasks = [task(f"images-{i}", "images", 0) for i in range(7)]
    assert [len(a) for a in shapes(sweep_on("a"), tasks, 3)] == [3, 3, 1]
    tasks.append(task("images-large", "images", 0, memory=64.0))
    assert [len(a) for a in shapes(sweep_on("a"), tasks, 9)] == [7, 1]


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
