"""Pretrained targets on the main road: run, diverge, cards that name them, and `targets`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from diffusers import DDPMPipeline, DDPMScheduler
from pipelines import save_pipeline
from safetensors.torch import load_file

from membench import diverge, inspecting
from membench.contract import silent
from membench.data.imageset import Dataset
from membench.diffusion.targets import OracleTarget
from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.hub import locate
from membench.lab import Lab
from membench.registry import Registry
from membench.run import Cell, prepare, run
from membench.specs import DataCard, load_card
from membench.specs_pretrained import Pretrained
from membench.store import Store
from membench.targets import resolve_target
from membench.verify import verify

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pipeline(folder, DDPMScheduler(prediction_type="v_prediction"))
    return folder


def few(registry: Registry, results: Path, target: str, **options) -> Cell:
    return prepare(
        registry, results, silent, method="random", dataset="fashion_mini", target=target,
        images=8, steps=2, device="cpu", **options,
    )  # fmt: skip


# --- the command line


def test_a_folder_is_run_and_its_record_verifies(
    command: Command, pipeline: Path, tmp_path: Path
) -> None:
    arguments = (
        "run", "--method", "random", "--dataset", "fashion_mini", "--target", pipeline,
        "--images", 8, "--steps", 2, "--device", "cpu", "--json",
    )  # fmt: skip
    record = json.loads(command(*arguments).stdout)
    sha256 = file_hash(pipeline / WEIGHTS)
    target = record["identity"]["target"]
    assert target["name"] == f"tiny@{sha256[:8]}"
    assert target["weights_sha256"] == sha256
    assert target["prediction_type"] == "v_prediction"
    assert record["provenance"]["target"]["commit"] is None
    assert str(pipeline.parent) not in json.dumps(record)
    name = f"tiny@{sha256[:8]}"
    (folder,) = tmp_path.glob(f"results/runs/fashion_mini/{name}/random-*/")
    assert verify(folder)["id"] == record["id"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("nowhere.toml", "cannot be read"),
        ("no_such_target", "no target of fashion_mini named"),
        ("some/model@main", "revision"),
    ],
)
def test_targets_that_are_not_there(
    registry: Registry, tmp_path: Path, target: str, message: str
) -> None:
    with pytest.raises(MembenchError, match=message) as error:
        few(registry, tmp_path, target)
    assert target.partition("@")[0] in str(error.value) and "\n" not in str(error.value)


def test_a_toml_describes_a_target(registry: Registry, tmp_path: Path, pipeline: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "tiny")
    place = tmp_path / "mine.toml"
    place.write_text('pretrained = "tiny"\n')
    direct = few(registry, tmp_path / "results", str(pipeline))
    named = few(registry, tmp_path / "results", str(place))
    assert named.id == direct.id
    place.write_text('pretrained = "tiny"\nscheduler = { prediction_type = "sample" }\n')
    assert few(registry, tmp_path / "results", str(place)).id != direct.id
    place.write_text('pretrained = "tiny"\nschedular = {}\n')
    with pytest.raises(MembenchError, match=r"mine\.toml: schedular: unknown key"):
        few(registry, tmp_path / "results", str(place))


def test_a_divergence_of_a_conditional_pipeline(small: Dataset, tmp_path: Path) -> None:
    """p(x | y) where members have the model's labels, else p(x) only."""
    extraction = small.card.extraction.model_copy(update={"images_per_scale": 4})
    card = small.card.model_copy(update={"extraction": extraction})
    data = Dataset(card, small.members, small.auxiliary, small.heldout)

    def cell(classes: int, marginal: bool) -> diverge.Cell:
        folder = tmp_path / f"of_{classes}"
        if not folder.is_dir():
            save_pipeline(folder, num_class_embeds=classes)
        target = resolve_target(str(folder), card, data, Registry(), tmp_path, "cpu")
        spec = diverge.settle(
            len(data.members), estimator="elbo", epsilons=(0.1,), images=2, steps=2, probes=1,
            marginal=marginal,
        )  # fmt: skip
        return diverge.build_cell(spec, Lab(data, target, Store(tmp_path / "results"), silent))

    for classes, marginal in ((10, False), (12, True)):
        record = diverge.run(cell(classes, marginal))
        assert record["identity"]["conditional"] is not marginal
        (row,) = record["results"]["epsilons"]
        assert np.isfinite(row["memorization_divergence"]["members"]["value"])
    with pytest.raises(MembenchError, match="take --marginal, or --estimator knn"):
        cell(12, False)


# --- cards


def write_card(folder: Path, registry: Registry, change) -> Path:
    """A card of one's own over the embedded data set, whose arrays lie beside it."""
    origin = Path(registry.datasets["fashion_mini"].origin)
    text = origin.read_text().replace('name = "fashion_mini"', 'name = "mine"', 1)
    shutil.copytree(origin.with_suffix(""), folder / "mine", copy_function=shutil.copyfile)
    path = folder / "mine.toml"
    path.write_text(change(text))
    return path


def test_a_card_names_a_pretrained_default(
    registry: Registry, tmp_path: Path, pipeline: Path
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    sha256 = file_hash(pipeline / WEIGHTS)

    def add(text: str) -> str:
        more = (
            '\n[targets.theirs]\ntitle = "a pipeline"\npretrained = "models/tiny"\n'
            f'weights_sha256 = "{sha256}"\n'
            '\n[targets.theirs_x0]\nextends = "theirs"\ntitle = "misread"\n'
            'scheduler = { prediction_type = "sample" }\n'
        )
        return text.replace('default_target = "ddpm"', 'default_target = "theirs"', 1) + more

    write_card(plugins, registry, add)
    shutil.copytree(pipeline, plugins / "mine" / "models" / "tiny")
    own = Registry([plugins])
    card = own.card("mine")
    assert isinstance(card.targets["theirs"], Pretrained)
    cell = prepare(own, tmp_path / "r", silent, method="random", dataset="mine", images=8, steps=2)
    record = run(cell)
    assert record["identity"]["target"]["name"] == "theirs"
    assert record["identity"]["target"]["prediction_type"] == "v_prediction"
    options = {"method": "random", "dataset": "mine", "images": 8, "steps": 2}
    other = prepare(own, tmp_path / "r", silent, target="theirs_x0", **options)
    assert other.lab.target.identity["prediction_type"] == "sample"
    oracle = prepare(own, tmp_path / "r", silent, target="oracle:1", **options)
    assert oracle.lab.target.identity["beta_schedule"] == "linear"
    with pytest.raises(MembenchError, match=r"'theirs' of mine is pretrained .* nothing to train"):
        card.recipe("theirs")
    found = inspecting.show(own, "mine/theirs", tmp_path / "r", None)
    assert found["fits"] == {"mine": "yes"}


def test_the_oracles_of_our_cards_keep_their_schedule(fashion_mini: Dataset) -> None:
    card = fashion_mini.card
    only = card.model_copy(
        update={"targets": {"theirs": Pretrained(title="x", pretrained="x")},
                "default_target": "theirs"}
    )  # fmt: skip
    bare = Dataset(only, fashion_mini.members, fashion_mini.auxiliary, fashion_mini.heldout)
    assert card.noise_recipe is card.targets["ddpm"]
    assert only.noise_recipe is None
    assert OracleTarget(bare, 0.5).identity == OracleTarget(fashion_mini, 0.5).identity


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ('pretrained = "x"\nunet = {}', "targets.theirs.unet: unknown key"),
        ('extends = "ddpm"\npretrained = "x"', "targets.theirs.extends: 'ddpm' is a recipe"),
        ('pretrained = "x"\nrevision = "main"', "targets.theirs.revision: String should match"),
        ('pretrained = "x"\nlayout = "improved_diffusion"', "targets.theirs: network: needed"),
        ('pretrained = "x"\nallow_pickle = true', "targets.theirs: allow_pickle: give weights_sha"),
        ('pretrained = "x"\nfile = "../y"', "targets.theirs.file: expected a name inside"),
        ("", "targets.theirs.unet: Field required"),
    ],
)
def test_a_bad_target_names_its_field(
    registry: Registry, tmp_path: Path, target: str, message: str
) -> None:
    text = Path(registry.datasets["fashion_mini"].origin).read_text()
    path = tmp_path / "fashion_mini.toml"
    path.write_text(f'{text}\n[targets.theirs]\ntitle = "x"\n{target}\n')
    with pytest.raises(MembenchError) as error:
        load_card(path)
    assert message in str(error.value)


def test_recipes_are_read_as_before(registry: Registry) -> None:
    for source in registry.datasets:
        try:
            card = registry.card(source)
        except MembenchError:
            continue  # waits for something
        assert isinstance(card, DataCard)
        assert all(card.recipe(name) is target for name, target in card.targets.items())


# --- the hub, without a network


def fake_cache(folder: Path, pipeline: Path) -> None:
    """A model in the local cache, laid out as the hub's client does."""
    repository = folder / "models--someone--tiny"
    shutil.copytree(pipeline, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_hub_id_is_pinned_and_cached(
    tmp_path: Path, registry: Registry, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MembenchError, match="someone/tiny: no such folder, and not to be had"):
        locate("someone/tiny", [tmp_path])
    fake_cache(tmp_path / "cache", pipeline)
    for revision in (None, COMMIT):
        assert locate("someone/tiny", [tmp_path], revision).commit == COMMIT
    cell = few(registry, tmp_path / "results", f"someone/tiny@{COMMIT}")
    assert cell.spec.target == f"someone/tiny@{file_hash(pipeline / WEIGHTS)[:8]}"
    assert run(cell)["provenance"]["target"]["commit"] == COMMIT
    assert (
        cell.lab.target.identity
        == few(registry, tmp_path / "results", str(pipeline)).lab.target.identity
    )
    with pytest.raises(MembenchError, match="not to be had from the hub"):
        locate("someone/tiny", [tmp_path], "f" * 40)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    with pytest.raises(MembenchError, match="revision is for hub ids"):
        locate("someone/tiny", [tmp_path], COMMIT)


# --- membench targets


def test_show(command: Command, registry: Registry, tmp_path: Path, pipeline: Path) -> None:
    found = json.loads(command("targets", "show", pipeline, "--json").stdout)
    assert found["weights_sha256"] == file_hash(pipeline / WEIGHTS)
    assert found["parameters"] == sum(t.numel() for t in load_file(pipeline / WEIGHTS).values())
    assert found["prediction_type"] == "v_prediction"
    assert found["fits"] == ["fashion_mini"]
    unfit = inspecting.show(registry, str(pipeline), tmp_path, "cifar10")
    reason = "no: it makes images of 1 channel(s), the data set's have 3"
    assert unfit["fits"] == {"cifar10": reason}
    with pytest.raises(MembenchError, match="ddpm"):
        inspecting.show(registry, "fashion_mini/dppm", tmp_path, None)
    ours = inspecting.show(registry, "fashion_mini/ddpm", tmp_path, None)
    assert ours["weights_sha256"] == registry.card("fashion_mini").recipe("ddpm").weights_sha256


def test_convert(command: Command, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4).T, "b": torch.arange(3)}
    tensors["shared"] = tensors["b"]
    source, out = tmp_path / "model.pt", tmp_path / "model.safetensors"
    torch.save(tensors, source)
    sha256 = file_hash(source)
    with pytest.raises(MembenchError, match=sha256):
        inspecting.convert(source, None, out)
    with pytest.raises(MembenchError, match=f"SHA-256 is {sha256}, expected 0"):
        inspecting.convert(source, "0" * 64, out)
    assert not out.exists()
    said = command("targets", "convert", source, "--out", out, "--sha256", sha256).stdout
    assert file_hash(out) in said
    found = load_file(out)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(MembenchError, match="there already"):
        inspecting.convert(source, sha256, out)


@pytest.mark.parametrize("target", ["ddpm", "ddpm_labels"])
def test_an_exported_target_gives_the_same_images(
    registry: Registry, tmp_path: Path, target: str
) -> None:
    out = inspecting.export(registry, f"fashion_mini/{target}", tmp_path, tmp_path / "exported")
    assert isinstance(DDPMPipeline.from_pretrained(out), DDPMPipeline)
    ours = run(few(registry, tmp_path / "results", target))
    theirs = run(few(registry, tmp_path / "results", str(out)))
    assert ours["files"]["images-0.npy"] == theirs["files"]["images-0.npy"]
    assert ours["scores"] == theirs["scores"]
    assert ours["id"] != theirs["id"]
    with pytest.raises(MembenchError, match="not an empty folder"):
        inspecting.export(registry, "fashion_mini/ddpm", tmp_path, out)
