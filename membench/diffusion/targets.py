"""Target models behind one contract: a trained U-Net, or a denoiser known in closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from membench.data.imageset import Dataset
from membench.diffusion.arithmetic import Arithmetic, ComputedNetwork
from membench.diffusion.eps import EpsNetwork
from membench.diffusion.eps import abar_at as abar_at
from membench.diffusion.sampler import EpsModel, from_uint8
from membench.diffusion.unet import NoiseSchedule, build_unet, condition_labels, schedule_abar
from membench.diffusion.weights import read_safetensors as read_safetensors
from membench.errors import MembenchError
from membench.hashing import array_hash, derive_seed, file_hash
from membench.specs import Images, TargetRecipe

ORACLE = "oracle"
Shape = tuple[int, int, int]
Field = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t float64 [B], real numbers from 0 to T - 1) -> eps [B, C, H, W], with its
gradient in x_t: what likelihoods need of a target."""


class Target(Protocol):
    """A diffusion model under attack.

    name: what users call it; shape: (C, H, W); abar: [T] cumulative product of 1 - beta; device:
    where `eps_model` wants its x_t; identity: everything that pins the model, JSON-able.
    """

    name: str
    shape: Shape
    abar: list[float]
    device: torch.device
    identity: dict[str, Any]

    def eps_model(self, seed: int, indices: Sequence[int]) -> EpsModel:
        """(x_t [B, C, H, W], t) -> eps [B, C, H, W], for the images `indices` of run `seed`."""
        ...


class DensityTarget(Target, Protocol):
    """A target whose likelihood can be computed."""

    def mixture(self, labels: np.ndarray | None) -> list[tuple[float, Field]]:
        """Its density as a weighted sum (weights add up to 1) of densities, one for each field.

        labels: int64 [B], the condition of each image; None if the target takes none.
        """
        ...


def load_strictly(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give `network` (it may be on the meta device) exactly `tensors`, in its own dtypes.

    Raises `MembenchError` naming `path` and the first tensor that is missing, unexpected or of
    another shape.
    """
    expected = network.state_dict()
    for complaint, names in (
        ("is missing", expected.keys() - tensors.keys()),
        ("is unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            raise MembenchError(f"{path}: tensor {min(names)} {complaint} (of {len(names)})")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise MembenchError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
    cast = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    network.load_state_dict(cast, strict=True, assign=True)


def draw_conditions(
    labels: np.ndarray | None, seed: int, indices: Sequence[int]
) -> np.ndarray | None:
    """The label under which a conditional target draws each image: int64 [B], or None.

    labels: int64 [N], those of the members; image i of run `seed` takes the label of the member
    `derive_seed(seed, "condition", i)` points at, so that labels come as often as in training.
    """
    if labels is None:
        return None
    chosen = [derive_seed(seed, "condition", i) % len(labels) for i in indices]
    return np.asarray(labels[chosen], np.int64)


def conditional_model(
    network: nn.Module, labels: np.ndarray | None, device: torch.device | str
) -> Callable[[Tensor, Any], Tensor]:
    """A U-Net told the `labels` [B] of its images (None: unconditional): (x_t, t) -> eps.

    t is an integer or a tensor [B] of real timesteps.
    """
    known = {}
    if labels is not None:
        known = {"class_labels": torch.from_numpy(labels).to(device)}
    return lambda x_t, t: network(x_t, t, return_dict=False, **known)[0]


class UNetTarget:
    """A U-Net that predicts eps, such as diffusers' `UNet2DModel`; frozen on construction.

    labels: int64 [N], what a conditional U-Net was told of each member; None if unconditional.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        shape: Shape,
        abar: list[float],
        identity: dict[str, Any],
        device: torch.device | str = "cpu",
        labels: np.ndarray | None = None,
    ):
        self.name, self.shape, self.abar, self.identity = name, shape, abar, identity
        self.labels = labels
        self.device = torch.device(device)
        # Without gradients a CPU is a fifth faster on contiguous tensors (its group norm is slow on
        # channels_last); a GPU's tensor cores want channels_last.
        on_cpu = self.device.type == "cpu"
        self.layout = torch.contiguous_format if on_cpu else torch.channels_last
        network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.network = network.eval().requires_grad_(False)

    def eps_model(self, seed: int, indices: Sequence[int]) -> EpsModel:
        """The same for every image; under the label drawn for it if the U-Net is conditional."""
        return self.given(draw_conditions(self.labels, seed, indices))

    def given(self, labels: np.ndarray | None) -> EpsModel:
        """The eps model of images with these labels: int64 [B], None for an unconditional U-Net."""
        model = conditional_model(self.network, labels, self.device)

        @torch.no_grad()
        def predict_eps(x_t: Tensor, t: int) -> Tensor:
            return model(x_t.contiguous(memory_format=self.layout), t)

        return predict_eps

    def computed(self, arithmetic: Arithmetic) -> UNetTarget:
        """The same target with its U-Net (not what `EpsNetwork` adds) in another arithmetic."""
        other, network = copy.copy(self), self.network
        if isinstance(network, EpsNetwork):
            inner = ComputedNetwork(network.network, arithmetic)
            other.network = network.around(inner)
        else:
            other.network = ComputedNetwork(network, arithmetic)
        return other

    def mixture(self, labels: np.ndarray | None) -> list[tuple[float, Field]]:
        """One density: p(x), or p(x | y) of images with these labels, int64 [B]."""
        model = conditional_model(self.network, labels, self.device)

        def field(x_t: Tensor, t: Tensor) -> Tensor:
            x_t = x_t.to(self.device, torch.float32).contiguous(memory_format=self.layout)
            return model(x_t, t.to(self.device, torch.float32))

        return [(1.0, field)]


def computed(target: Target, arithmetic: Arithmetic) -> Target:
    """`target` with its network in another arithmetic, itself in plain float32.

    Raises `MembenchError` for a target without a network.
    """
    if arithmetic == Arithmetic():
        return target
    if not isinstance(target, UNetTarget):
        raise MembenchError(
            f"--precision, --compile: {target.name} is a formula in float64, not a network"
        )
    return target.computed(arithmetic)


def load_unet_target(
    recipe: TargetRecipe,
    images: Images,
    weights: Path,
    device: torch.device | str = "cpu",
    name: str = "unet",
    labels: np.ndarray | None = None,
) -> UNetTarget:
    """Read trained weights (safetensors) into the recipe's U-Net.

    labels: int [N] of the members, for a conditional recipe.
    Raises `MembenchError` naming the file when it is missing, truncated, does not fit the recipe,
    or differs from the recipe's `weights_sha256`.
    """
    tensors, _ = read_safetensors(weights)
    digest = file_hash(weights)
    if recipe.weights_sha256 not in (None, digest):
        raise MembenchError(
            f"{weights}: SHA-256 {digest[:12]}..., the recipe's is {recipe.weights_sha256[:12]}..."
        )
    with torch.device("meta"):
        network = build_unet(recipe, images)
    load_strictly(network, tensors, weights)
    identity = {
        "kind": "unet",
        "weights_sha256": digest,
        "unet": recipe.unet.identity(),
        "shape": list(images.shape),
        "prediction_type": "epsilon",
        "beta_schedule": recipe.beta_schedule,
        "train_timesteps": recipe.train_timesteps,
    }
    conditions = condition_labels(recipe, images, labels)
    if conditions is not None:
        identity |= {"condition": recipe.condition, "labels_sha256": array_hash(conditions)}
    abar = schedule_abar(recipe)
    return UNetTarget(name, network, images.shape, abar, identity, device, conditions)


class ClosedFormTarget:
    """The optimal denoiser of p = (1/N) sum_i Normal(x_i, s^2 I) (spec section 6).

    images: uint8 [N, H, W, C], may be memory-mapped; kernel: the width s in units of [-1, 1],
    0 for the finite set itself. References go by in blocks of `block`, so that memory is bounded
    by block * C * H * W float64 numbers; all of it is computed in float64.
    """

    def __init__(
        self,
        images: np.ndarray,
        abar: list[float],
        *,
        name: str = "closed_form",
        kernel: float = 0.0,
        block: int = 1024,
        device: torch.device | str = "cpu",
        images_sha256: str | None = None,
    ):
        if not len(images):
            raise MembenchError(f"{name}: a closed-form target needs at least one image")
        self.name, self.abar, self.kernel, self.block = name, abar, kernel, block
        _, height, width, channels = images.shape
        self.shape: Shape = (channels, height, width)
        self.device = torch.device(device)
        self.images = images
        self.identity: dict[str, Any] = {
            "kind": "closed_form",
            "images_sha256": images_sha256 or array_hash(images),
            "kernel": kernel,
            "abar_sha256": array_hash(np.array(abar)),
        }

    def eps_model(self, seed: int, indices: Sequence[int]) -> EpsModel:
        """The same for every image."""
        return self.predict_eps

    def mixture(self, labels: np.ndarray | None) -> list[tuple[float, Field]]:
        """One density, that of the kernels; there are no labels."""

        def field(x_t: Tensor, t: Tensor) -> Tensor:
            abar_t = abar_at(self.abar, t.to(x_t.device))[:, None]
            return self._eps(x_t, abar_t)

        return [(1.0, field)]

    @torch.no_grad()
    def predict_eps(self, x_t: Tensor, t: int) -> Tensor:
        """eps = (x_t - sqrt(abar_t) E[x_0 | x_t]) / sqrt(1 - abar_t), [B, C, H, W]."""
        return self._eps(x_t, self.abar[t])

    @torch.no_grad()
    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t], float64 [B, C, H, W]: spec section 6, with a running log-sum-exp."""
        return self._denoise(x_t.double().flatten(1), self.abar[t]).view(x_t.shape)

    def _eps(self, x_t: Tensor, abar_t: float | Tensor) -> Tensor:
        x = x_t.double().flatten(1)
        eps = (x - abar_t**0.5 * self._denoise(x, abar_t)) / (1 - abar_t) ** 0.5
        return eps.to(x_t.dtype).view(x_t.shape)

    def _denoise(self, x: Tensor, abar_t: float | Tensor) -> Tensor:
        """x: float64 [B, D]; abar_t: a number or float64 [B, 1]; differentiable in x."""
        s2 = self.kernel**2
        v_t = abar_t * s2 + 1 - abar_t
        top = x.new_full((len(x), 1), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(x)
        for start in range(0, len(self.images), self.block):
            x_i = from_uint8(self.images[start : start + self.block]).to(self.device)
            x_i = x_i.double().flatten(1)
            # -||x_t - sqrt(abar_t) x_i||^2 / (2 v_t) without the term that all i share
            logits = (abar_t**0.5 * x @ x_i.T - abar_t * x_i.square().sum(1) / 2) / v_t
            # the result does not depend on what is subtracted here, so neither does its gradient
            new_top = torch.maximum(top, logits.detach().amax(1, keepdim=True))
            weights, rescale = (logits - new_top).exp(), (top - new_top).exp()
            total = total * rescale + weights.sum(1, keepdim=True)
            mean = mean * rescale + weights @ x_i
            top = new_top
        shrink = abar_t**0.5 * s2 / v_t
        return (1 - abar_t**0.5 * shrink) * mean / total + shrink * x


class OracleTarget:
    """A target of known extraction rate: image by image a copy of a member, or of a stranger.

    Image i of run `seed` follows the closed form of `dataset.members` with probability `rate` and
    that of `dataset.heldout_rest` otherwise, decided by `derive_seed(seed, "oracle", i)`; the
    held-out twin stays out of it, so that its column shows the false-match level. The noise
    schedule is that of the card's default target (`DataCard.noise_recipe`), else the linear one.
    """

    def __init__(
        self,
        dataset: Dataset,
        rate: float,
        *,
        kernel: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        card = dataset.card
        schedule = card.noise_recipe or NoiseSchedule()
        self.name, self.rate = f"{ORACLE}:{rate:g}", rate
        self.shape, self.abar = card.images.shape, schedule_abar(schedule)
        self.device = torch.device(device)
        if rate < 1 and not len(dataset.heldout_rest):
            raise MembenchError(
                f"{self.name}: {card.name} has no held-out images beyond the twin to copy instead"
            )
        self.sides = {
            copies: ClosedFormTarget(
                images.images,
                self.abar,
                name=self.name,
                kernel=kernel,
                device=device,
                images_sha256=split.images_sha256,
            )
            for copies, images, split in (
                (True, dataset.members, card.splits.members),
                (False, dataset.heldout_rest, card.splits.heldout),
            )
            if len(images)
        }
        self.identity: dict[str, Any] = {
            "kind": ORACLE,
            "version": 1,
            "rate": rate,
            "kernel": kernel,
            "members_images_sha256": card.splits.members.images_sha256,
            "heldout_images_sha256": card.splits.heldout.images_sha256,
            "heldout_rows": [len(dataset.members), len(dataset.heldout)],
            "prediction_type": "epsilon",
            "beta_schedule": schedule.beta_schedule,
            "train_timesteps": schedule.train_timesteps,
        }

    def copies_member(self, seed: int, index: int) -> bool:
        """The ground truth: whether image `index` of run `seed` copies a member."""
        return derive_seed(seed, "oracle", index) < self.rate * 2**63

    def eps_model(self, seed: int, indices: Sequence[int]) -> EpsModel:
        """Image by image the member's or the stranger's denoiser."""
        copies = torch.tensor([self.copies_member(seed, i) for i in indices], device=self.device)
        rows = {side: (copies == side).nonzero().flatten() for side in self.sides}

        def predict_eps(x_t: Tensor, t: int) -> Tensor:
            eps = torch.empty_like(x_t)
            for side, target in self.sides.items():
                if len(rows[side]):
                    eps[rows[side]] = target.predict_eps(x_t[rows[side]], t)
            return eps

        return predict_eps

    def mixture(self, labels: np.ndarray | None) -> list[tuple[float, Field]]:
        """The members' density with weight `rate`, the strangers' with the rest."""
        weights = {True: self.rate, False: 1 - self.rate}
        return [
            (weights[side], target.mixture(None)[0][1])
            for side, target in self.sides.items()
            if weights[side] > 0
        ]


def parse_oracle(name: str) -> float | None:
    """The rate of `oracle:RATE`, or None for any other name; a bad rate is a `MembenchError`."""
    kind, _, text = name.partition(":")
    if kind != ORACLE:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise MembenchError(f"{name}: expected oracle:RATE with a rate from 0 to 1")
    return rate
