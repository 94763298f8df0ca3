"""Targets that were trained elsewhere: found, read, checked against a data set, made to give eps.

Settings of a pipeline's own sampler (steps, clipping, thresholding, spacing, variance) are not
taken over: all targets are sampled as the card says. The identity of such a target holds the
SHA-256 of its weights, its configuration, schedule, prediction type and layout, and not the place
it was found at, so that a moved folder is still the same target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from membench.diffusion import pipeline
from membench.diffusion.eps import EpsNetwork, Prediction
from membench.diffusion.improved_diffusion import ImprovedUNet, improved_abar
from membench.diffusion.targets import UNetTarget, load_strictly
from membench.diffusion.unet import count_parameters
from membench.diffusion.weights import read_weights
from membench.errors import MembenchError
from membench.hashing import array_hash
from membench.hub import locate
from membench.specs import Images, explain
from membench.specs_base import described
from membench.specs_pretrained import Pretrained

VERSION = 1
"""Of the code that turns a pretrained model into eps: raise it when its numbers change."""


class PretrainedTarget(UNetTarget):
    """A U-Net target that also knows where it came from; source: JSON-able, beside the identity."""

    source: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A pretrained model as it was found, whole and checked, but not yet tied to a data set.

    size: (H, W) it was made for, None for any; classes: labels it knows, None if it takes none,
    0 if it takes any number; learned_variance: half of what it returns is dropped.
    """

    title: str
    label: str
    network: nn.Module
    layout: str
    architecture: str
    config: dict[str, Any]
    channels: int
    size: tuple[int, int] | None
    classes: int | None
    prediction: Prediction
    learned_variance: bool
    schedule: dict[str, Any]
    abar: list[float]
    time_scale: float
    weights: Path
    weights_sha256: str
    dtype: str
    commit: str | None

    @property
    def name(self) -> str:
        """For people: the folder's name or hub id, and the start of the weights' hash."""
        return f"{self.label}@{self.weights_sha256[:8]}"

    def identity(self) -> dict[str, Any]:
        """Everything that pins the model's eps, JSON-able."""
        return {
            "kind": "pretrained",
            "version": VERSION,
            "layout": self.layout,
            "architecture": self.architecture,
            "config": self.config,
            "weights_sha256": self.weights_sha256,
            "prediction_type": self.prediction,
            "learned_variance": self.learned_variance,
            "schedule": self.schedule,
            "train_timesteps": len(self.abar),
            "time_scale": self.time_scale,
            "abar_sha256": array_hash(np.array(self.abar)),
        }

    def misfit(self, images: Images) -> str | None:
        """Why the model cannot be a target of such images; None if it can."""
        if self.channels != images.channels:
            return (
                f"it makes images of {self.channels} channel(s), the data set's have "
                f"{images.channels}"
            )
        if self.size is not None and self.size != (images.height, images.width):
            return (
                f"it makes images of {self.size[0]} x {self.size[1]} pixels, the data set's have "
                f"{images.height} x {images.width}"
            )
        return None


def read_pretrained(spec: Pretrained, folders: Sequence[Path]) -> Model:
    """Find and read a pretrained model.

    folders: where a relative `spec.pretrained` may lie. Raises `MembenchError` naming the file and
    what is wrong with it: missing, truncated, pickled, another hash, a tensor missing or too many.
    """
    place = locate(spec.pretrained, folders, spec.revision, spec.allow_pickle)
    read = _read_diffusers if spec.layout == "diffusers" else _read_improved
    return read(spec, place.path, place.commit)


def _read_diffusers(spec: Pretrained, folder: Path, commit: str | None) -> Model:
    if not folder.is_dir():
        raise MembenchError(
            f"{folder}: a file, expected a diffusers folder; weights alone do not say what network "
            "they are of: describe them in a TOML target"
        )
    unet = pipeline.model_folder(folder)
    config = pipeline.read_config(unet)
    path = unet / pipeline.CONFIG
    network = pipeline.build(config, path)
    abar, prediction, schedule = pipeline.read_schedule(folder, unet, spec.scheduler)
    full: Any = network.config
    channels, returned = full.in_channels, full.out_channels
    if returned not in (channels, 2 * channels) or (
        prediction == "score_ve" and returned > channels
    ):
        raise MembenchError(
            f"{path}: {returned} channels out of {channels}; expected as many, or twice as many "
            "with a learned variance"
        )
    weights = pipeline.weights_file(unet, spec.file, spec.allow_pickle)
    tensors, digest = read_weights(weights, spec.weights_sha256, spec.allow_pickle)
    load_strictly(network, pipeline.modern_names(tensors), weights)
    size = full.sample_size
    if size is not None:
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
    classes = full.num_class_embeds
    if full.class_embed_type == "timestep":
        classes = 0
    return Model(
        title=spec.title,
        label=spec.pretrained if commit else folder.resolve().name,
        network=network,
        layout=spec.layout,
        architecture="UNet2DModel",
        config=config,
        channels=channels,
        size=size,
        classes=classes,
        prediction=prediction,
        learned_variance=returned > channels,
        schedule=schedule,
        abar=abar,
        time_scale=1.0,
        weights=weights,
        weights_sha256=digest,
        dtype=_dtypes(tensors),
        commit=commit,
    )


def _read_improved(spec: Pretrained, place: Path, commit: str | None) -> Model:
    settings = spec.network
    assert settings is not None, "the spec asks for it"
    if place.is_dir() and spec.file is None:
        raise MembenchError(f'{place}: a folder; name the weights in it, as in file = "NAME"')
    weights = place / spec.file if place.is_dir() and spec.file is not None else place
    with torch.device("meta"):
        network = ImprovedUNet(settings)
    tensors, digest = read_weights(weights, spec.weights_sha256, spec.allow_pickle)
    load_strictly(network, tensors, weights)
    steps = settings.diffusion_steps
    return Model(
        title=spec.title,
        label=spec.pretrained if commit else weights.stem,
        network=network,
        layout=spec.layout,
        architecture="ImprovedUNet",
        config=settings.identity(),
        channels=settings.in_channels,
        size=(settings.image_size, settings.image_size),
        classes=settings.num_classes,
        prediction="sample" if settings.predict_xstart else "epsilon",
        learned_variance=settings.learn_sigma,
        schedule={"noise_schedule": settings.noise_schedule},
        abar=improved_abar(settings),
        time_scale=1000 / steps if settings.rescale_timesteps else 1.0,
        weights=weights,
        weights_sha256=digest,
        dtype=_dtypes(tensors),
        commit=commit,
    )


def _dtypes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))


def conditions(
    model: Model, wanted: str, classes: int, labels: np.ndarray
) -> tuple[str, np.ndarray] | None:
    """What a class-conditional model is told: (`labels` or `uniform`, int64 labels to draw from).

    wanted: the target's `condition`; classes: of the data set; labels: int [N] of its members.
    None for an unconditional model.
    """
    known = model.classes
    if known is None:
        if wanted != "auto":
            raise MembenchError(f"{model.weights}: condition = {wanted!r}, but it takes no labels")
        return None
    if wanted == "auto":
        wanted = "labels" if known in (0, classes) else "uniform"
    if wanted == "uniform":
        return wanted, np.arange(known or classes, dtype=np.int64)
    told = np.asarray(labels, np.int64)
    if told.min() < 0 or (known and told.max() >= known):
        raise MembenchError(
            f"{model.weights}: knows labels 0 to {known - 1}, the members have {told.min()} to "
            f'{told.max()}; take condition = "uniform"'
        )
    return wanted, told


def as_target(
    model: Model,
    condition: str,
    images: Images,
    labels: np.ndarray,
    *,
    name: str | None = None,
    device: torch.device | str = "cpu",
) -> PretrainedTarget:
    """A pretrained model as a target of a data set with such images and member labels int [N]."""
    reason = model.misfit(images)
    if reason is not None:
        raise MembenchError(f"{model.weights}: {reason}")
    told = conditions(model, condition, len(images.classes), labels)
    identity = model.identity() | {"shape": list(images.shape)}
    if told is not None:
        identity |= {"condition": told[0], "labels_sha256": array_hash(told[1])}
    network = EpsNetwork(
        model.network, model.prediction, model.abar, model.channels, model.time_scale
    )
    target = PretrainedTarget(
        name or model.name,
        network,
        images.shape,
        model.abar,
        identity,
        device,
        None if told is None else told[1],
    )
    target.source = {"title": model.title, "weights": model.weights.name, "commit": model.commit}
    return target


def parse_place(text: str) -> tuple[Pretrained, list[Path]]:
    """A `--target` that names a place: a folder, `ID` or `ID@COMMIT` of a hub, or a TOML file.

    The TOML holds what a card's `[targets.NAME]` would. Returns the description and the folders
    where what it names may lie.
    """
    path = Path(text).expanduser()
    if path.suffix == ".toml":
        with described(path, "target file") as content:
            return Pretrained.model_validate({"title": path.stem} | content), [path.parent]
    source, at, revision = text.partition("@") if not path.exists() else (text, "", "")
    try:
        title = f"pretrained {Path(source).name}"
        spec = Pretrained(title=title, pretrained=source, revision=revision if at else None)
    except ValidationError as error:
        raise MembenchError(f"{text}: {explain(error)}") from None
    return spec, [Path()]


def summary(model: Model) -> dict[str, Any]:
    """What `membench targets show` prints of a model, JSON-able."""
    size = "any" if model.size is None else f"{model.size[0]} x {model.size[1]}"
    classes = {None: "none", 0: "any label"}.get(model.classes, f"{model.classes} classes")
    abar = model.abar
    return {
        "name": model.name,
        "title": model.title,
        "layout": model.layout,
        "architecture": model.architecture,
        "parameters": count_parameters(model.network),
        "images": f"{size} pixels, {model.channels} channel(s)",
        "conditions": classes,
        "prediction_type": model.prediction,
        "learned_variance": model.learned_variance,
        "train_timesteps": len(abar),
        "schedule": model.schedule,
        "abar_first_last": [abar[0], abar[-1]],
        "weights": str(model.weights),
        "weights_bytes": model.weights.stat().st_size,
        "weights_dtype": model.dtype,
        "weights_sha256": model.weights_sha256,
        "commit": model.commit,
        "config": model.config,
    }
