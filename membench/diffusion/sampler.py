"""Samplers as plain functions: the body is the algorithm of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from membench.hashing import derive_seed

EpsModel = Callable[[Tensor, int], Tensor]
Guidance = Callable[[Tensor, int, Tensor], Tensor]


def ddim_times(steps: int, train_timesteps: int) -> list[int]:
    """The timesteps of DDIM, descending: equally spaced from 0 ("leading", diffusers' default)."""
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps: {steps}, expected 1 to {train_timesteps}")
    return [i * (train_timesteps // steps) for i in reversed(range(steps))]


@torch.inference_mode()
def ddim(
    eps_model: EpsModel,
    x_t: Tensor,
    times: Sequence[int],
    abar: Sequence[float],
    *,
    eta: float = 0.0,
    clip: bool = True,
    noise: Callable[[], Tensor] | None = None,
    guidance: Guidance | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM (Song, Meng and Ermon 2021, eq. 12), with classifier guidance if given.

    x_t: [B, C, H, W] Gaussian noise; times: descending timesteps; abar: [T] cumulative product of
    1 - beta, in float64; returns x_0 [B, C, H, W], in [-1, 1] if `clip`. `guidance(x_t, t, eps)`
    gives eps_hat (Dhariwal and Nichol 2021, Algorithm 2); `noise()` gives one standard normal
    [B, C, H, W] per step when `eta` > 0.
    """
    for t, t_next in zip(times, [*times[1:], None], strict=True):
        abar_t, abar_next = abar[t], 1.0 if t_next is None else abar[t_next]
        eps = eps_model(x_t, t)
        if guidance is not None:
            eps = guidance(x_t, t, eps)
        x_0 = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
        if clip:
            x_0 = x_0.clamp(-1, 1)
        sigma = eta * ((1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next)) ** 0.5
        x_t = abar_next**0.5 * x_0 + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            assert noise is not None, "eta > 0 needs a source of noise"
            x_t = x_t + sigma * noise()
        if callback is not None:
            callback(t, x_t)
    return x_t


class ImageNoise:
    """One generator per image, seeded by (run seed, image index): batches do not change the noise.

    Drawn on the CPU, so that every device starts from the same numbers.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]):
        self.shape = shape
        self.generators = [
            torch.Generator().manual_seed(derive_seed(seed, "image", i)) for i in indices
        ]

    def __call__(self) -> Tensor:
        """Standard normal [B, C, H, W]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x`, which is on the CPU, on a device; a GPU copies it while it does something else."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_uint8(x_0: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]; refuses NaN."""
    if not torch.isfinite(x_0).all():
        raise FloatingPointError("the sampler returned NaN or infinity")
    pixels = ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32) / 127.5 - 1
