"""Classifier guidance (Dhariwal and Nichol 2021, Algorithm 2; spec section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from membench.diffusion.arithmetic import Arithmetic, Compiled
from membench.diffusion.sampler import Guidance

Classifier = Callable[[Tensor, Tensor | None], Tensor]
Gradient = Callable[[Classifier, Tensor, Tensor | None, Tensor], Tensor]
"""(classifier, x [B, C, H, W], t [B] or None, c [B]) -> grad_x log p(c | x), [B, C, H, W]."""


class GuidanceLog:
    """How strong the guidance was: ||guidance term|| / ||eps||, by timestep, over all images."""

    def __init__(self) -> None:
        self.totals: dict[int, tuple[float | Tensor, int]] = {}

    def add(self, t: int, term: Tensor, eps: Tensor) -> None:
        """term, eps: [B, C, H, W]; a GPU is not waited for."""
        ratios = term.double().flatten(1).norm(dim=1) / eps.double().flatten(1).norm(dim=1)
        self._add(t, ratios.sum(), len(ratios))

    def _add(self, t: int, total: float | Tensor, images: int) -> None:
        old_total, old_images = self.totals.get(t, (0.0, 0))
        self.totals[t] = (old_total + total, old_images + images)

    def merge(self, other: GuidanceLog) -> GuidanceLog:
        """Add another batch's log to this one."""
        for t, (total, images) in other.totals.items():
            self._add(t, total, images)
        return self

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Timestep -> mean ratio, its sum and the number of images; descending timesteps."""
        found = [(t, float(total), n) for t, (total, n) in self.totals.items()]
        return {
            str(t): {"mean": total / images, "total": total, "images": images}
            for t, total, images in sorted(found, reverse=True)
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Mapping[str, Any]]) -> GuidanceLog:
        log = cls()
        for t, entry in saved.items():
            log._add(int(t), float(entry["total"]), int(entry["images"]))
        return log


def log_probability(classifier: Classifier, x: Tensor, t: Tensor | None, c: Tensor) -> Tensor:
    """log p(c | x), summed over images: its gradient by x is each image's own."""
    logits = classifier(x, t).to(x.dtype)
    return torch.log_softmax(logits, dim=1).gather(1, c[:, None]).sum()


def by_autograd(classifier: Classifier, x: Tensor, t: Tensor | None, c: Tensor) -> Tensor:
    """A `Gradient`, as torch computes it."""
    # The sampler runs in inference mode, whose tensors autograd refuses: clone them out of it.
    with torch.inference_mode(False), torch.enable_grad():
        x, t, c = x.clone().requires_grad_(), None if t is None else t.clone(), c.clone()
        (gradient,) = torch.autograd.grad(log_probability(classifier, x, t, c), x)
    return gradient


_by_compiled_grad = Compiled(torch.func.grad(log_probability, argnums=1))


def gradient_in(arithmetic: Arithmetic) -> Gradient:
    """A `Gradient` in another arithmetic than float32."""
    compute = _by_compiled_grad if arithmetic.compiled else by_autograd

    def gradient(classifier: Classifier, x: Tensor, t: Tensor | None, c: Tensor) -> Tensor:
        with arithmetic.autocast(x.device):
            found: Tensor = compute(classifier, x, t, c)
        return found

    return gradient


def classifier_guidance(
    classifier: Classifier,
    labels: Tensor,
    scale: float,
    abar: Sequence[float],
    *,
    at: Literal["x_t", "x_0"] = "x_t",
    timed: bool,
    log: GuidanceLog | None = None,
    gradient: Gradient = by_autograd,
) -> Guidance:
    """eps_hat = eps - lambda sqrt(1 - abar_t) grad_{x_t} log p(c | x_t), lambda = `scale`.

    labels: c, int64 [B]; timed: whether the classifier is given t. `at = "x_0"` shows the
    classifier the predicted (unclipped) x_0 with eps held constant; the gradient is still that by
    x_t. None of it reaches the U-Net or the classifier's weights, which must be frozen, in
    evaluation mode, and made outside `torch.inference_mode`. Scale 0 returns eps as it is, without
    a call of the classifier. `log` takes the ratio of norms at each step; `gradient` says how the
    gradient by what the classifier is shown is computed.
    """

    def guide(x_t: Tensor, t: int, eps: Tensor) -> Tensor:
        if scale == 0:
            return eps
        signal, spread = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        times = torch.full((len(x_t),), t, device=x_t.device) if timed else None
        c = labels.to(x_t.device, torch.int64)
        if at == "x_t":
            slope = gradient(classifier, x_t, times, c)
        else:
            slope = gradient(classifier, (x_t - spread * eps) / signal, times, c) / signal
        term = scale * spread * slope
        if log is not None:
            log.add(t, term, eps)
        return eps - term

    return guide
