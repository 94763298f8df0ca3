"""The main road, end to end: known answers, resume, verify, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from PIL import Image
from scipy.stats import binomtest

from membench.contract import silent
from membench.data.imageset import Dataset
from membench.errors import MembenchError
from membench.hashing import content_hash
from membench.metrics.intervals import clopper_pearson
from membench.record import RECORD, SHEET, seal
from membench.registry import Registry
from membench.run import Cell, prepare, run
from membench.store import PARTS
from membench.verify import verify


def oracle(registry: Registry, results: Path, rate: float, **options) -> Cell:
    return prepare(
        registry, results, silent, method="random", dataset="fashion_mini",
        target=f"oracle:{rate}", steps=20, device="cpu", **options,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0, 0.3, 1])
def test_an_oracle_gives_its_rate(registry: Registry, tmp_path: Path, rate: float) -> None:
    """AMS is the rate plus chance, within its interval; held-out is at the false-match level."""
    seeds, images = range(4), 256
    cells = [oracle(registry, tmp_path, rate, images=images, seed=seed) for seed in seeds]
    records = [run(cell) for cell in cells]
    total = len(records) * images
    copies = sum(
        cell.lab.target.copies_member(seed, i)
        for cell, seed in zip(cells, seeds, strict=True)
        for i in range(images)
    )
    scores = [record["scores"]["average"] for record in records]
    for level, threshold in records[0]["calibration"]["thresholds"].items():
        bands = [score["bands"]["calibrated"][level] for score in scores]
        allowed = threshold["rate"]
        found = round(sum(band["members"]["ams"] for band in bands) * images)
        assert found >= copies, f"{level}: a copy was missed"
        if copies < total:
            chance = binomtest(found - copies, total - copies, allowed, "greater").pvalue
            assert chance > 1e-3, f"{level}: {found} match, {copies} are copies"
        low, high = clopper_pearson(found, total)
        assert low <= rate + (1 - rate) * allowed, f"{level}: [{low}, {high}]"
        assert high >= rate, f"{level}: [{low}, {high}]"
        heldout = round(sum(band["heldout"]["ams"] for band in bands) * images)
        assert binomtest(heldout, total, allowed, "greater").pvalue > 1e-3, f"{level}: {heldout}"
    ratio = sum(score["l2_ratio"]["members"] for score in scores) / len(scores)
    assert ratio == pytest.approx(copies / total, abs=0.01)
    assert max(score["l2_ratio"]["heldout"] for score in scores) <= 0.01


def test_a_method_and_its_scale_zero_are_random(registry: Registry, tmp_path: Path) -> None:
    options = {"dataset": "fashion_mini", "target": "oracle:0.5", "images": 64, "steps": 5}
    plain = prepare(registry, tmp_path, silent, method="random", **options)
    guided = prepare(
        registry, tmp_path, silent, method="side_c", guidance_scales=(0.0, 1.0), **options
    )
    assert guided.images[0.0].key == plain.images[0.0].key
    assert guided.images[1.0].key != plain.images[0.0].key
    assert guided.id != plain.id


def test_a_record_is_complete_and_verifies(registry: Registry, tmp_path: Path) -> None:
    cell = oracle(registry, tmp_path, 0.5, images=96)
    record = run(cell)
    folder = cell.folder
    assert json.loads((folder / RECORD).read_text()) == record
    assert record["id"] == content_hash(record["identity"])
    assert record["limited"]
    assert "96 images per scale, not 512" in record["limited_by"]
    assert record["cost"]["unet_calls"] == 96 * 20
    assert record["cost"]["classifier_calls"] == 0
    images = np.load(folder / "images-0.npy")
    assert images.shape == (96, 16, 16, 1)
    with Image.open(folder / SHEET) as picture:
        assert min(picture.size) > 200
    assert verify(folder)["id"] == verify(folder / RECORD)["id"] == record["id"]
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    shutil.rmtree(tmp_path / "artifacts")
    assert verify(moved)["id"] == record["id"]


def set_at(record: dict, path: tuple[str | int, ...], change) -> None:
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = change(record[path[-1]])


BAND = ("scores", "scales", "0", "bands", "calibrated", "mid")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((*BAND, "members", "ams"), "bands.calibrated.mid.members.ams is"),
        ((*BAND, "heldout", "ums_interval", 0), "heldout.ums_interval[0] is"),
        (("scores", "average", "l2_ratio", "members"), "scores.average.l2_ratio.members is"),
        (("scores", "scales", "0", "curve", "members", "ams", 77), "curve.members.ams[77] is"),
        (("calibration", "thresholds", "low", "value"), "calibration.thresholds.low.value is"),
        (("identity", "seed"), "id is not the hash of identity"),
        (("attack", "tampered"), "results_sha256 is not the hash"),
    ],
)
def test_verify_finds_any_change(registry: Registry, tmp_path: Path, path, message: str) -> None:
    """Even when whoever changes a number also mends the hash of the whole."""
    cell = oracle(registry, tmp_path, 0.5, images=32)
    record = run(cell)
    if path[-1] == "tampered":
        record["attack"]["tampered"] = 1
    else:
        set_at(record, path, lambda value: value + 0.25 if isinstance(value, float) else value + 1)
        record["results_sha256"] = seal(record)
    (cell.folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(MembenchError) as error:
        verify(cell.folder)
    assert message in str(error.value)
    assert str(cell.folder / RECORD) in str(error.value)


@pytest.mark.parametrize("name", ["matches-0.npz", "images-0.npy", "matches-heldout.npz"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_verify_names_a_damaged_file(
    registry: Registry, tmp_path: Path, name: str, damage: str
) -> None:
    cell = oracle(registry, tmp_path, 0.5, images=32)
    run(cell)
    path = cell.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[:-10])
    with pytest.raises(MembenchError) as error:
        verify(cell.folder)
    assert str(path) in str(error.value)


def test_batches_are_shared_by_nothing_but_the_store(registry: Registry, tmp_path: Path) -> None:
    """A second run of the same cell computes nothing and gives the same results."""
    first = run(oracle(registry, tmp_path, 0.5, images=64))
    again = run(oracle(registry, tmp_path, 0.5, images=64))
    assert again["results_sha256"] == first["results_sha256"]
    assert all(stage["cached"] for stage in again["cost"]["stages"])
    assert not any(stage["cached"] for stage in first["cost"]["stages"])


def test_other_seeds_and_steps_are_other_records(registry: Registry, tmp_path: Path) -> None:
    cells = [
        oracle(registry, tmp_path, 0.5),
        oracle(registry, tmp_path, 0.5, seed=1),
        oracle(registry, tmp_path, 0.4),
        oracle(registry, tmp_path, 0.5, images=511),
        oracle(registry, tmp_path, 0.5, batch_size=32),
        prepare(
            registry, tmp_path, silent, method="random", dataset="fashion_mini",
            target="oracle:0.5", steps=25,
        ),
    ]  # fmt: skip
    assert len({cell.id for cell in cells}) == len(cells)


def test_kill_9_loses_at_most_a_batch(command: Command, tmp_path: Path) -> None:
    line = ["run", "--method", "random", "--dataset", "fashion_mini", "--target", "oracle:0.5"]
    line += ["--images", "1024", "--steps", "30", "--json"]
    whole = json.loads(command(*line, "--results", "whole").stdout)

    process = subprocess.Popen(
        [sys.executable, "-m", "membench.cli", *line, "--results", "killed"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    images = tmp_path / "killed" / "artifacts" / "images"
    while len(list(images.glob(f"*.partial/{PARTS}/batch-*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (partial,) = images.glob("*.partial")
    finished = sorted(partial.glob(f"{PARTS}/batch-*.json"))
    assert 3 <= len(finished) < 16
    # A second copy in which a finished batch is black: what was finished is not computed again.
    shutil.copytree(tmp_path / "killed", tmp_path / "black")
    black = tmp_path / "black" / finished[0].relative_to(tmp_path / "killed").with_suffix(".npy")
    np.save(black, np.zeros_like(np.load(black)))

    resumed = json.loads(command(*line, "--results", "killed").stdout)
    assert resumed["results_sha256"] == whole["results_sha256"]
    assert resumed["cost"]["unet_calls"] == whole["cost"]["unet_calls"]
    assert not list(images.glob("*.partial"))
    command(*line, "--results", "black")
    joined = np.load(next((tmp_path / "black" / "artifacts" / "images").glob("*/images.npy")))
    assert not joined[:64].any()
    assert joined[64:].any()


def test_the_command_as_a_user_types_it(command: Command, tmp_path: Path) -> None:
    line = ["run", "--method", "random", "--dataset", "fashion_mini", "--target", "oracle:0.3"]
    line += ["--images", "64", "--steps", "10"]
    plan = command(*line, "--dry-run").stdout
    assert "640" in plan
    assert not (tmp_path / "results").exists()
    shown = command(*line).stdout
    for word in ("AMS", "UMS", "held-out", "excess", "record", "plain images"):
        assert word in shown, shown
    record = next((tmp_path / "results").glob("runs/*/*/*/record.json"))
    assert "every number recomputed" in command("verify", record).stdout
    assert "cached" in command(*line, "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --method sidec --dataset fashion_mini", "did you mean 'side_c'"),
        ("run --method side_c --dataset celebb", "no data set named 'celebb'"),
        ("run --method side_c --dataset fashion_mini --target ddmp", "did you mean 'ddpm'"),
        ("run --method random --dataset fashion_mini --target oracle:2", "oracle:RATE"),
        ("run --method random --dataset fashion_mini --device cuda:99", "--device cuda:99"),
        ("run --method random --dataset fashion_mini --guidance-scale a", "--guidance-scale a"),
        ("run --method side_c --dataset fashion_mini --guidance-scale nan", "guidance_scales"),
        ("run --method random --dataset fashion_mini --target oracle:1 --steps 5000", "--steps"),
        ("run --method side_c --dataset fashion_mini --set k=3", "no parameter named 'k'"),
        ("run --method random --dataset fashion_mini --plugins nowhere", "expects a folder"),
        (
            "run --method side_c --dataset fashion_mini --set n_clusters=1000",
            "are too few for 1000",
        ),
        ("run --method side_c --dataset fashion_mini --set n_clusters=1", "at least 2 clusters"),
        ("run --method random --dataset fashion_mini --results /dev/null/x", "--results"),
        ("train fashion_mini --target nothing", "no target of fashion_mini named 'nothing'"),
        ("verify nowhere.json", "nowhere.json: no such file"),
        ("list method", "did you mean 'methods'"),
        ("info nothing", "no plugin, data set, target or metric named 'nothing'"),
        ("test nothing", "no plugin named 'nothing'"),
        ("new method 3d", "a Python name in small letters"),
    ],
)
def test_one_line_and_exit_code_2(
    command: Command, tmp_path: Path, arguments: str, message: str
) -> None:
    result = command(*arguments.split(), check=False)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "results").exists()


def test_list_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; sys.argv = ['membench', 'list']\n"
        "from membench.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'diffusers', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "side_c" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    ["", "list", "info", "run", "train", "verify", "new method", "test", "leaderboard build",
     "leaderboard check", "leaderboard add"],
)  # fmt: skip
def test_help_has_an_example(command: Command, arguments: str) -> None:
    shown = command(*arguments.split(), "--help").stdout
    assert "Usage" in shown
    if arguments:
        assert f"membench {arguments}" in shown
        assert "Example" in shown


def test_new_test_run(command: Command, tmp_path: Path) -> None:
    """A new method from nothing to a record, as `membench new` says."""
    said = command("new", "method", "my_attack").stdout
    assert (tmp_path / "my_attack.py").is_file()
    assert command("new", "method", "my_attack", check=False).returncode == 2
    assert "membench test my_attack --plugins ." in said
    tested = command("test", "my_attack", "--plugins", ".")
    assert "FAILED" not in tested.stdout
    assert "my_attack" in command("list", "methods", "--plugins", ".").stdout
    line = "run --method my_attack --dataset fashion_mini --target oracle:0.3 --plugins ."
    plan = command(*line.split(), "--images", 64, "--dry-run").stdout
    assert "by_brightness" in plan


def test_target_without_weights_says_how_to_train_it(
    registry: Registry, fashion_mini: Dataset, tmp_path: Path
) -> None:
    text = Path(registry.datasets["fashion_mini"].origin).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("weights")]
    (tmp_path / "mine.toml").write_text("\n".join(lines).replace('"fashion_mini"', '"mine"'))
    (tmp_path / "mine").symlink_to(registry.data_folder("fashion_mini"))
    with pytest.raises(MembenchError, match="membench train mine --target ddpm"):
        prepare(Registry([tmp_path]), tmp_path, silent, method="random", dataset="mine")
