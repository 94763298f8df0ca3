"""Sweeps: what is planned, what is shared, and that the way it is run changes no bit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from diffusers import DDPMScheduler
from pipelines import save_pipeline
from sweeps import (
    BASE,
    Watcher,
    kill,
    made,
    planned,
    records,
    run_inline,
    seals,
    with_young,
    write_file,
    write_method,
)
from typer.testing import CliRunner

from membench import run as engine
from membench.cli import app
from membench.contract import silent
from membench.errors import DiskFull, MembenchError
from membench.files import read_json
from membench.hashing import file_hash
from membench.registry import Registry
from membench.store import with_inputs
from membench.sweep import worker
from membench.sweep.collect import rows, summarise
from membench.sweep.dispatch import cancel, go
from membench.sweep.estimate import estimate
from membench.sweep.folder import Sweep
from membench.sweep.inline import Inline
from membench.sweep.local import Local, memory, why_it_died
from membench.sweep.plan import told_apart
from membench.sweep.show import todo
from membench.sweep.specs import load_sweep
from membench.sweep.tasks import Attempt, Cause, CellPlan
from membench.training import train_target

FIVE = ["random", "ol_ti", "side_o", "side_a", {"name": "side_c", "parameters": {"n_clusters": 4}}]
SIDE_C = {"name": "side_c", "parameters": {"n_clusters": 4, "min_cohesion": 0.0}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at `cancelled` at every step."""
    monkeypatch.setattr(worker, "BEAT", 0.0)
    worker.STOP.clear()


# -- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["random"]}, "method: unknown key"),
        ({"methods": []}, "methods: "),
        ({"methods": [{"name": "random", "scales": [1.0]}]}, "methods.0.scales: unknown key"),
        ({"methods": ["rndom"]}, "methods: no method named 'rndom'; did you mean 'random'"),
        ({"methods": [{"name": "side_c", "parameters": {"n": 3}}]}, "no parameter named 'n'"),
        ({"datasets": ["tinny"]}, "datasets: no data set named 'tinny'; did you mean 'tiny'"),
        ({"targets": ["other"]}, "no target of tiny named 'other'"),
        ({"targets": ["ddpm", "ddpm"]}, "targets: 'ddpm' is named twice"),
        ({"mitigations": ["anti"]}, 'mitigations: expected ["none"]'),
        ({"seeds": ["x"]}, "seeds.0: "),
        ({"images": 0}, "images: "),
        ({"resources": {"image": {"cpus": 1}}}, "resources: no stage named 'image'"),
        ({"resources": {"images": {"gpu": 1}}}, "resources.images.gpu: unknown key"),
        ({"guidance_scales": [-1.0]}, "guidance_scales: expected one or more finite numbers"),
        ({"similarity": {"preset": "dcr_224"}}, "similarity: --preset"),
        ({"name": "../x"}, "name: '../x'"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_field(
    tmp_path: Path, change: dict, message: str
) -> None:
    file = write_file(tmp_path, **change)
    with pytest.raises(MembenchError) as error:
        planned(file, tmp_path / "results")
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_no_file_and_no_toml(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match=r"none.toml: sweep file cannot be read"):
        load_sweep(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("methods = [")
    with pytest.raises(MembenchError, match=r"bad.toml: not valid TOML"):
        load_sweep(tmp_path / "bad.toml")


def test_stages_start_from_the_default(tmp_path: Path) -> None:
    file = write_file(
        tmp_path,
        resources={"default": {"cpus": 1, "partition": "p"}, "images": {"minutes": 3.0}},
    )
    spec = load_sweep(file)
    assert spec.resources_of("images").partition == "p"
    assert spec.resources_of("images").minutes == 3
    assert spec.resources_of("record").minutes is None
    assert spec.name == "sweep"


def test_the_template_is_a_valid_sweep(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["new", "sweep", "mine", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "mine.toml").read_text()
    assert [m.name for m in load_sweep(tmp_path / "mine.toml").methods][-1] == "side_c"
    lines = [line.removeprefix("# ") for line in text.splitlines()[3:]]
    every = [line for line in lines if "=" in line.partition("#")[0] or line.startswith("[")]
    (tmp_path / "all.toml").write_text(_ordered(every))
    spec = load_sweep(tmp_path / "all.toml")  # what is commented out is right too
    assert spec.resources_of("images").gpus == 1
    assert spec.similarity.flips


def _ordered(lines: list[str]) -> str:
    """The template's lines with every table, `methods` too, after the plain keys."""
    methods = 'methods = ["random"]'
    plain: list[str] = [methods]
    tables: list[str] = []
    table = False
    for line in lines:
        if line.startswith("executor"):
            table = False
        if line.startswith("["):
            table = True
        if not line.startswith(("methods", "{", " ")):
            (tables if table else plain).append(line)
    return "\n".join(plain + tables)


# -- the plan -----------------------------------------------------------------------------------


def test_what_methods_share_is_one_task(tmp_path: Path) -> None:
    """Against what each cell asks for on its own, counted by hand from the card."""
    file = write_file(tmp_path, methods=FIVE, seeds=[0, 1], guidance_scales=[0.1, 0.3])
    plan, _ = planned(file, tmp_path / "results")
    assert len(plan.cells) == 10
    counts = Counter(task.stage for task in plan.tasks)
    assert counts == {
        "check": 1,
        "images": 1 + 2 + 2 * 4 * 2,  # synthetic set; random; 4 guided methods at 2 scales
        "classifier": 2 + 3,  # on members, on auxiliary; of each SIDE method
        "facts": 1,
        "matches": 1 + 2 + 16,  # the null; of all images but the synthetic set
        "record": 10,
        "board": 1,
    }
    assert sum("synthetic set" in task.title for task in plan.tasks) == 1
    seen: set[str] = set()
    for task in plan.tasks:
        assert set(task.needs) | set(task.after) <= seen, "each comes after all that it needs"
        seen.add(task.id)
    assert len(seen) == len(plan.tasks)
    drawn, synthetic, steps = 28 * 3, 32 * 3, 3
    assert steps == BASE["steps"]
    # labels of the synthetic set by the classifiers on members and on auxiliary images
    assert plan.calls == (2 * drawn + 16 * drawn + synthetic, 16 * drawn + 2 * 32)
    assert plan.calls_apart == (
        2 * drawn + 16 * drawn + 6 * synthetic,
        16 * drawn + 2 * 2 * 32,
    )
    assert sum(task.unet_calls for task in plan.tasks) == plan.calls[0]


@pytest.mark.parametrize("shards", [2, 7, 100])
def test_shards_share_all_batches(tmp_path: Path, shards: int) -> None:
    file = write_file(tmp_path, shards=shards)
    tasks = planned(file, tmp_path / "results")[0].tasks
    parts = [t.product.parts for t in tasks if t.stage == "images" and t.product]
    assert len(parts) == min(shards, 7)
    assert [i for part in parts for i in range(*part)] == list(range(7))
    assert sum(t.unet_calls for t in tasks) == 28 * 3


def test_methods_without_guidance_are_planned_once(tmp_path: Path) -> None:
    random = [{"name": "random", "guidance_scales": [s]} for s in (0.1, 0.3)]
    plan, _ = planned(write_file(tmp_path, methods=random), tmp_path / "results")
    assert len(plan.cells) == 1


def test_overrides_of_a_method(tmp_path: Path) -> None:
    methods = ["random", SIDE_C | {"images": 8, "guidance_scales": [2.0]}]
    plan, _ = planned(write_file(tmp_path, methods=methods), tmp_path / "results")
    first, second = (cell.spec for cell in plan.prepared.values())
    assert (first.images_per_scale, second.images_per_scale) == (28, 8)
    assert second.guidance_scales == (2.0,)


# -- running ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Ids and result hashes of two cells by `membench.run` alone."""
    folder = tmp_path_factory.mktemp("plain")
    plan, _ = planned(write_file(folder, methods=["random", SIDE_C]), folder / "results")
    found = [engine.run(cell) for cell in plan.prepared.values()]
    return [(record["id"], record["results_sha256"]) for record in found]


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_change_no_bit(tmp_path: Path, shards: int, plain: list[tuple[str, str]]) -> None:
    file = write_file(tmp_path, methods=["random", SIDE_C], shards=shards)
    assert seals(run_inline(file, tmp_path / "results")) == plain


def test_threads_change_no_bit(tmp_path: Path, plain: list[tuple[str, str]]) -> None:
    resources = {"default": {"cpus": 3}}
    file = write_file(tmp_path, methods=["random", SIDE_C], resources=resources)
    assert seals(run_inline(file, tmp_path / "results")) == plain


def test_a_sweep_runs_once(tmp_path: Path) -> None:
    """Again with the same file: nothing is computed; with more seeds: only what is new."""
    results = tmp_path / "results"
    file = write_file(tmp_path)
    first = run_inline(file, results)
    before = {p: p.stat().st_mtime_ns for p in results.rglob("artifact.json")}
    attempts = {task.id: len(first.attempts(task)) for task in first.tasks.values()}
    again = run_inline(file, results)
    assert again.folder == first.folder
    assert attempts == {task.id: len(again.attempts(task)) for task in again.tasks.values()}
    file = write_file(tmp_path, seeds=[0, 1])
    plan, registry = planned(file, results)
    new = {task.stage for task in plan.tasks if task.id in plan.needed}
    assert new == {"check", "images", "matches", "record", "board"}
    assert len(plan.needed) == 5
    found = {line.kind: line for line in estimate(results, todo(plan), "cpu")}
    assert set(found) == {"images", "matches"}
    work = read_json(next(results.glob("artifacts/images/*/artifact.json")))["work"]
    assert found["images"].seconds == pytest.approx(work["seconds"])  # as many as before
    assert found["images"].earlier == 1
    assert found["images"].units == 28 * 3
    run_inline(file, results)
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written, "computed twice"
    assert len(list(results.glob("runs/*/*/*/record.json"))) == 2
    assert registry.folders


def test_summary_and_bills(tmp_path: Path) -> None:
    file = write_file(tmp_path, methods=["random", "side_o", SIDE_C], guidance_scales=[0.1])
    sweep = run_inline(file, tmp_path / "results")
    summary = read_json(sweep.folder / "summary.json")
    assert summary["cells"] == summary["done"] == 3
    plan, _ = planned(file, tmp_path / "results")
    calls = summary["model_calls"]
    assert tuple(calls["together"].values()) == plan.calls, "the bill is the plan"
    assert tuple(calls["apart"].values()) == plan.calls_apart
    lines = (sweep.folder / "summary.csv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("method,parameters,dataset,target,seed,state,task,cause,reason")
    for record, row in zip(records(sweep), summary["rows"], strict=True):
        band = record["scores"]["average"]["bands"]["calibrated"]["mid"]
        assert row["ams"] == band["members"]["ams"]
        assert "images per scale" in row["limited_by"]
    assert summary["boards"] == [], "limited records enter no board"


def test_a_target_beside_the_sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is one from the sweep file, wherever command and workers run."""
    save_pipeline(tmp_path / "models" / "mine", DDPMScheduler())
    file = write_file(tmp_path, targets=["models/mine"], images=8)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sweep = made(file, tmp_path / "results")
    go(sweep, Local(jobs=1))
    (record,) = records(sweep)
    assert record["identity"]["target"]["kind"] == "pretrained"


# -- targets that are trained on the way -----------------------------------------------------------


def young(tmp_path: Path, **changes: Any) -> Path:
    """A sweep over a target with weights, one that is to be trained, and a snapshot of it."""
    targets = ["oracle:0.3", "young", "young@6"]
    return with_young(write_file(tmp_path, **{"targets": targets} | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[str, str]]]:
    """Hash of the weights by `membench train`, and the records of a sweep after it."""
    folder = tmp_path_factory.mktemp("trained")
    file = young(folder)
    registry = Registry([folder / "plugins"])
    done = train_target(
        registry, registry.card("tiny"), "young", folder / "results", device="cpu", resume=False
    )
    return file_hash(done / "model.safetensors"), seals(run_inline(file, folder / "results"))


def test_a_target_is_trained_on_the_way(
    tmp_path: Path, trained: tuple[str, list[tuple[str, str]]]
) -> None:
    results = tmp_path / "results"
    file = young(tmp_path)
    plan, _ = planned(file, results)
    assert [row.waits for row in plan.cells] == [None, "plan-tiny-young", "plan-tiny-young"]
    assert plan.trainings == {("tiny", "young"): 12}
    stages = [task.stage for task in plan.tasks]
    assert stages.count("train") == stages.count("plan") == 1
    assert stages.count("record") == 1, "what is not known yet is not planned"
    sweep = made(file, results)
    before = rows(sweep)
    assert [row["state"] for row in before[1:]] == ["waiting", "waiting"]
    assert before[1]["reason"] == "its target is not trained yet"
    go(sweep, Inline())
    weights = results / "targets" / "tiny" / "young" / "model.safetensors"
    assert (file_hash(weights), seals(sweep)) == trained
    assert [row["state"] for row in rows(sweep)] == ["done"] * 3
    assert read_json(sweep.folder / "summary.json")["done"] == 3, "the board came last"
    again = made(file, results)
    assert again.folder == sweep.folder, "the same file is the same sweep, grown or not"
    assert not go(again, Inline())


def test_a_target_is_trained_by_local_workers(
    tmp_path: Path, trained: tuple[str, list[tuple[str, str]]]
) -> None:
    sweep = made(young(tmp_path), tmp_path / "results")
    go(sweep, Local(jobs=2))
    assert seals(sweep) == trained[1]
    assert read_json(sweep.folder / "summary.json")["done"] == 3


def test_a_training_stops_and_goes_on(
    tmp_path: Path,
    trained: tuple[str, list[tuple[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a step that has no checkpoint of its own; the weights are those of one go."""
    sweep = made(young(tmp_path, targets=["young"]), tmp_path / "results")
    task = sweep.tasks["train-tiny-young"]
    note = worker.Watch._note

    def stop_at_eight(watch: worker.Watch, title: str, done: int, total: int) -> None:
        if done == 8 and len(sweep.attempts(task)) == 1:
            worker.STOP.set()
        note(watch, title, done, total)

    monkeypatch.setattr(worker.Watch, "_note", stop_at_eight)
    go(sweep, Inline())
    (stopped,) = sweep.attempts(task)
    assert (stopped.state, stopped.done, stopped.total) == ("stopped", 8, 12)
    folder = sweep.results / "targets" / "tiny" / "young"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 8
    worker.STOP.clear()
    go(sweep, Inline())
    assert file_hash(folder / "model.safetensors") == trained[0]
    assert [row["state"] for row in rows(sweep)] == ["done"]


def test_a_training_that_fails_names_its_rows(tmp_path: Path) -> None:
    file = young(tmp_path)
    card = tmp_path / "plugins" / "tiny.toml"
    text = card.read_text()
    assert "warmup_steps = 1\n" in text
    card.write_text(text.replace("warmup_steps = 1\n", "warmup_steps = 0\nlearning_rate = 1e30\n"))
    sweep = made(file, tmp_path / "results")
    go(sweep, Inline())
    first, second, third = rows(sweep)
    assert (first["state"], second["state"], third["state"]) == ("done", "skipped", "skipped")
    assert second["task"] == "train-tiny-young" and second["cause"] == str(Cause.MISTAKE)
    assert "lower the learning rate" in second["reason"]
    assert read_json(sweep.folder / "summary.json")["done"] == 1


def test_mistakes_are_found_before_a_training(tmp_path: Path) -> None:
    change = {"methods": [{"name": "side_c", "parameters": {"n": 3}}], "targets": ["young"]}
    with pytest.raises(MembenchError, match="no parameter named 'n'"):
        planned(young(tmp_path, **change), tmp_path / "results")
    plan, _ = planned(
        young(tmp_path, targets=["young"], precision="bfloat16"), tmp_path / "results"
    )
    assert [row.waits for row in plan.cells] == ["plan-tiny-young"]
    with pytest.raises(MembenchError, match=r"young@5.*no such snapshot"):
        planned(young(tmp_path, targets=["young@5"]), tmp_path / "results")


def test_a_dry_run_names_the_trainings(tmp_path: Path) -> None:
    command = ["sweep", str(young(tmp_path)), "--dry-run", "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "training     tiny/young (12 steps)" in result.output
    assert result.output.count("after training") == 2
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["trainings"] == [{"dataset": "tiny", "target": "young", "steps": 12}]


def test_rows_of_one_method_name_what_they_differ_in(tmp_path: Path) -> None:
    again = [
        {"name": "random", "steps": 2},
        {"name": "random", "images": 8, "label": 3},
    ]
    sweep = made(write_file(tmp_path, methods=["random", *again]), tmp_path / "results")
    title = "random on tiny/oracle:0.3, seed 0"
    assert [cell.title for cell in sweep.manifest.cells] == [
        f"{title}, images 28, steps 3",
        f"{title}, images 28, steps 2",
        f"{title}, images 8, steps 3, label 3",
    ]
    scales = [CellPlan(options={"guidance_scales": (0.1, s)}, title="a") for s in (0.3, 1.0)]
    assert [row.title for row in told_apart(scales)] == [
        "a, guidance_scales 0.1+0.3",
        "a, guidance_scales 0.1+1",
    ]


def test_a_dry_run_counts_the_jobs_of_tasks_that_share_one(tmp_path: Path) -> None:
    few = {"default": {"tasks_per_job": 5}}
    file = write_file(tmp_path, seeds=[0, 1, 2, 3, 4, 5], resources=few)
    command = ["sweep", str(file), "--dry-run", "--results", str(tmp_path / "results")]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    stages = found["tasks"]
    assert stages["images"] == stages["record"] == 6 and stages["board"] == 1
    assert stages["matches"] == 1 + 6, "near-duplicates of the data set come before those of cells"
    jobs = {"check": 1, "facts": 1, "matches": 1 + 2, "images": 2, "record": 2, "board": 1}
    assert jobs.keys() == stages.keys() and found["slurm_jobs"] == sum(jobs.values())
    assert f"on Slurm {sum(jobs.values())} jobs" in CliRunner().invoke(app, command).output


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_failing_method_stands_alone(tmp_path: Path) -> None:
    """Errors in code: at import, while it is planned, while it runs; the others go on."""
    methods = ["random", "no_syntax", "no_plan", "no_labels", SIDE_C]
    file = write_file(tmp_path, methods=methods)
    plugins = tmp_path / "plugins"
    (plugins / "no_syntax.py").write_text("@extraction\ndef (")
    write_method(plugins, "no_plan", prepare="lab.no_such_thing")
    write_method(plugins, "no_labels", body="raise ValueError('labels ran out')")
    sweep = run_inline(file, tmp_path / "results")
    found = rows(sweep)
    assert [row["state"] for row in found] == ["done", "failed", "failed", "skipped", "done"]
    assert "SyntaxError" in found[1]["reason"]
    assert "no_such_thing" in found[2]["reason"]
    assert any("lab.no_such_thing" in line for line in found[2]["log"])
    assert found[3]["reason"].startswith("not run, because classifier-")
    assert "ValueError: labels ran out" in found[3]["reason"]
    assert any("labels ran out" in line for line in found[3]["log"])
    assert {row["cause"] for row in found} == {None, "error in code"}
    culprit = sweep.tasks[found[3]["task"]]
    assert len(sweep.attempts(culprit)) == 1, "never tried again"
    go(sweep, Inline())
    assert len(sweep.attempts(culprit)) == 1, "not by going on either"
    go(sweep, Inline(), failed=True)
    assert len(sweep.attempts(culprit)) == 2, "only when it is asked for"
    table = (sweep.folder / "summary.csv").read_text()
    assert "labels ran out" in table


def test_going_on_with_other_code_is_refused_inline(tmp_path: Path) -> None:
    sweep = made(write_file(tmp_path), tmp_path / "results")
    (sweep.code / "membench" / "errors.py").write_text("# other code\n")
    # the snapshot is not what runs here: its hash is compared, not its files
    manifest = json.loads((sweep.folder / "sweep.json").read_text())
    manifest["code"]["sha256"] = "0" * 64
    (sweep.folder / "sweep.json").write_text(json.dumps(manifest))
    with pytest.raises(MembenchError, match="the code has changed"):
        go(Sweep(sweep.folder), Inline())


def test_stop_and_go_on(tmp_path: Path, plain: list[tuple[str, str]]) -> None:
    """SIGTERM at a batch boundary; what is finished is not made again."""
    sweep = made(write_file(tmp_path, methods=["random", SIDE_C]), tmp_path / "results")
    watcher = Watcher(sweep, lambda pid: worker.STOP.set())
    go(sweep, Inline())
    assert not list(sweep.results.glob("runs/*/*/*/record.json"))
    worker.STOP.clear()
    go(sweep, Inline())
    watcher.stop()
    stopped = [a for t in sweep.tasks.values() for a in sweep.attempts(t) if a.state == "stopped"]
    assert watcher.acted and len(stopped) == 1
    assert 0 < stopped[0].done < stopped[0].total
    assert seals(sweep) == plain
    assert not watcher.twice, "a batch was made twice"


def test_a_time_limit_is_a_stop(
    tmp_path: Path, plain: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts that get further do not count as failures, however many it takes."""
    seconds = itertools.count()
    monkeypatch.setattr(worker, "clock", lambda: next(seconds))
    methods, resources = ["random", SIDE_C], {"images": {"minutes": 2.5 / 60}}  # a batch at a time
    file = write_file(tmp_path, methods=methods, resources=resources, retries=0, shards=2)
    sweep = run_inline(file, tmp_path / "results")
    stops = [
        attempt
        for task in sweep.tasks.values()
        for attempt in sweep.attempts(task)
        if attempt.state == "stopped"
    ]
    assert stops and {attempt.cause for attempt in stops} == {Cause.TIME}
    assert stops[0].reason == "stopped after 0.0416667 minutes"
    assert [a.done for a in stops[:5]] == [1, 2, 1, 2, 3], "shards of 3 and of 4 batches"
    assert seals(sweep) == plain


def test_no_progress_is_given_up(tmp_path: Path) -> None:
    resources = {"images": {"minutes": 1e-9}}  # over before the first batch
    file = write_file(tmp_path, resources=resources, retries=1)
    sweep = run_inline(file, tmp_path / "results")
    (row,) = rows(sweep)
    assert row["state"] == "skipped" and row["cause"] == "time limit"
    assert len(sweep.attempts(sweep.tasks[row["task"]])) == 2, "one, and one retry"


def test_cancel_and_retry(tmp_path: Path, plain: list[tuple[str, str]]) -> None:
    """In the middle of a task; then nothing starts until it is retried."""
    sweep = made(write_file(tmp_path, methods=["random", SIDE_C]), tmp_path / "results")
    runner = Inline()
    watcher = Watcher(sweep, lambda pid: cancel(sweep, runner))
    go(sweep, runner)
    watcher.stop()
    assert watcher.acted
    states = Counter((s.state, str(s.cause)) for s in sweep.statuses().values())
    assert states[("failed", "cancelled")] >= 3
    assert states[("running", "None")] == states[("ready", "None")] == 0
    assert worker.work(sweep.folder, "board") == 130
    result = CliRunner().invoke(app, ["retry", str(sweep.folder), "--executor", "inline"])
    assert result.exit_code == 0, result.output
    assert seals(sweep) == plain
    assert "2 of 2 cells done" in result.output


def test_a_full_disk_is_not_an_error_in_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = made(write_file(tmp_path), tmp_path / "results")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    def refuse(path: Path, array: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("membench.lab.write_array", refuse)
        go(sweep, Inline())
    (row,) = rows(sweep)
    assert row["cause"] == "disk full" and "no space left" in row["reason"]
    assert len(sweep.attempts(sweep.tasks[row["task"]])) == 1, "no use in trying at once"
    go(sweep, Inline(), failed=True)
    assert rows(sweep)[0]["state"] == "done"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("x"), Cause.CODE),
        (SystemExit(3), Cause.CODE),
        (MembenchError("x"), Cause.MISTAKE),
        (DiskFull("x"), Cause.DISK),
        (OSError(errno.EDQUOT, "quota"), Cause.DISK),
        (MemoryError(), Cause.MEMORY),
        (OSError(errno.ENOMEM, "x"), Cause.MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate"), Cause.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Cause.MEMORY),
        (RuntimeError("shape mismatch"), Cause.CODE),
    ],
)
def test_causes_of_exceptions(error: BaseException, cause: Cause) -> None:
    assert worker.classify(error)[0] is cause


@pytest.mark.parametrize(
    ("code", "ooms", "cause", "words"),
    [
        (-9, False, Cause.KILLED, "SIGKILL"),
        (-9, True, Cause.MEMORY, "out of memory"),
        (-15, False, Cause.KILLED, "SIGTERM"),
        (-11, False, Cause.CODE, "SIGSEGV"),
        (3, False, Cause.CODE, "code 3: last words"),
    ],
)
def test_causes_of_deaths(code: int, ooms: bool, cause: Cause, words: str) -> None:
    found, reason = why_it_died(code, ["last words"], more_ooms=ooms)
    assert found is cause and words in reason


# -- processes ----------------------------------------------------------------------------------


def test_a_local_worker_dies_and_the_result_is_the_same(
    tmp_path: Path, plain: list[tuple[str, str]]
) -> None:
    """kill -9 in the middle of the images; no batch is made twice.

    A plugin is edited after the submission: workers run what was submitted.
    """
    file = write_file(tmp_path, methods=["random", SIDE_C, "mine"], shards=2)
    plugins = tmp_path / "plugins"
    write_method(plugins, "mine")
    sweep = made(file, tmp_path / "results")
    write_method(plugins, "mine", prepare="raise RuntimeError('edited')")
    watcher = Watcher(sweep, kill)
    go(sweep, Local(jobs=1))
    watcher.stop()
    assert watcher.acted
    assert not watcher.twice, "a batch was made twice"
    assert seals_of(sweep, 2) == plain
    (killed,) = [a for t in sweep.tasks.values() for a in sweep.attempts(t) if a.state != "done"]
    assert killed.cause is Cause.KILLED and "SIGKILL" in killed.reason
    assert rows(sweep)[-1]["state"] == "done", rows(sweep)[-1]


def test_deaths_are_counted(tmp_path: Path) -> None:
    """Two retries, as the file says; a stop that got further is none; `retry` starts anew."""
    sweep = made(write_file(tmp_path, retries=2), tmp_path / "results")
    task = next(task for task in sweep.tasks.values() if task.stage == "images")
    states = []
    for number in range(1, 5):
        if number == 2:
            stop = Attempt(number=2, state="stopped", done=3, total=7)
            sweep.write(task, stop)
        else:
            (sweep.place(task)).mkdir(parents=True, exist_ok=True)
            sweep.write(task, Attempt(number=number, state="running", pid=1))
        states.append(sweep.statuses()[task.id])
        if number != 2:
            sweep.close(task, Cause.NODE, "node x is down")
            assert sweep.attempts_left(task) == (number < 4)
    assert [status.state for status in states] == ["stopped", "stopped", "stopped", "failed"]
    assert states[0].cause is Cause.KILLED and "left no word" in states[0].reason
    status = sweep.statuses()[task.id]
    assert (status.state, status.cause) == ("failed", Cause.NODE)
    go(sweep, Inline())
    assert rows(sweep)[0]["state"] == "done"


def seals_of(sweep: Sweep, count: int) -> list[tuple[str, str]]:
    found = []
    for cell in sweep.manifest.cells[:count]:
        record = read_json(sweep.results / str(cell.folder) / "record.json")
        found.append((record["id"], record["results_sha256"]))
    return found


def test_the_dispatcher_dies(tmp_path: Path, plain: list[tuple[str, str]]) -> None:
    """kill -9 of the command; its worker ends what it began, and the same command goes on."""
    file = write_file(tmp_path, methods=["random", SIDE_C], shards=7)
    results = tmp_path / "results"
    arguments = ["sweep", str(file), "--executor", "local", "--jobs", "1"]
    command = [sys.executable, "-m", "membench.cli", *arguments, "--results", str(results)]
    sweep = made(file, results)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watcher = Watcher(sweep, lambda pid: process.kill(), parts=3)
        output = process.communicate(timeout=120)[0]
    watcher.stop()
    assert watcher.acted and process.returncode == -9, output
    assert not list(results.glob("runs/*/*/*/record.json"))
    result = CliRunner().invoke(app, [*arguments, "--results", str(results)])
    assert result.exit_code == 0, result.output
    assert "it goes on" in result.output
    assert seals(sweep) == plain
    tries = [len(sweep.attempts(task)) for task in sweep.tasks.values()]
    assert max(tries) == 1, "the orphan's task was not begun again"


def test_a_snapshot_is_what_workers_import(tmp_path: Path) -> None:
    """Also from a folder that holds another `membench`, and before an installed one."""
    sweep = made(write_file(tmp_path), tmp_path / "results")
    (tmp_path / "membench").mkdir()
    (tmp_path / "membench" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = (
        "import membench, json; from membench.registry import Registry, package_folder as f\n"
        f"r = Registry([__import__('pathlib').Path({str(sweep.code / 'plugins-1')!r})])\n"
        "print(json.dumps([membench.__file__, str(f('membench_methods.extraction')), "
        "str(f('membench_datasets')), r.datasets['tiny'].origin, r.plugins['random'].origin]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(sweep.code)},
        capture_output=True,
        text=True,
        check=True,
    )
    for place in json.loads(done.stdout):
        assert Path(place).is_relative_to(sweep.code), place
    assert (sweep.code / "plugins-1/tiny/members.images.npy").is_file()
    commit = read_json(sweep.code / "code.json")["git"]
    assert commit is None or set(commit) == {"commit", "dirty"}


def test_too_much_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = write_file(tmp_path, resources={"images": {"cpus": 4096}})
    sweep = made(file, tmp_path / "results")
    with pytest.raises(MembenchError, match=r"resources.images.cpus: 4096, this machine has"):
        go(sweep, Local())
    assert not (sweep.folder / "tasks").exists()
    file = write_file(tmp_path, resources={"matches": {"memory": 1e6}})
    with pytest.raises(MembenchError, match=r"resources.matches.memory: 1e\+06 GiB, this machine"):
        go(made(file, tmp_path / "results"), Local())


def test_gpus_that_matches_ask_for_filter_its_search(tmp_path: Path) -> None:
    file = write_file(tmp_path, resources={"default": {"gpus": 1}, "matches": {"gpus": 2}})
    tasks = {task.stage: task for task in planned(file, tmp_path / "results")[0].tasks}
    assert worker.search_on(tasks["matches"]) == ("cuda:0", "cuda:1")
    assert worker.search_on(tasks["images"]) == ()


def test_memory_is_shared_out(tmp_path: Path) -> None:
    """Tasks that would not fit beside each other follow each other."""
    resources = {"default": {"memory": 0.6 * memory()}}
    sweep = made(write_file(tmp_path, shards=2, resources=resources), tmp_path / "results")
    go(sweep, Local(jobs=2))
    spans = sorted((a.started, a.finished) for t in sweep.tasks.values() for a in sweep.attempts(t))
    assert len(spans) > 4
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


# -- commands -----------------------------------------------------------------------------------


def test_commands(tmp_path: Path) -> None:
    """Dry run, run, status, logs, collect: what they print."""
    file = write_file(tmp_path, methods=["random", "no_labels"])
    write_method(tmp_path / "plugins", "no_labels", body="raise ValueError('labels ran out')")
    results = ["--results", str(tmp_path / "results")]

    def call(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments, *results], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    shown = call("sweep", str(file), "--dry-run")
    for text in (
        "random on tiny/oracle:0.3, seed 0",
        "1 check",
        "no earlier record",
        "model calls",
    ):
        assert text in shown
    assert not (tmp_path / "results").exists()
    counted = json.loads(call("sweep", str(file), "--dry-run", "--json"))
    assert counted["model_calls"]["to_do"] == [28 * 3 * 3 + 32 * 3, 28 * 3 * 2]
    shown = call("sweep", str(file), "--executor", "inline", code=1)
    assert "1 of 2 cells done" in shown and "labels ran out" in shown
    shown = call("sweep", str(file), "--dry-run")
    assert "record there" in shown
    status = json.loads(call("status", "sweep", "--json"))
    assert [cell["state"] for cell in status["cells"]] == ["done", "skipped"]
    assert "error in code" in call("status", "sweep")
    assert "labels ran out" in call("logs", "sweep")
    assert "attempt 1" in call("logs", "sweep", "record-")
    result = CliRunner().invoke(app, ["logs", "sweep", "nothing", *results])
    assert isinstance(result.exception, MembenchError)
    result = CliRunner().invoke(app, ["status", "other", *results])
    assert "no sweep named 'other'" in str(result.exception)
    boards = str(tmp_path / "boards")
    result = CliRunner().invoke(app, ["collect", "sweep", "--dir", boards, *results])
    assert "missing: no_labels" in result.output
    assert "enters no board: 28 images per scale" in result.output
    assert "2 of 2 cells missing" in str(result.exception)


def test_a_board_from_a_sweep(tmp_path: Path) -> None:
    """A card's own settings: the record is not limited, and the sweep builds its board."""
    file = write_file(tmp_path)
    card = tmp_path / "plugins" / "tiny.toml"
    text = card.read_text().replace("images_per_scale = 512", "images_per_scale = 28")
    card.write_text(text.replace("batch_size = 8 }", "batch_size = 4 }"))
    results = tmp_path / "results"
    sweep = run_inline(file, results)
    assert (sweep.folder / "board" / "tiny.md").is_file()
    assert read_json(sweep.folder / "summary.json")["boards"]
    arguments = ["collect", str(sweep.folder), "--dir", str(tmp_path / "boards")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    board = (tmp_path / "boards" / "tiny.md").read_text()
    assert board == (sweep.folder / "board" / "tiny.md").read_text()
    (sweep.folder / "board" / "tiny.md").unlink()
    summarise(sweep)
    assert (sweep.folder / "board" / "tiny.md").is_file()


def test_only_what_a_task_is_for_is_made(tmp_path: Path) -> None:
    """`work` on its own, as a Slurm job calls it, in an order of one's own."""
    sweep = made(write_file(tmp_path, shards=3), tmp_path / "results")
    shards = [task for task in sweep.tasks.values() if task.stage == "images"]
    plan, _ = planned(tmp_path / "sweep.toml", sweep.results)
    (cell,) = plan.prepared.values()
    store = cell.lab.store
    images = next(a for a in with_inputs(cell.artifacts) if a.kind == "images")
    for left, task in reversed(list(enumerate(shards))):
        assert not sweep.done(task) and not store.has(images)
        assert worker.work(sweep.folder, task.id) == 0
        assert sweep.done(task)
        assert store.has(images) == (left == 0), "whoever is last joins the parts"
    assert worker.work(sweep.folder, shards[0].id) == 0
    assert len(sweep.attempts(shards[0])) == 1, "nothing was left to do"
    with pytest.raises(MembenchError, match="no task named 'x'"):
        worker.work(sweep.folder, "x")


@pytest.mark.slow
def test_help_has_an_example(command: Command) -> None:
    for name in ("sweep", "status", "logs", "retry", "cancel", "collect", "new sweep"):
        shown = command(*name.split(), "--help").stdout
        assert f"membench {name}" in shown and "Example" in shown


def test_registry_finds_no_sweep_code_in_plugins(tmp_path: Path) -> None:
    """A plugin folder that holds the results is copied without them."""
    file = write_file(tmp_path)
    results = tmp_path / "plugins" / "results"
    sweep = run_inline(file, results)
    assert (sweep.code / "plugins-1" / "results").is_symlink()
    assert Registry([sweep.code / "plugins-1"]).datasets["tiny"]
    assert silent
