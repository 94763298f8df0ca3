"""Networks that predict something else than eps, made to predict eps.

The samplers, guidance and likelihoods of membench know one contract, eps(x_t, t) of a
variance-preserving diffusion of images in [-1, 1]. With a = abar_t and x_t = sqrt(a) x_0 +
sqrt(1 - a) eps, a network that returns

- `epsilon` (Ho, Jain and Abbeel 2020) is taken as it is;
- `v_prediction`, v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022, section 4):
  eps = sqrt(a) v + sqrt(1 - a) x_t;
- `sample`, x_0 itself: eps = (x_t - sqrt(a) x_0) / sqrt(1 - a);
- `score_ve`, the score of a variance-exploding diffusion of images in [0, 1] (Song et al. 2021,
  NCSN++), z = z_0 + sigma eps with z_0 = (x_0 + 1) / 2. Then 2 z - 1 = x_0 + 2 sigma eps, which is
  x_t / sqrt(a) where a = 1 / (1 + 4 sigma^2). So the network is asked at
  z = (x_t / sqrt(a) + 1) / 2 and sigma = sqrt((1 - a) / a) / 2, and eps = -sigma score(z, sigma):
  exact, a change of variables.

Of a network that also predicts the variance of its reverse step (twice the channels; Nichol and
Dhariwal 2021) the second half is dropped: DDIM does not use it. All of it is float32, coefficients
are rounded from float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from membench.errors import MembenchError

Prediction = Literal["epsilon", "v_prediction", "sample", "score_ve"]


def abar_at(abar: Sequence[float], t: Tensor) -> Tensor:
    """abar at real timesteps t [B]: log abar is linear between neighbouring integers; float64."""
    log_abar = torch.tensor(abar, dtype=torch.float64, device=t.device).log()
    below = t.floor().long().clamp(0, max(len(abar) - 2, 0))
    above = (below + 1).clamp(max=len(abar) - 1)
    return torch.lerp(log_abar[below], log_abar[above], t.double() - below).exp()


def ve_abar(sigma_min: float, sigma_max: float, timesteps: int) -> list[float]:
    """abar of `score_ve` at T geometric noise levels of images in [0, 1], least noise first."""
    steps = (i / (timesteps - 1) for i in range(timesteps))
    return [1 / (1 + 4 * (sigma_min * (sigma_max / sigma_min) ** s) ** 2) for s in steps]


class EpsNetwork(nn.Module):
    """eps of `network`, with the calling convention of diffusers' `UNet2DModel`.

    network: called with (x [B, C, H, W], t, class_labels=..., return_dict=False), returns a tuple;
    channels: C, of which the network may return 2 C; time_scale: what its timesteps are multiplied
    by (improved-diffusion counts to 1000 whatever the number of steps).
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: Prediction,
        abar: Sequence[float],
        channels: int,
        time_scale: float = 1.0,
    ):
        super().__init__()
        self.network, self.prediction, self.abar = network, prediction, abar
        self.channels, self.time_scale = channels, time_scale
        config = getattr(network, "config", {})
        self.integers_only = config.get("time_embedding_type") == "learned"

    def forward(self, x_t: Tensor, t: int | Tensor, **known: Any) -> tuple[Tensor]:
        """(eps [B, C, H, W],) of x_t [B, C, H, W] at t, an integer or real numbers [B]."""
        if self.prediction == "epsilon":
            return (self._predict(x_t, self._time(t, x_t), **known),)
        a = (
            abar_at(self.abar, t)
            if isinstance(t, Tensor)
            else torch.tensor(self.abar[t], dtype=torch.float64)
        )
        a = a.double().to(x_t.device)
        signal, noise = (c.to(x_t.dtype).view(-1, 1, 1, 1) for c in (a.sqrt(), (1 - a).sqrt()))
        if self.prediction == "score_ve":
            sigma = ((1 - a) / a).sqrt() / 2
            levels = sigma.to(x_t.dtype).expand(len(x_t))
            score = self._predict((x_t / signal + 1) / 2, levels, **known)
            return (-levels.view(-1, 1, 1, 1) * score,)
        predicted = self._predict(x_t, self._time(t, x_t), **known)
        if self.prediction == "v_prediction":
            return (signal * predicted + noise * x_t,)
        return ((x_t - signal * predicted) / noise,)

    def around(self, network: nn.Module) -> EpsNetwork:
        """The same of another network that predicts what this one's does."""
        return EpsNetwork(network, self.prediction, self.abar, self.channels, self.time_scale)

    def _predict(self, x: Tensor, t: int | Tensor, **known: Any) -> Tensor:
        known["return_dict"] = False
        return self.network(x, t, **known)[0][:, : self.channels]

    def _time(self, t: int | Tensor, x_t: Tensor) -> int | Tensor:
        if self.integers_only and isinstance(t, Tensor):
            raise MembenchError(
                "the target has an embedding for each integer timestep, so its likelihood cannot "
                "be had; take --estimator knn"
            )
        if self.time_scale == 1:
            return t
        t = t.to(x_t.dtype) if isinstance(t, Tensor) else x_t.new_full((len(x_t),), float(t))
        return t * self.time_scale
