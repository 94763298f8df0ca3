"""Sweeps on a real Slurm cluster, and everything that can go wrong with it.

After each fault the board is complete or the missing rows are named, and no batch that was whole
was made again. What each fault cost goes into a table (`conftest.TABLE`), as it was measured.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cluster import PLUGINS, Cluster, Trial, processes_with, sbatch, shell, wait_until
from sweeps import with_young, write_file

from membench.errors import MembenchError
from membench.files import read_json
from membench.hashing import file_hash
from membench.sweep.dispatch import asked, go
from membench.sweep.inline import Inline
from membench.sweep.slurm import Slurm
from membench.sweep.tasks import Cause

pytestmark = pytest.mark.slurm

PACE = 0.8
"""Seconds a batch takes where a fault must come in its middle."""


def make(trial: Trial, **more: Any) -> None:
    """A cell of 512 images in two shards of four batches, unless `more` says otherwise."""
    content = {
        "name": "trial",
        "methods": ["paced"],
        "datasets": ["fashion_mini"],
        "targets": ["oracle:0.5"],
        "shards": 2,
        "resources": {"default": {"memory": 0.5}},
    }
    trial.sweep = trial.create(trial.write(**content | more))


def share(trial: Trial, together: int) -> None:
    """The two shards of the cell as jobs of their own, or as the tasks of one."""
    default = {"memory": 0.5}
    make(trial, resources={"default": default, "images": default | {"tasks_per_job": together}})


def complete(trial: Trial, cells: int = 1, unsaved: Sequence[dict[str, Any]] = ()) -> None:
    """Every row has its record, the board is there, and nothing was made twice."""
    summary = trial.summary()
    assert [row["state"] for row in summary["rows"]] == ["done"] * cells, summary["rows"]
    board = (trial.sweep.folder / "board" / "fashion_mini.md").read_text(encoding="utf-8")
    assert "oracle:0.5" in board
    assert trial.twice(unsaved) == 0


def causes(trial: Trial, stage: str = "images") -> str:
    """What was written down of the tries that did not make it."""
    bad = [a for a in trial.attempts(stage) if a.state in ("failed", "stopped")]
    return "; ".join(sorted({f"{a.cause}: {a.reason}" for a in bad}))


def waited(trial: Trial, event: float) -> float:
    """Seconds from the fault to the first batch that began after a later start of a task."""
    again = [a.started for a in trial.attempts() if a.number > 1 and a.started > event]
    return min(again) - event if again else 0.0


def row(add: Callable[..., None], trial: Trial, event: str, at: float, end: str) -> None:
    happened = "; ".join(filter(None, [causes(trial), end]))
    add(event, happened, lost=trial.lost(at), waited=waited(trial, at), twice=trial.twice())


def same_images(left: Trial, right: Path) -> int:
    """Compare all images of two results folders by hash; returns how many artifacts."""
    found = sorted((left.results / "artifacts" / "images").glob("*/images.npy"))
    for path in found:
        other = right / path.relative_to(left.results)
        assert file_hash(path) == file_hash(other), path
    return len(found)


def test_a_whole_sweep_is_the_one_that_runs_inline_without_shards(trial):
    make(
        trial,
        methods=[{"name": "random", "steps": 4, "images": 448}],
        seeds=[0, 1],
        targets=["oracle:0.5", "ddpm"],
        shards=7,
        resources={"default": {"memory": 1.0}, "images": {"gpus": 1}},
        device="cpu",
    )
    trial.submit()
    trial.finish(240)
    rows = trial.summary()["rows"]
    assert [r["state"] for r in rows] == ["done"] * len(rows)
    assert {a.gpus for a in trial.attempts()} <= {"0", "1"}
    plain = trial.folder / "inline"
    text = (
        (trial.folder / "trial.toml")
        .read_text(encoding="utf-8")
        .replace("shards = 7", "shards = 1")
    )
    file = trial.folder / "inline.toml"
    file.write_text(text, encoding="utf-8")
    inline = trial.create(file, "inline", plain)
    go(inline, Inline())
    ours = {r["id"]: r["results_sha256"] for r in rows}
    theirs = {
        r["id"]: r["results_sha256"] for r in read_json(inline.folder / "summary.json")["rows"]
    }
    assert ours == theirs and len(ours) == 4
    assert same_images(trial, plain) == 4


def test_a_target_is_trained_on_the_way(trial, fault_table):
    """Its worker is killed in the middle; what rests on its weights is planned by a job."""
    plugins = with_young(write_file(trial.folder / "data"), steps=600).parent / "plugins"
    trial.plugins = (PLUGINS, plugins)
    make(
        trial,
        methods=[{"name": "random", "steps": 3, "images": 28}],
        datasets=["tiny"],
        targets=["oracle:0.3", "young"],
        shards=1,
    )
    plain = trial.create(trial.folder / "trial.toml", "inline", trial.folder / "inline")
    trial.submit()
    (train,) = [task for task in trial.sweep.tasks.values() if task.stage == "train"]
    checkpoint = trial.results / "targets" / "tiny" / "young" / "checkpoint.pt"
    wait_until(lambda: checkpoint.is_file() or trial.sweep.done(train), 60, "a checkpoint")
    ((_, attempt),) = trial.running("train")
    at, saved = time.time(), checkpoint.stat().st_mtime
    os.kill(attempt.pid, signal.SIGKILL)
    trial.finish(240)
    trial.sweep.refresh()
    rows = trial.summary()["rows"]
    assert [row["state"] for row in rows] == ["done"] * 2, rows
    go(plain, Inline())
    theirs = read_json(plain.folder / "summary.json")["rows"]
    assert [(r["id"], r["results_sha256"]) for r in rows] == [
        (r["id"], r["results_sha256"]) for r in theirs
    ]
    again = trial.sweep.attempts(train)
    assert [a.state for a in again] == ["failed", "done"]
    fault_table(
        "kill -9 of a training",
        f"{again[0].cause}: {again[0].reason}; requeued, went on from its checkpoint; then "
        "a job planned what rests on the weights",
        lost=max(0.0, at - saved),
        waited=again[1].started - at,
        twice=trial.twice(),
    )


@pytest.mark.parametrize("whole", [False, True], ids=["worker", "job"])
def test_kill_9(trial, fault_table, whole):
    make(trial)
    trial.submit(pace=PACE)
    trial.after_batches(3)
    task, attempt = trial.running()[0]
    at = time.time()
    if whole:  # nobody is left in the job to write anything down
        (raw,) = {line["job"] for line in trial.batches("begin") if line["pid"] == attempt.pid}
        for pid in processes_with(f"SLURM_JOB_ID={raw}"):
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(attempt.pid, signal.SIGKILL)
    trial.finish()
    complete(trial)
    first = trial.sweep.attempts(task)[0]
    assert (first.state, first.cause) == ("failed", Cause.KILLED)
    what = "kill -9 of every process of a job" if whole else "kill -9 of a worker"
    row(fault_table, trial, what, at, "tried again by the last job" if whole else "requeued")


def test_tasks_that_share_a_job(trial, fault_table):
    """One always fails and the worker of another is killed: the others in the job go on."""
    few = {"memory": 0.5, "tasks_per_job": 6}
    images = few | {"tasks_per_job": 3}
    make(
        trial,
        seeds=list(range(6)),
        shards=1,
        methods=[{"name": "paced", "images": 128}],
        resources={"default": few, "images": images},
    )
    trial.submit(pace=PACE, MEMBENCH_BREAK="64", MEMBENCH_BREAK_SEED="1")
    trial.after_batches(1)
    victim, attempt = trial.running()[0]
    at = time.time()
    os.kill(attempt.pid, signal.SIGKILL)
    trial.finish()
    rows = trial.summary()["rows"]
    assert [row["state"] for row in rows] == ["done", "skipped", *["done"] * 4]
    assert rows[1]["cause"] == str(Cause.CODE)
    tries = {t.id: trial.sweep.attempts(t) for t in trial.sweep.tasks.values()}
    jobs = {a.job for name, found in tries.items() if name.startswith("images") for a in found}
    assert len(jobs) == 2, "six tasks of images in two jobs"
    assert len({a.job for a in trial.attempts("record")}) == 1
    assert [a.state for a in tries[victim.id]] == ["failed", "done"]
    assert tries[victim.id][0].cause is Cause.KILLED
    assert sum(a.state != "done" for found in tries.values() for a in found) == 2
    assert trial.twice() == 0
    row(fault_table, trial, "a worker with several tasks killed, one of which always fails", at,
        "the others of the job went on; requeued for the killed one")  # fmt: skip


@pytest.mark.parametrize("together", [1, 2], ids=["alone", "together"])
def test_scancel_is_for_good_until_retry(trial, fault_table, together):
    share(trial, together)
    trial.submit(pace=PACE)
    trial.after_batches(4 - together)
    task, attempt = trial.running()[0]
    at = time.time()
    shell("scancel", attempt.job)
    trial.finish()
    summary = trial.summary()
    (missing,) = summary["rows"]
    assert (missing["task"], missing["cause"]) == (task.id, str(Cause.CANCELLED))
    ended = [t for t, s in trial.sweep.statuses().items() if s.cause is Cause.CANCELLED]
    assert len(ended) == together
    again = time.time()
    trial.submit()
    trial.finish()
    complete(trial)
    fault_table(
        "scancel of a running task" if together == 1 else "scancel of a job with two tasks",
        f"{causes(trial)}; the row is missing and named; `membench retry` completed it",
        lost=trial.lost(at),
        waited=waited(trial, again),
        twice=trial.twice(),
    )


def test_time_limit(trial, fault_table):
    # Slurm knows no limit below a minute, but warns as long before it as one asks.
    images = {"minutes": 1, "extra": {"signal": "USR2@20"}}
    make(trial, shards=1, resources={"default": {"memory": 0.5}, "images": images})
    trial.submit(pace=9.0)
    trial.finish(240)
    complete(trial)
    stopped = [a for a in trial.attempts() if a.state == "stopped"]
    assert stopped and {a.cause for a in stopped} == {Cause.TIME}
    at = stopped[0].finished
    row(fault_table, trial, "time limit", at, f"requeued, {len(stopped) + 1} runs of the job")


@pytest.mark.parametrize("together", [1, 2], ids=["alone", "together"])
def test_preemption(trial, fault_table, together):
    share(trial, together)
    trial.submit(pace=PACE)
    trial.after_batches(3 - together)
    at = time.time()
    sbatch("--partition=high", "--exclusive", "--nodes=3", command="sleep 3")
    trial.finish()
    complete(trial)
    stopped = [a for a in trial.attempts() if a.state == "stopped"]
    assert all(a.reason == "preempted" for a in stopped)
    assert stopped or together > 1  # it may come between two tasks
    assert max(a.restart for a in trial.attempts()) == 1
    what = "preemption" if together == 1 else "preemption of a job with two tasks"
    row(fault_table, trial, what, at, "requeued")


def test_a_node_goes_down(trial, fault_table, cluster):
    make(trial, resources={"default": {"memory": 0.5}, "images": {"extra": {"nodelist": "n3"}}})
    trial.submit(pace=PACE)
    trial.after_batches(3)
    at = time.time()
    cluster.lose("n3")
    wait_until(lambda: "down" in shell("sinfo", "-h", "-n", "n3", "-o", "%T"), 60, "n3 to be down")
    cluster.up()
    trial.finish()
    complete(trial)
    assert {a.cause for a in trial.attempts() if a.state == "failed"} == {Cause.NODE}
    row(fault_table, trial, "a node goes down", at, "requeued by Slurm when it was noticed")


def test_a_shard_that_always_fails(trial, fault_table):
    make(trial, seeds=[0, 1])
    trial.submit(MEMBENCH_BREAK="256", MEMBENCH_BREAK_SEED="1")
    trial.finish()
    good, bad = trial.summary()["rows"]
    assert (good["state"], bad["state"]) == ("done", "skipped")
    assert bad["cause"] == str(Cause.CODE) and "this batch always fails" in bad["reason"]
    assert any("ValueError: this batch always fails" in line for line in bad["log"])
    failed = [a for a in trial.attempts() if a.state == "failed"]
    assert len(failed) == 1  # never tried again
    assert trial.twice() == 0
    fault_table(
        "a shard that always fails",
        f"{causes(trial)}; tried once; its row is named as missing, the other is on the board",
        lost=failed[0].finished - max(b["at"] for b in trial.batches("begin") if b["first"] == 256
                                      and b["seed"] == 1),
        waited=0.0,
        twice=trial.twice(),
    )  # fmt: skip


def test_more_cells_than_an_array_may_have(trial, fault_table):
    at = time.time()
    make(trial, seeds=list(range(6)), shards=1, concurrency=3)
    took = trial.submit()
    trial.finish(300)
    complete(trial, 6)
    images = {a.job.partition("_")[0] for a in trial.attempts()}
    assert len(images) == 2  # MaxArraySize = 4 here
    spans = [
        (a.started, a.finished) for stage in ("images", "record") for a in trial.attempts(stage)
    ]
    assert max(sum(s <= moment < e for s, e in spans) for moment, _ in spans) <= 3
    happened = (
        f"{len(images)} arrays for 6 cells, at most 3 tasks at a time; queued in {took:.1f} s"
    )
    fault_table("more cells than MaxArraySize", happened, lost=trial.lost(at), waited=0.0,
                twice=trial.twice())  # fmt: skip


def started_last() -> float:
    """When the last of the running jobs began, in seconds since 1970."""
    times = shell("squeue", "-h", "-r", "-t", "running", "-o", "%S").split()
    return max(datetime.fromisoformat(time).timestamp() for time in times)


def test_the_controller_is_restarted(trial, fault_table, cluster):
    make(trial)
    trial.submit(pace=5 * PACE)
    trial.after_batches(1)
    # What it has not saved yet (it does so every few seconds) a killed controller does not know.
    wait_until(lambda: cluster.saved > started_last() + 1, 30, "the controller to save its jobs")
    at, pid = time.time(), trial.running()[0][1].pid
    cluster.kill("slurmctld")
    os.kill(pid, signal.SIGKILL)  # its requeue must wait for the controller
    with pytest.raises(subprocess.CalledProcessError):
        shell("scontrol", "ping")
    statuses = asked(trial.sweep, Slurm())  # still answered, from the disk
    assert all(s.state != "failed" for s in statuses.values())
    cluster.up()
    away = time.time() - at
    trial.finish()
    complete(trial)
    row(fault_table, trial, f"slurmctld away for {away:.0f} s, a worker killed meanwhile", at,
        "requeued when it was back; other jobs went on")  # fmt: skip


def fill(path: Path) -> None:
    """Write until nothing goes in any more."""
    with open(path, "wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    assert shutil.disk_usage(path.parent).free == 0


def test_full_disk(trial, fault_table):
    trial.results = trial.folder / "small"
    trial.results.mkdir()
    shell("mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", trial.results)
    try:
        if (trial.folder / "results" / "artifacts").is_dir():
            shutil.copytree(trial.folder / "results" / "artifacts", trial.results / "artifacts")
        make(trial)
        trial.submit(pace=PACE)
        trial.after_batches(3)
        at = time.time()
        filler = trial.results / "filler"
        fill(filler)
        trial.finish()
        statuses = asked(trial.sweep, Slurm())
        bad = [s for s in statuses.values() if s.state == "failed"]
        said = "; ".join(sorted({f"{s.task.partition('-')[0]} {s.cause}: {s.reason}" for s in bad}))
        assert bad and any(s.cause == Cause.DISK for s in bad), statuses
        assert statuses["board"].state != "done"
        filler.unlink()
        again = time.time()
        unsaved = [b for b in trial.batches("end") if at < b["at"] < again]
        trial.submit(failed=True)
        trial.finish()
        complete(trial, unsaved=unsaved)
        happened = f"{said}; when there was room again, `membench retry --failed` completed it"
        fault_table("full disk", happened.replace(str(trial.folder), "..."),
                    lost=trial.lost(at) + PACE * len(unsaved), waited=waited(trial, again),
                    twice=trial.twice(unsaved))  # fmt: skip
    finally:
        shell("umount", "-l", trial.results)


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"partition": "gpu"}, "resources.check.partition: 'gpu', expected one of high, main"),
        ({"gpus": 3}, "resources.check.gpus: 3, but 2 is the most"),
        ({"cpus": 5}, "resources.check.cpus: 5, but 4 is the most"),
        ({"memory": 4.0}, "resources.check.memory: 4 GiB, but 3.906 GiB is the most"),
        ({"minutes": 61}, "resources.check.minutes: 61, partition 'main' allows 60"),
        ({"constraint": "a100"}, "Invalid feature specification"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_queued(trial, resources, said):
    make(trial, resources={"default": resources})
    with pytest.raises(MembenchError) as caught:
        trial.submit()
    assert said in str(caught.value)
    assert not any(trial.sweep.read_submitted(task) for task in trial.sweep.tasks.values())


def test_cancel_empties_the_queue(trial):
    from membench.sweep.dispatch import cancel

    make(trial)
    trial.submit(pace=PACE)
    trial.after_batches(1)
    cancel(trial.sweep, Slurm())
    trial.finish(30)
    assert {s.cause for s in trial.sweep.statuses().values() if s.state == "failed"} == {
        Cause.CANCELLED
    }


def test_down_leaves_nothing_running(cluster: Cluster):
    pids = [
        cluster.pid(name) for name in ("slurmctld", "slurmdbd", "mariadbd", "munged", "slurmd.n1")
    ]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    cluster.down()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not cluster.folder.exists()
