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

from membench.data.imageset import Dataset
from membench.diffusion.targets import load_unet_target
from membench.diffusion.train import CHECKPOINT, LOG, WEIGHTS, draw_batch, learning_rate, train
from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.registry import Registry
from membench.specs import TargetRecipe
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


class Killed(BaseException):
    pass


def do(recipe: TargetRecipe, small: Dataset, folder: Path, *, stop: int | None = None, **options):
    def report(step: int, loss: float) -> None:
        if step == stop:
            raise Killed

    return train(
        recipe, small.card.images, small.members.images,
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
        do(recipe, small, tmp_path / "whole", stop=8)
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


def test_batches_depend_on_the_step_alone(recipe: TargetRecipe) -> None:
    images = torch.arange(10.0).view(10, 1, 1, 1)
    first = draw_batch(images, recipe.training, 1000, 5)
    draw_batch(images, recipe.training, 1000, 6)
    again = draw_batch(images, recipe.training, 1000, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    t = torch.cat([draw_batch(images, recipe.training, 1000, k)[1] for k in range(500)])
    assert 0 <= t.min() < 10
    assert 990 < t.max() <= 999
    assert t.float().mean() == pytest.approx(499.5, abs=4 * 1000 / np.sqrt(12 * len(t)))


def test_kill_9_of_the_real_command(
    registry: Registry, recipe: TargetRecipe, tmp_path: Path
) -> None:
    """`membench train` killed by SIGKILL between checkpoints, then `--resume`."""
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
    (tmp_path / "mine.toml").write_text(text)
    data = registry.data_folder("fashion_mini")
    (tmp_path / "mine").symlink_to(data)

    def start(results: str, *extra: str) -> subprocess.Popen[str]:
        line = ["train", "mine", "--target", "ddpm", "--results", results, "--plugins", ".", *extra]
        return subprocess.Popen(
            [sys.executable, "-m", "membench.cli", *line],
            cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    whole = start("whole")
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    assert "d1/d2 < 1/3 in" in output
    killed = start("killed")
    checkpoint = tmp_path / "killed" / "targets" / "mine" / "ddpm" / CHECKPOINT
    while not checkpoint.exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (checkpoint.parent / WEIGHTS).exists()
    resumed = start("killed", "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert "<svg" in (checkpoint.parent / "training.svg").read_text()
    assert file_hash(checkpoint.parent / WEIGHTS) == file_hash(
        tmp_path / "whole" / "targets" / "mine" / "ddpm" / WEIGHTS
    )
