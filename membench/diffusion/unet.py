"""U-Net targets: diffusers' `UNet2DModel` behind the contract of `membench.diffusion.targets`."""

from __future__ import annotations

from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from membench.specs import Images, TargetRecipe


def build_unet(recipe: TargetRecipe, images: Images) -> UNet2DModel:
    """An untrained U-Net of the recipe; initialised from torch's global generator."""
    return UNet2DModel(
        sample_size=(images.height, images.width),
        in_channels=images.channels,
        out_channels=images.channels,
        **recipe.unet.model_dump(),
    )


def schedule_abar(recipe: TargetRecipe) -> list[float]:
    """abar_t for t = 0 .. T - 1."""
    scheduler = DDPMScheduler(
        num_train_timesteps=recipe.train_timesteps, beta_schedule=recipe.beta_schedule
    )
    return scheduler.alphas_cumprod.double().tolist()


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
