"""Pretrained targets: pipelines give what diffusers samples from them, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from pipelines import save_pipeline

from membench.diffusion.pretrained import PretrainedTarget, as_target, read_pretrained
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times
from membench.hashing import derive_seed
from membench.specs import Images
from membench.specs_pretrained import Pretrained

IMAGES = Images(height=16, width=16, channels=1, classes=("a", "b", "c"))
LABELS = np.arange(30) % 3
SHAPE = (1, 16, 16)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def load(folder: Path, condition: str = "auto", **options: Any) -> PretrainedTarget:
    spec = Pretrained(title="tiny", pretrained=str(folder), condition=condition, **options)
    return as_target(read_pretrained(spec, [Path()]), spec.condition, IMAGES, LABELS)


def sample(target: PretrainedTarget, count: int = 4, steps: int = 10, eta: float = 0.0):
    noise = ImageNoise(0, range(count), SHAPE)
    times = ddim_times(steps, len(target.abar))
    model = target.eps_model(0, range(count))
    return ddim(model, noise(), times, target.abar, eta=eta, noise=noise)


def by_diffusers(folder: Path, count: int = 4, steps: int = 10, eta: float = 0.0):
    """The same images by diffusers' own pipeline, in [-1, 1]."""
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(derive_seed(0, "image", i)) for i in range(count)]
    found = pipeline(count, generators, eta, steps, output_type="pt").images
    return found * 2 - 1


# --- sampling as diffusers does


SCHEDULES = [
    {},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-3, 0.05, 200).tolist(), "num_train_timesteps": 200},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(next(iter(s), "linear")))
def test_samples_are_those_of_diffusers(
    tmp_path: Path, scheduler: Any, prediction: str, schedule: dict[str, Any]
) -> None:
    save_pipeline(tmp_path, scheduler(prediction_type=prediction, **schedule))
    target = load(tmp_path)
    found = sample(target)
    difference = (found - by_diffusers(tmp_path)).abs().max().item()
    assert difference < 2e-4
    assert found.std() > 0.1
