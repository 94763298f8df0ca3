"""Classifier guidance (Dhariwal and Nichol 2021, Algorithm 2; spec section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from membench.diffusion.sampler import Guidance

Classifier = Callable[[Tensor, Tensor | None], Tensor]


class GuidanceLog:
    """How strong the guidance was: ||guidance term|| / ||eps||, by timestep, over all images."""

    def __init__(self) -> None:
        self.totals: dict[int, tuple[float, int]] = {}

    def add(self, t: int, term: Tensor, eps: Tensor) -> None:
        """term, eps: [B, C, H, W]."""
        ratios = term.double().flatten(1).norm(dim=1) / eps.double().flatten(1).norm(dim=1)
        self._add(t, ratios.sum().item(), len(ratios))

    def _add(self, t: int, total: float, images: int) -> None:
        old_total, old_images = self.totals.get(t, (0.0, 0))
        self.totals[t] = (old_total + total, old_images + images)

    def merge(self, other: GuidanceLog) -> GuidanceLog:
        """Add another batch's log to this one."""
        for t, (total, images) in other.totals.items():
            self._add(t, total, images)
        return self

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Timestep -> mean ratio, its sum and the number of images; descending timesteps."""
        return {
            str(t): {"mean": total / images, "total": total, "images": images}
            for t, (total, images) in sorted(self.totals.items(), reverse=True)
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Mapping[str, Any]]) -> GuidanceLog:
        log = cls()
        for t, entry in saved.items():
            log._add(int(t), float(entry["total"]), int(entry["images"]))
        return log


def classifier_guidance(
    classifier: Classifier,
    labels: Tensor,
    scale: float,
    abar: Sequence[float],
    *,
    at: Literal["x_t", "x_0"] = "x_t",
    timed: bool,
    log: GuidanceLog | None = None,
) -> Guidance:
    """eps_hat = eps - lambda sqrt(1 - abar_t) grad_{x_t} log p(c | x_t), lambda = `scale`.

    labels: c, int64 [B]; timed: whether the classifier is given t. `at = "x_0"` shows the
    classifier the predicted (unclipped) x_0 with eps held constant; the gradient is still that by
    x_t. None of it reaches the U-Net or the classifier's weights, which must be frozen, in
    evaluation mode, and made outside `torch.inference_mode`. Scale 0 returns eps as it is, without
    a call of the classifier. `log` takes the ratio of norms at each step.
    """

    def guide(x_t: Tensor, t: int, eps: Tensor) -> Tensor:
        if scale == 0:
            return eps
        spread = (1 - abar[t]) ** 0.5
        # The sampler runs in inference mode, whose tensors autograd refuses: clone them out of it.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.clone().requires_grad_()
            c = labels.to(x.device, torch.int64, copy=True)
            seen = x if at == "x_t" else (x - spread * eps.clone()) / abar[t] ** 0.5
            times = torch.full((len(x),), t, device=x.device) if timed else None
            log_p = torch.log_softmax(classifier(seen, times), dim=1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, c[:, None]).sum(), x)
        term = scale * spread * gradient
        if log is not None:
            log.add(t, term, eps)
        return eps - term

    return guide
