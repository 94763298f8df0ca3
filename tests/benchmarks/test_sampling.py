"""Images per second of plain and guided sampling, in each arithmetic, against what others do.

Plain sampling against diffusers' `DDIMPipeline`; guided sampling against classifier guidance
written straight down, as in OpenAI's guided-diffusion: NCHW, float32, weights that require
gradients as they are loaded, `cond_fn` under `torch.enable_grad`. Its U-Net is called once with
gradients enabled, as loops of one's own do, and once under `torch.no_grad`, as guided-diffusion's
own scripts do. DDIM's step is diffusers' scheduler in all of them.

Each peer has a process of its own, as a user would run it: ours asks glibc to keep freed memory
(`membench.allocator`), which would help the others in the same process. No times are asserted.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from turns import OURS, Timed, take_turns

from membench.allocator import keep_freed_memory
from membench.diffusion.arithmetic import Arithmetic
from membench.diffusion.classifier import ResNet, freeze
from membench.diffusion.guidance import GuidanceLog, classifier_guidance, gradient_in
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times
from membench.diffusion.targets import UNetTarget, computed
from membench.diffusion.unet import build_unet, schedule_abar
from membench.specs import load_card

CARD = load_card(Path(__file__).parents[2] / "datasets" / "fashion_mini.toml")
RECIPE, SHAPE = CARD.targets["ddpm"], CARD.images.shape
BATCH, STEPS, ROUNDS = 64, 10, 9
N_LABELS, SCALE = 100, 0.3
ARITHMETICS = {
    "float32": Arithmetic(),
    "bfloat16": Arithmetic("bfloat16"),
    "compile": Arithmetic(compiled=True),
    "bfloat16-compile": Arithmetic("bfloat16", compiled=True),
}
DIFFUSERS = "diffusers' DDIMPipeline"
NO_GRAD, GRAD = "plain loop, U-Net under no_grad", "plain loop, gradients enabled"
PEERS = {False: (DIFFUSERS,), True: (NO_GRAD, GRAD)}


def network() -> UNet2DModel:
    """The card's U-Net with random weights, the same in all processes."""
    torch.manual_seed(0)
    return build_unet(RECIPE, CARD.images).eval()


def classifier() -> ResNet:
    """The card's time-dependent classifier with random weights, the same in all processes."""
    torch.manual_seed(1)
    return ResNet(CARD.attack.network, SHAPE[0], N_LABELS, timed=True).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=RECIPE.train_timesteps, beta_schedule=RECIPE.beta_schedule
    )


def as_images(x_0: Tensor) -> np.ndarray:
    return (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def by_diffusers() -> Callable[[], np.ndarray]:
    pipeline = DDIMPipeline(network(), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: (
        pipeline(
            batch_size=BATCH,
            generator=ImageNoise(0, range(BATCH), SHAPE).generators,
            num_inference_steps=STEPS,
            output_type="np",
        ).images
    )


def straight(unet_context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], np.ndarray]:
    """Classifier guidance as the field writes it; `unet_context` is what its U-Net runs in."""
    unet, guide, steps = network(), classifier(), scheduler()
    labels = torch.arange(BATCH) % N_LABELS
    steps.set_timesteps(STEPS)

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = nn.functional.log_softmax(guide(x_in, t), dim=-1)
            selected = log_probs[range(len(log_probs)), labels]
            return torch.autograd.grad(selected.sum(), x_in)[0] * SCALE

    def draw() -> np.ndarray:
        x = ImageNoise(0, range(BATCH), SHAPE)()
        for t in steps.timesteps:
            times = torch.full((BATCH,), int(t))
            with unet_context():
                eps = unet(x, times).sample
            eps = eps - (1 - steps.alphas_cumprod[t]).sqrt() * cond_fn(x, times)
            x = steps.step(eps, t, x).prev_sample.detach()
        return as_images(x)

    return draw


def serve(pipe: Connection, threads: int, peer: str) -> None:
    """Draw images as `peer` does whenever asked; answer with seconds of CPU time and images."""
    torch.set_num_threads(threads)
    draw = {
        DIFFUSERS: by_diffusers,
        NO_GRAD: lambda: straight(torch.no_grad),
        GRAD: lambda: straight(nullcontext),
    }[peer]()
    while pipe.recv():
        started = time.process_time()
        images = draw()
        pipe.send((time.process_time() - started, images))


@pytest.fixture
def peers(guided: bool) -> Iterator[dict[str, Connection]]:
    context = multiprocessing.get_context("spawn")
    served: dict[str, tuple[Any, Connection]] = {}
    for name in PEERS[guided]:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, torch.get_num_threads(), name))
        process.start()
        served[name] = process, ours
    yield {name: pipe for name, (_, pipe) in served.items()}
    for process, pipe in served.values():
        pipe.send(False)
        process.join()


def ours(arithmetic: Arithmetic, guided: bool) -> Callable[[], np.ndarray]:
    """What `Lab.sample` does to a batch, up to the rounding of pixels."""
    keep_freed_memory()
    target = UNetTarget("random", network(), SHAPE, schedule_abar(RECIPE), {})
    guide, labels = freeze(classifier()), torch.arange(BATCH) % N_LABELS
    guide = guide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    times = ddim_times(STEPS, RECIPE.train_timesteps)

    def draw() -> np.ndarray:
        guidance = None
        if guided:
            guidance = classifier_guidance(
                guide, labels, SCALE, target.abar, timed=True, log=GuidanceLog(),
                gradient=gradient_in(arithmetic),
            )  # fmt: skip
        eps_model = computed(target, arithmetic).eps_model(0, range(BATCH))
        noise = ImageNoise(0, range(BATCH), SHAPE)
        return as_images(ddim(eps_model, noise(), times, target.abar, guidance=guidance))

    return draw


@pytest.mark.benchmark(group="sampling")
@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_sampling(benchmark: Any, peers: dict[str, Connection], guided: bool, name: str) -> None:
    """In float32 the images are the peers', which is asserted."""

    def asks(peer: str) -> Callable[[], Timed]:
        def ask() -> Timed:
            peers[peer].send(True)
            return Timed(*peers[peer].recv())

        return ask

    kind = "guided" if guided else "plain"
    images = take_turns(
        benchmark,
        f"{kind} sampling of {BATCH} images in {STEPS} steps, {name}",
        ours(ARITHMETICS[name], guided),
        {peer: asks(peer) for peer in peers},
        rounds=ROUNDS,
    )
    if ARITHMETICS[name].precision == "float32":
        # rounding only, of a float64 schedule and a float32 one; an untrained U-Net amplifies it
        for peer in peers:
            np.testing.assert_allclose(images[OURS], images[peer], atol=2e-3)
