"""Images per second of plain sampling: ours against diffusers' own pipeline, same U-Net."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from membench.diffusion.sampler import ImageNoise, ddim, ddim_times
from membench.diffusion.targets import UNetTarget
from membench.diffusion.unet import build_unet, schedule_abar
from membench.specs import load_card

CARD = load_card(Path(__file__).parents[2] / "datasets" / "fashion_mini.toml")
RECIPE, SHAPE = CARD.targets["ddpm"], CARD.images.shape
BATCH, STEPS, ROUNDS = 64, 10, 5


@pytest.mark.benchmark(group="sampling")
def test_plain_sampling(benchmark: Any) -> None:
    """No times are asserted; `extra_info` holds both rates and their ratio (> 1: ours is faster).

    The rounds take turns and the fastest of each counts, so that a busy machine disturbs both.
    """
    torch.manual_seed(0)
    network = build_unet(RECIPE, CARD.images).eval().requires_grad_(False)
    pipeline = DDIMPipeline(
        network,
        DDIMScheduler(
            num_train_timesteps=RECIPE.train_timesteps, beta_schedule=RECIPE.beta_schedule
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    weights = network.state_dict()
    ours_network = build_unet(RECIPE, CARD.images)
    ours_network.load_state_dict(weights)
    target = UNetTarget("random", ours_network, SHAPE, schedule_abar(RECIPE), {})

    def theirs() -> np.ndarray:
        return pipeline(
            batch_size=BATCH,
            generator=ImageNoise(0, range(BATCH), SHAPE).generators,
            num_inference_steps=STEPS,
            output_type="np",
        ).images

    def ours() -> np.ndarray:
        noise = ImageNoise(0, range(BATCH), SHAPE)
        times = ddim_times(STEPS, RECIPE.train_timesteps)
        x_0 = ddim(target.eps_model(0, range(BATCH)), noise(), times, target.abar)
        return (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    # rounding only: our schedule is float64, theirs float32, and an untrained U-Net amplifies it
    np.testing.assert_allclose(ours(), theirs(), atol=2e-3)
    seconds: list[float] = []

    def their_turn() -> None:
        started = time.perf_counter()
        theirs()
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(ours, setup=their_turn, rounds=ROUNDS)
    benchmark.extra_info["diffusers_images_per_second"] = BATCH / min(seconds)
    if benchmark.stats is not None:
        fastest = benchmark.stats.stats.min
        benchmark.extra_info["images_per_second"] = BATCH / fastest
        benchmark.extra_info["ratio_to_diffusers"] = min(seconds) / fastest
