"""Training: resumable to the bit, a prefix when stopped early, honest about damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from membench.data.imageset import Dataset
from membench.diffusion.sampler import from_uint8
from membench.diffusion.targets import load_unet_target, read_safetensors
from membench.diffusion.train import (
    CHECKPOINT,
    LOG,
    WEIGHTS,
    draw_step,
    learning_rate,
    noise_loss,
    snapshot,
    snapshot_steps,
    train,
)
from membench.diffusion.unet import schedule_abar
from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.registry import Registry
from membench.specs import TargetRecipe
from membench.targets import resolve_target
from membench.training import memorised_share


@pytest.fixture
def recipe(small: Dataset) -> TargetRecipe:
    whole = small.card.targets["ddpm"]
    network = {"block_out_channels": (16, 16), "norm_num_groups": 4}
    network |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    steps = {"steps": 12, "stop_at": None, "warmup_steps": 3, "batch_size": 8}
    pace = {"checkpoint_every": 4, "evaluate_every": 6, "evaluate_images": 8}
    return whole.model_copy(
        update={
            "weights": None,
            "weights_sha256": None,
            "unet": whole.unet.model_copy(update=network),
            "training": whole.training.model_copy(update=steps | pace),
        }
    )


class Killed(Exception):
    pass


def do(recipe: TargetRecipe, small: Dataset, folder: Path, *, stop: int | None = None, **options):
    def report(step: int, loss: float) -> None:
        if step == stop:
            raise Killed

    return train(
        recipe, small.card.images, small.members, small.heldout_twin,
        small.card.splits.members.images_sha256, folder,
        probe=memorised_share(small), report=report, **options,
    )  # fmt: skip


def test_resume_gives_the_same_weights_and_log(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    whole = do(recipe, small, tmp_path / "whole")
    for stop in (6, 11):
        with pytest.raises(Killed):
            do(recipe, small, tmp_path / "killed", stop=stop, resume=True)
    resumed = do(recipe, small, tmp_path / "killed", resume=True)
    assert file_hash(tmp_path / "whole" / WEIGHTS) == file_hash(tmp_path / "killed" / WEIGHTS)
    assert resumed["curve"] == whole["curve"]
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert [point["step"] for point in whole["curve"]] == [6, 12]
    assert json.loads((tmp_path / "whole" / LOG).read_text()) == whole


def test_stopping_early_is_a_prefix(recipe: TargetRecipe, small: Dataset, tmp_path: Path) -> None:
    early = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"stop_at": 6})}
    )
    do(early, small, tmp_path / "early")
    with pytest.raises(Killed):
        do(recipe, small, tmp_path / "whole", stop=7)
    whole = torch.load(tmp_path / "whole" / CHECKPOINT, weights_only=True)
    assert whole["step"] == 4
    do(recipe, small, tmp_path / "early", resume=True)
    do(recipe, small, tmp_path / "whole", resume=True)
    assert file_hash(tmp_path / "early" / WEIGHTS) == file_hash(tmp_path / "whole" / WEIGHTS)


def test_the_trained_weights_are_a_target(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    log = do(recipe, small, tmp_path)
    target = load_unet_target(recipe, small.card.images, tmp_path / WEIGHTS)
    assert target.identity["weights_sha256"] == log["weights_sha256"]
    eps = target.eps_model(0, range(2))(torch.zeros(2, 1, 16, 16), 500)
    assert eps.shape == (2, 1, 16, 16)
    assert torch.isfinite(eps).all()


def test_loss_goes_down(recipe: TargetRecipe, small: Dataset, tmp_path: Path) -> None:
    training = {"steps": 80, "evaluate_every": 20, "checkpoint_every": 80}
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
    curve = do(longer, small, tmp_path)["curve"]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]


def test_a_folder_under_way_is_not_overwritten(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    do(recipe, small, tmp_path)
    with pytest.raises(MembenchError, match="--resume"):
        do(recipe, small, tmp_path)


def test_checkpoints_of_others_and_damaged_ones_are_refused(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    do(recipe, small, tmp_path)
    other = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"learning_rate": 1.0})}
    )
    with pytest.raises(MembenchError, match="of another recipe"):
        do(other, small, tmp_path, resume=True)
    checkpoint = tmp_path / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(MembenchError, match=r"checkpoint\.pt: damaged"):
        do(recipe, small, tmp_path, resume=True)


def test_learning_rate_schedule(recipe: TargetRecipe) -> None:
    training = recipe.training
    assert learning_rate(training, 0) == pytest.approx(training.learning_rate / 3)
    assert learning_rate(training, 2) == pytest.approx(training.learning_rate)
    assert learning_rate(training, 12) == pytest.approx(training.final_learning_rate)
    middle = (training.learning_rate + training.final_learning_rate) / 2
    assert learning_rate(training, 3) == pytest.approx(training.learning_rate)
    assert learning_rate(training.model_copy(update={"steps": 9}), 6) == pytest.approx(middle)


def test_steps_depend_on_their_number_alone(recipe: TargetRecipe) -> None:
    first = draw_step(10, (1, 2, 2), recipe.training, 1000, 5)
    draw_step(10, (1, 2, 2), recipe.training, 1000, 6)
    again = draw_step(10, (1, 2, 2), recipe.training, 1000, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    t = torch.cat([draw_step(10, (1, 2, 2), recipe.training, 1000, k)[1] for k in range(500)])
    assert 0 <= t.min() < 10
    assert 990 < t.max() <= 999
    assert t.float().mean() == pytest.approx(499.5, abs=4 * 1000 / np.sqrt(12 * len(t)))


def changed(recipe: TargetRecipe, **training: object) -> TargetRecipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def test_resume_is_exact_with_dropout(recipe: TargetRecipe, small: Dataset, tmp_path: Path) -> None:
    noisy = recipe.model_copy(update={"unet": recipe.unet.model_copy(update={"dropout": 0.3})})
    do(noisy, small, tmp_path / "whole")
    with pytest.raises(Killed):
        do(noisy, small, tmp_path / "killed", stop=6)
    torch.manual_seed(123)
    do(noisy, small, tmp_path / "killed", resume=True)
    do(recipe, small, tmp_path / "without")
    whole = file_hash(tmp_path / "whole" / WEIGHTS)
    assert whole == file_hash(tmp_path / "killed" / WEIGHTS)
    assert whole != file_hash(tmp_path / "without" / WEIGHTS)


def test_a_snapshot_is_the_run_stopped_there(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    log = do(changed(recipe, snapshots=(3, 6)), small, tmp_path / "whole")
    do(changed(recipe, stop_at=6), small, tmp_path / "early")
    six = snapshot(tmp_path / "whole", 6)
    assert file_hash(six) == file_hash(tmp_path / "early" / WEIGHTS) == log["snapshots"]["6"]
    assert snapshot_steps(tmp_path / "whole") == ["3", "6"]
    with pytest.raises(MembenchError, match="past snapshot 5, which was not kept"):
        do(changed(recipe, snapshots=(3, 5)), small, tmp_path / "whole", resume=True)


def test_snapshots_beyond_the_end_are_refused(recipe: TargetRecipe) -> None:
    with pytest.raises(ValidationError, match="snapshots: 13 is no step of 1 to 12"):
        type(recipe.training).model_validate(recipe.training.model_dump() | {"snapshots": [13]})


def test_noise_loss_is_that_of_a_denoiser_known_in_closed_form(small: Dataset) -> None:
    """A network that always says 0 has a loss of mean eps^2, one that knows x_0 has none."""
    abar = torch.tensor(schedule_abar(small.card.targets["ddpm"]))
    images = np.asarray(small.members.images[:100])

    class Zero(torch.nn.Module):
        def forward(self, x_t, t, return_dict):
            return (torch.zeros_like(x_t),)

    class Knows(torch.nn.Module):
        """All images are one and the same, so that eps follows from x_t."""

        def forward(self, x_t, t, return_dict):
            a = abar[t].view(-1, 1, 1, 1)
            x_0 = from_uint8(images[:1])
            return (((x_t - a.sqrt() * x_0) / (1 - a).sqrt()).float(),)

    zero = noise_loss(Zero(), abar, images, None, 5, "cpu")
    eps = torch.randn((100, 1, 16, 16), generator=torch.Generator().manual_seed(5))
    assert zero == pytest.approx(1, abs=5 * np.sqrt(2 / eps.numel()))
    assert noise_loss(Zero(), abar, images, None, 5, "cpu", batch_size=7) == pytest.approx(
        zero, abs=5 * np.sqrt(2 / eps.numel())
    )
    assert noise_loss(Knows(), abar, np.repeat(images[:1], 100, 0), None, 5, "cpu") < 1e-6
    assert noise_loss(Knows(), abar, images, None, 5, "cpu") > 0.1


def test_the_curve_tells_members_from_heldout(
    recipe: TargetRecipe, small: Dataset, tmp_path: Path
) -> None:
    last = do(recipe, small, tmp_path)["curve"][-1]
    assert 0 < last["noise_loss_members"] < 2
    assert 0 < last["noise_loss_heldout"] < 2
    assert last["noise_loss_members"] != last["noise_loss_heldout"]


def card_of(registry: Registry, folder: Path) -> None:
    """A card `mine` with fashion_mini's images and a training of 60 steps, in `folder`."""
    text = Path(registry.datasets["fashion_mini"].origin).read_text()
    for old, new in (
        ('"fashion_mini"', '"mine"'),
        ("steps = 16000", "steps = 60"),
        ("stop_at = 13000", "stop_at = 60"),
        ("stop_at = 6500", "stop_at = 30"),
        ("checkpoint_every = 250", "checkpoint_every = 10"),
        ("evaluate_every = 1000", "evaluate_every = 30"),
        ("evaluate_images = 256", "evaluate_images = 4"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "mine.toml").write_text(text)
    (folder / "mine").symlink_to(registry.data_folder("fashion_mini"))


def start(folder: Path, results: str, *extra: str, launch: tuple[str, ...] = ("-m", "membench")):
    """`membench train mine --target ddpm` in a process of its own."""
    line = ["train", "mine", "--target", "ddpm", "--results", results, "--plugins", ".", *extra]
    return subprocess.Popen(
        [sys.executable, *launch, *line],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def trained(folder: Path, results: str) -> Path:
    return folder / results / "targets" / "mine" / "ddpm"


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "membench")
"""What `accelerate launch` does on GPUs; for CPUs it would want MPI."""


def test_two_processes_train_as_one(registry: Registry, tmp_path: Path) -> None:
    """The same 20 steps by one process and by two that share each batch."""
    card_of(registry, tmp_path)
    text = (tmp_path / "mine.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("stop_at = 60", "stop_at = 20"))
    alone = start(tmp_path, "one", "--device", "cpu")
    assert alone.wait() == 0, alone.communicate()
    both = start(tmp_path, "two", "--device", "cpu", launch=TWO)
    output, _ = both.communicate()
    assert both.returncode == 0, output
    assert output.count("step 20:") == 1
    one, two = (
        json.loads((trained(tmp_path, results) / LOG).read_text()) for results in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["curve"][-1]["loss"] == pytest.approx(one["curve"][-1]["loss"], rel=1e-4)
    first, second = (
        read_safetensors(trained(tmp_path, results) / WEIGHTS)[0] for results in ("one", "two")
    )
    change = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert 0 < change < 1e-3


def test_bfloat16_is_another_training_with_float32_weights(
    registry: Registry, tmp_path: Path
) -> None:
    card_of(registry, tmp_path)
    run = start(tmp_path, "low", "--device", "cpu", "--precision", "bfloat16", "--snapshots", "20")
    output, _ = run.communicate()
    assert run.returncode == 0, output
    log = json.loads((trained(tmp_path, "low") / LOG).read_text())
    assert log["recipe"]["training"]["precision"] == "bfloat16"
    assert log["curve"][-1]["loss"] < log["curve"][0]["loss"]
    tensors, _ = read_safetensors(trained(tmp_path, "low") / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert snapshot(trained(tmp_path, "low"), 20).is_file()
    again = start(tmp_path, "low", "--device", "cpu", "--resume")
    output, _ = again.communicate()
    assert again.returncode == 2
    assert "of another recipe" in output
    wrong = start(tmp_path, "low", "--precision", "int4")
    output, _ = wrong.communicate()
    assert wrong.returncode == 2
    assert "--precision: Input should be 'float32', 'bfloat16' or 'float16'" in output


def test_a_snapshot_is_a_target(small: Dataset, registry: Registry, tmp_path: Path) -> None:
    shipped = registry.card_folder("fashion_mini") / small.card.targets["ddpm_early"].weights
    folder = tmp_path / "targets" / "fashion_mini" / "ddpm"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / "step-6500.safetensors").write_bytes(shipped.read_bytes())
    target = resolve_target("ddpm@6500", small.card, small, registry, tmp_path, "cpu")
    assert target.name == "ddpm@6500"
    assert target.identity["weights_sha256"] == file_hash(shipped)
    with pytest.raises(MembenchError, match="no such snapshot, there are: 6500; keep one"):
        resolve_target("ddpm@1", small.card, small, registry, tmp_path, "cpu")


def test_kill_9_of_the_real_command(registry: Registry, tmp_path: Path) -> None:
    """`membench train` killed by SIGKILL between checkpoints, then `--resume`."""
    card_of(registry, tmp_path)
    whole = start(tmp_path, "whole")
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    assert "d1/d2 < 1/3 in" in output
    killed = start(tmp_path, "killed")
    checkpoint = trained(tmp_path, "killed") / CHECKPOINT
    while not checkpoint.exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (checkpoint.parent / WEIGHTS).exists()
    resumed = start(tmp_path, "killed", "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert "<svg" in (checkpoint.parent / "training.svg").read_text()
    assert file_hash(checkpoint.parent / WEIGHTS) == file_hash(trained(tmp_path, "whole") / WEIGHTS)
