"""The embedded data set is what its script draws, its targets are what its card says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from membench.data.imageset import Dataset
from membench.diffusion.targets import load_unet_target
from membench.hashing import file_hash
from membench.registry import Registry
from membench.specs import TargetRecipe

SOURCE = Path("/usr/share/datasets/fashion-mnist")


def test_the_script_draws_it_again(registry: Registry) -> None:
    if not SOURCE.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    script = registry.data_folder("fashion_mini") / "build.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_card_has_the_manifests_hashes(registry: Registry, fashion_mini: Dataset) -> None:
    manifest = json.loads((registry.data_folder("fashion_mini") / "manifest.json").read_text())
    assert fashion_mini.card.splits.model_dump() == manifest["splits"]


def test_shipped_weights_are_the_cards_and_small(registry: Registry, fashion_mini: Dataset) -> None:
    folder = registry.data_folder("fashion_mini")
    for name, recipe in fashion_mini.card.targets.items():
        assert recipe.weights is not None, f"{name} has no weights"
        path = folder / recipe.weights
        log = json.loads(path.with_suffix(".json").read_text())
        assert log["weights_sha256"] == recipe.weights_sha256 == file_hash(path)
        logged = TargetRecipe.model_validate(log["recipe"])
        same = recipe.model_copy(update={"weights": None, "weights_sha256": None})
        assert logged == same, f"{name} was trained by another recipe"
        assert log["curve"][-1]["step"] == recipe.training.last_step
        labels = fashion_mini.members.labels
        target = load_unet_target(recipe, fashion_mini.card.images, path, labels=labels)
        assert target.shape == (1, 16, 16)
        assert path.stat().st_size < 3_000_000


def test_ddpm_memorises_partly_and_ddpm_early_almost_nothing(
    registry: Registry, fashion_mini: Dataset
) -> None:
    """By the logs written while they were trained; boards measure it again."""
    folder = registry.data_folder("fashion_mini")
    last = {
        name: json.loads((folder / "targets" / f"{name}.json").read_text())["curve"][-1]
        for name in ("ddpm", "ddpm_early")
    }
    assert 0.05 <= last["ddpm"]["l2_ratio_members"] <= 0.40
    assert last["ddpm_early"]["l2_ratio_members"] < 0.02
    assert all(point["l2_ratio_heldout"] <= 0.01 for point in last.values())
