"""The U-Net of OpenAI's improved-diffusion and guided-diffusion, with their names of tensors.

Written from the layout of the published checkpoints (Nichol and Dhariwal 2021; Dhariwal and Nichol
2021), so that their tensors are loaded one to one and a missing one has its published name:
`input_blocks`, `middle_block` and `output_blocks` hold residual blocks, attention and resampling;
what `input_blocks` leave is concatenated to the input of `output_blocks` in reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from membench.diffusion.classifier import timestep_embedding
from membench.specs_pretrained import ImprovedDiffusion

GROUPS = 32
MAX_BETA = 0.999
Resampling = nn.Upsample | nn.AvgPool2d


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second told the timestep, and a shortcut; `resample` before both.

    With `scale_shift` the embedding scales and shifts the second normalisation, else it is added.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        *,
        scale_shift: bool,
        dropout: float,
        resample: Resampling | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        convolution = nn.Conv2d(channels, out, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out, out, 3, padding=1),
        )
        same = out == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, F, H, W]; emb: [B, E]."""
        h = self.in_layers[:2](x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        told = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Self-attention over pixels. split_first: channels are q, k, v and then heads; else the other
    way round (improved-diffusion)."""

    def __init__(self, channels: int, heads: int, split_first: bool):
        super().__init__()
        self.heads, self.split_first = heads, split_first
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, F, H, W]; emb is not used."""
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        if self.split_first:
            qkv = qkv.view(batch, 3, self.heads, channels // self.heads, -1).transpose(1, 2)
        else:
            qkv = qkv.view(batch, self.heads, 3, channels // self.heads, -1)
        q, k, v = (part.transpose(-1, -2).contiguous() for part in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return (flat + self.proj_out(h.reshape(batch, channels, -1))).view(batch, channels, *size)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class First(nn.Conv2d):
    """The first convolution, which ignores the timestep."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class ImprovedUNet(nn.Module):
    """Returns ([B, C or 2 C, H, W],): eps or x_0, and the variance half if `learn_sigma`."""

    def __init__(self, settings: ImprovedDiffusion):
        super().__init__()
        s = self.settings = settings
        width = s.num_channels
        embedding = 4 * width
        widths = [int(mult * width) for mult in s.channel_mult]
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if s.num_classes is not None:
            self.label_emb = nn.Embedding(s.num_classes, embedding)

        def block(channels: int, out: int, resample: Resampling | None = None) -> ResBlock:
            return ResBlock(
                channels, out, embedding,
                scale_shift=s.use_scale_shift_norm, dropout=s.dropout, resample=resample,
            )  # fmt: skip

        def attention(channels: int, heads: int) -> Attention:
            if s.num_head_channels is not None:
                heads = channels // s.num_head_channels
            return Attention(channels, heads, s.use_new_attention_order)

        self.input_blocks = nn.ModuleList()
        self.output_blocks = nn.ModuleList()
        left: list[int] = []

        def leave(channels: int, *layers: nn.Module) -> None:
            self.input_blocks.append(nn.ModuleList(layers))
            left.append(channels)

        now, size = widths[0], s.image_size
        leave(now, First(s.in_channels, now, 3, padding=1))
        for level, out in enumerate(widths):
            for _ in range(s.num_res_blocks):
                layers: list[nn.Module] = [block(now, out)]
                now = out
                if size in s.attention_resolutions:
                    layers.append(attention(now, s.num_heads))
                leave(now, *layers)
            if level < len(widths) - 1:
                halve = block(now, now, nn.AvgPool2d(2)) if s.resblock_updown else Downsample(now)
                leave(now, halve)
                size //= 2
        self.middle_block = nn.ModuleList(
            [block(now, now), attention(now, s.num_heads), block(now, now)]
        )
        for level, out in reversed(list(enumerate(widths))):
            for place in range(s.num_res_blocks + 1):
                layers = [block(now + left.pop(), out)]
                now = out
                if size in s.attention_resolutions:
                    layers.append(attention(now, s.num_heads_upsample or s.num_heads))
                if level and place == s.num_res_blocks:
                    twice = nn.Upsample(scale_factor=2.0, mode="nearest")
                    layers.append(block(now, now, twice) if s.resblock_updown else Upsample(now))
                    size *= 2
                self.output_blocks.append(nn.ModuleList(layers))
        returned = s.in_channels * (1 + s.learn_sigma)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, now), nn.SiLU(), nn.Conv2d(now, returned, 3, padding=1)
        )

    def forward(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """x: [B, C, H, W] in [-1, 1]; t: an integer or real numbers [B]; class_labels: [B]."""
        if not isinstance(t, Tensor):
            t = torch.full((len(x),), t, device=x.device)
        emb = self.time_embed(timestep_embedding(t, self.settings.num_channels))
        if class_labels is not None:
            emb = emb + self.label_emb(class_labels)
        left = []
        for layers in self.input_blocks:
            x = _through(layers, x, emb)
            left.append(x)
        x = _through(self.middle_block, x, emb)
        for layers in self.output_blocks:
            x = _through(layers, torch.cat([x, left.pop()], dim=1), emb)
        return (self.out(x),)


def _through(layers: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    assert isinstance(layers, Iterable)
    for layer in layers:
        x = layer(x, emb)
    return x


def improved_abar(settings: ImprovedDiffusion) -> list[float]:
    """abar_t for t = 0 .. T - 1, in float64.

    linear: Ho, Jain and Abbeel (2020) at 1000 steps, stretched to T; cosine: Nichol and Dhariwal
    (2021), eq. 17, with beta at most 0.999.
    """
    T = settings.diffusion_steps
    if settings.noise_schedule == "linear":
        scale = 1000 / T
        betas = [scale * (0.0001 + (0.02 - 0.0001) * i / (T - 1)) for i in range(T)]
    else:
        f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = [min(1 - f[i + 1] / f[i], MAX_BETA) for i in range(T)]
    abar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abar.append(product)
    return abar
