"""Every card from its official layout to a board: the commands a user types, in small.

The sources hold some dozens of images in the official layouts; networks and counts of each card are
shrunk, everything else (layout, crop, splits, labels, similarity, preset, sampler) is the card's.
SSCD is replaced by plain pixels: tests/test_sscd_faces.py is about SSCD.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import sources
from typer.testing import CliRunner

from membench.cli import app
from membench.record import RECORD
from membench.registry import Registry

pytestmark = pytest.mark.slow

SOURCES: dict[str, Any] = {
    "celeba": sources.celeba,
    "celeba25k": lambda p: sources.celeba(p, unpacked=True, official_tree=True),
    "celebahq_fi": lambda p: sources.write_zip(sources.celebahq_fi(), p / "c.zip", packed=True),
    "cifar10": lambda p: sources.write_folder(sources.cifar10_binary(), p / "x"),
    "cifar10_mini": lambda p: sources.write_zip(sources.cifar10_folders(), p / "c.zip"),
    "imagenet": lambda p: sources.write_tar(sources.imagenet(imagenette=False), p / "i.tar.gz"),
    "lfw": lambda p: sources.write_tar(sources.lfw(flat=False), p / "lfw.tgz"),
}
UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
    "add_attention": False,
}
STEPS = 200


def toml(value: Any) -> str:
    """A value as one line of TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def shrunk(name: str) -> dict[str, Any]:
    """The card `name` with small networks, and counts that its small source can fill."""
    small = sources.card(name, **sources.SMALL[name])
    card = tomllib.loads(Path(Registry().datasets[name].origin).read_text())
    del card["splits"]
    card["preparation"] = small.preparation.model_dump(exclude_none=True)  # type: ignore[union-attr]
    pixels = {"name": "pixels", "input_size": 16}
    if card["similarity"]["name"] == "sscd":
        card["similarity"]["descriptor"] = pixels
        card["attack"]["cluster_descriptor"] = pixels
    card["extraction"]["images_per_scale"] = 4
    card["extraction"]["guidance_scales"] = card["extraction"]["guidance_scales"][:1]
    card["extraction"]["sampling"] |= {"steps": 4, "batch_size": 2}
    card["attack"]["synthetic_images"] = 12
    card["attack"]["network"] |= {"blocks": [1], "width": 4}
    for which in ("label_classifier", "time_classifier"):
        card["attack"][which] |= {"steps": 6, "batch_size": 4, "evaluate_every": 3}
    recipe = card["targets"]["ddpm"]
    recipe["unet"] = UNET
    recipe["training"] |= {
        "steps": STEPS, "batch_size": 2, "evaluate_every": STEPS, "evaluate_images": 2,
        "checkpoint_every": STEPS,
    }  # fmt: skip
    recipe["training"].pop("stop_at", None)
    card["targets"] = {"ddpm": recipe}
    return card | {"splits": {"members": {}, "auxiliary": {}, "heldout": {}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


def test_every_card_is_here() -> None:
    waiting = {"laion2b_subset"}
    assert {*SOURCES} == {*Registry().datasets} - waiting - {"fashion_mini"}


@pytest.mark.parametrize("name", SOURCES)
def test_from_the_official_files_to_a_board(name: str, folder: Path) -> None:
    source = SOURCES[name](folder / "source")
    card = shrunk(name) | {"name": f"small_{name}"}
    name = card["name"]
    (folder / f"{name}.toml").write_text("".join(f"{k} = {toml(v)}\n" for k, v in card.items()))
    if name == "small_lfw":
        sources.lfw_list(folder / name)
    own = ("--plugins", ".", "--data", "data")

    assert "members" in call("prepare", name, "--source", source, *own)
    shutil.rmtree(folder / "source")  # from here on only what was prepared
    call("train", name, "--target", "ddpm", "--device", "cpu", *own)
    log = json.loads((folder / f"results/targets/{name}/ddpm/training.json").read_text())
    assert log["finished"] and log["curve"][-1]["step"] == STEPS

    attack = ("--dataset", name, "--device", "cpu", *own)
    call("run", "--method", "random", *attack)
    call("run", "--method", "side_c", *attack, "--set", "n_clusters=3", "--set", "min_cohesion=0")
    records = sorted((folder / "results/runs" / name).rglob(RECORD))
    assert len(records) == 2
    for path in records:
        record = json.loads(path.read_text())
        assert not record["limited"], record["limited_by"]
        assert record["identity"]["target"]["weights_sha256"] == log["weights_sha256"]
        call("verify", path)
        call("leaderboard", "add", path, "--dir", "boards")
    call("leaderboard", "build", "--dir", "boards")
    board = (folder / f"boards/{name}.md").read_text()
    assert "side_c" in board or "SIDE-C" in board
    call("leaderboard", "check", "--dir", "boards")
