"""Images per second of plain sampling: ours against diffusers' own pipeline, same U-Net.

Each runs in a process of its own, as a user would run it: ours asks glibc to keep freed memory
(`membench.allocator`), which would help the other in the same process. They take turns.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from membench.allocator import keep_freed_memory
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times
from membench.diffusion.targets import UNetTarget
from membench.diffusion.unet import build_unet, schedule_abar
from membench.specs import load_card

CARD = load_card(Path(__file__).parents[2] / "datasets" / "fashion_mini.toml")
RECIPE, SHAPE = CARD.targets["ddpm"], CARD.images.shape
BATCH, STEPS, ROUNDS = 64, 10, 9


def network() -> UNet2DModel:
    """The card's U-Net with random weights, the same in both processes."""
    torch.manual_seed(0)
    return build_unet(RECIPE, CARD.images).eval().requires_grad_(False)


def serve_diffusers(pipe: Connection, threads: int) -> None:
    """Draw images with `DDIMPipeline` whenever asked; answer with seconds and images."""
    torch.set_num_threads(threads)
    scheduler = DDIMScheduler(
        num_train_timesteps=RECIPE.train_timesteps, beta_schedule=RECIPE.beta_schedule
    )
    pipeline = DDIMPipeline(network(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    while pipe.recv():
        started = time.perf_counter()
        images = pipeline(
            batch_size=BATCH,
            generator=ImageNoise(0, range(BATCH), SHAPE).generators,
            num_inference_steps=STEPS,
            output_type="np",
        ).images
        pipe.send((time.perf_counter() - started, images))


@pytest.fixture
def diffusers_process() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_diffusers, args=(theirs, torch.get_num_threads()))
    process.start()
    yield ours
    ours.send(False)
    process.join()


@pytest.mark.benchmark(group="sampling")
def test_plain_sampling(benchmark: Any, diffusers_process: Connection) -> None:
    """No times are asserted; `extra_info` holds both rates and their ratio (> 1: ours faster)."""
    keep_freed_memory()
    target = UNetTarget("random", network(), SHAPE, schedule_abar(RECIPE), {})
    times = ddim_times(STEPS, RECIPE.train_timesteps)

    def ours() -> np.ndarray:
        noise = ImageNoise(0, range(BATCH), SHAPE)
        x_0 = ddim(target.eps_model(0, range(BATCH)), noise(), times, target.abar)
        return (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def theirs() -> tuple[float, np.ndarray]:
        diffusers_process.send(True)
        return diffusers_process.recv()

    # rounding only: our schedule is float64, theirs float32, and an untrained U-Net amplifies it
    np.testing.assert_allclose(ours(), theirs()[1], atol=2e-3)
    seconds: list[float] = []
    benchmark.pedantic(ours, setup=lambda: seconds.append(theirs()[0]), rounds=ROUNDS)
    benchmark.extra_info["diffusers_images_per_second"] = BATCH / statistics.median(seconds)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info["images_per_second"] = BATCH / median
        benchmark.extra_info["ratio_to_diffusers"] = statistics.median(seconds) / median
        print({key: round(value, 2) for key, value in benchmark.extra_info.items()})
