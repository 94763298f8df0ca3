"""Tiny diffusers pipelines with random weights, for tests of pretrained targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**(UNET | changes)).eval()


def save_pipeline(
    folder: Path, scheduler: Any = None, network: UNet2DModel | None = None, **changes: Any
) -> UNet2DModel:
    """Write a `DDPMPipeline` to a folder and return its U-Net."""
    network = network or unet(**changes)
    DDPMPipeline(network, scheduler or DDPMScheduler()).save_pretrained(folder)
    return network
