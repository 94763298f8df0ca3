"""ResNets that know which noise level they look at (TDKD: spec section 2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from membench.specs import Network

EMBEDDING = 128


def timestep_embedding(t: Tensor, dimensions: int = EMBEDDING) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017; Ho et al. 2020): [B] -> [B, d]."""
    half = dimensions // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeModule(nn.Module):
    """Scales and shifts a feature map by the timestep (FiLM; Perez et al. 2018), or only shifts it.

    The last layer starts at zero, so that the module starts as the identity.
    """

    def __init__(self, features: int, kind: Literal["film", "shift"]):
        super().__init__()
        self.kind = kind
        last = nn.Linear(4 * features, 2 * features if kind == "film" else features)
        self.mlp = nn.Sequential(nn.Linear(EMBEDDING, 4 * features), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """h: [B, F, H, W]; t: [B]."""
        modulation = self.mlp(timestep_embedding(t))[:, :, None, None]
        if self.kind == "shift":
            return h + modulation
        scale, shift = modulation.chunk(2, dim=1)
        return h * (1 + scale) + shift


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, features_in: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features_in, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or features_in != features:
            self.shortcut = nn.Sequential(
                nn.Conv2d(features_in, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, h: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(h)))))
        return torch.relu(residual + self.shortcut(h))


class ResNet(nn.Module):
    """A ResNet of basic blocks (He et al. 2016); blocks (3, 4, 6, 3) of width 64 is ResNet-34.

    stem: "imagenet" is a 7x7 convolution of stride 2 and max pooling, "small" a 3x3 convolution.
    If `timed`, the time module acts once, right after the first batch normalisation.
    """

    def __init__(self, network: Network, channels: int, n_classes: int, timed: bool):
        super().__init__()
        self.network, self.channels, self.n_classes, self.timed = (
            network,
            channels,
            n_classes,
            timed,
        )
        width, imagenet = network.width, network.stem == "imagenet"
        size, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.time = TimeModule(width, network.time_module) if timed else None
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        blocks, features_in = [], width
        for stage, count in enumerate(network.blocks):
            for place in range(count):
                features = width * 2**stage
                blocks.append(BasicBlock(features_in, features, 2 if stage and not place else 1))
                features_in = features
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(features_in, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The penultimate layer: x [B, C, H, W] in [-1, 1], t [B] if timed -> [B, F]."""
        if (t is not None) != self.timed:
            raise ValueError(f"a classifier with timed={self.timed} and t={t}")
        h = self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        if self.time is not None:
            h = self.time(h, t)
        return self.blocks(self.pool(torch.relu(h))).mean(dim=(2, 3))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits [B, n_classes] of x [B, C, H, W] in [-1, 1] at timesteps t [B] (if timed)."""
        return self.fc(self.features(x, t))


def freeze(classifier: ResNet) -> ResNet:
    """Evaluation mode (no batch-size effects) and no gradients for the weights."""
    return classifier.eval().requires_grad_(False)
