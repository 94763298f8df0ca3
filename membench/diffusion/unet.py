"""U-Net targets: diffusers' `UNet2DModel` behind the contract of `membench.diffusion.targets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from membench.hashing import derive_seed
from membench.specs import Images, TargetRecipe

if TYPE_CHECKING:  # diffusers takes seconds to import, and not every target needs it
    from diffusers import UNet2DModel


def build_unet(recipe: TargetRecipe, images: Images) -> UNet2DModel:
    """An untrained U-Net of the recipe; initialised from torch's global generator.

    A conditional one has an embedding for each class and is called with `class_labels`.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=(images.height, images.width),
        in_channels=images.channels,
        out_channels=images.channels,
        num_class_embeds=None if recipe.condition == "none" else len(images.classes),
        **recipe.unet.model_dump(),
    )


def condition_labels(
    recipe: TargetRecipe, images: Images, labels: np.ndarray | None
) -> np.ndarray | None:
    """What a conditional U-Net is told of each member: int64 [N], or None for an unconditional one.

    labels: int [N], the data set's own. Random labels are uniform over as many classes, drawn from
    the recipe's seed, and stay with their image.
    """
    if recipe.condition == "none":
        return None
    if labels is None:
        raise ValueError("a conditional recipe needs the members' labels")
    if recipe.condition == "labels":
        return np.asarray(labels, np.int64)
    seed = derive_seed(recipe.training.seed, "random labels")
    return np.random.default_rng(seed).integers(len(images.classes), size=len(labels))


@dataclass(frozen=True)
class NoiseSchedule:
    """The schedule of a recipe, for targets that have none."""

    train_timesteps: int = 1000
    beta_schedule: str = "linear"


def schedule_abar(recipe: TargetRecipe | NoiseSchedule) -> list[float]:
    """abar_t for t = 0 .. T - 1, as diffusers' `DDPMScheduler` has it."""
    if recipe.beta_schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, recipe.train_timesteps)  # Ho, Jain and Abbeel 2020
        return (1 - betas).cumprod(dim=0).double().tolist()
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        num_train_timesteps=recipe.train_timesteps, beta_schedule=recipe.beta_schedule
    )
    return scheduler.alphas_cumprod.double().tolist()


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
