"""How images are made ready for a descriptor: resizing, crop, normalisation (spec section 3).

The field does not agree on it and it changes scores, so every way has a name and is recorded.
Resizing is Pillow's bilinear filter with antialiasing on uint8 pixels, which is what torchvision's
`Resize` does to PIL images: each axis in turn, horizontal first, rounded to uint8 after each. Grey
images become RGB by repeating their channel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from membench.errors import MembenchError
from membench.specs import DescriptorChoice

VERSION = 1
"""Of resizing and normalisation: raise it when prepared images change."""

Channels = tuple[float, float, float]
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Steps in the order in which they happen; None leaves one out.

    resize_first: to a square of that side. small_edge: the smaller edge to that length, the other
    in proportion (rounded down). square: both edges to that length. crop: that square from the
    centre. mean, std: of R, G, B in [0, 1].
    """

    resize_first: int | None = None
    small_edge: int | None = None
    square: int | None = None
    crop: int | None = None
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD

    def identity(self) -> dict[str, Any]:
        steps = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {"version": VERSION, "resize": "bilinear, antialiased"} | steps

    def apply(self, images: np.ndarray) -> np.ndarray:
        """Resize and crop uint8 [B, H, W, 1 or 3] to uint8 [B, h, w, 3]."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise MembenchError(
                f"images must be uint8 [N, H, W, 1 or 3], not {images.dtype} {images.shape}"
            )
        if self.resize_first is not None:
            images = _resized(images, self.resize_first, self.resize_first)
        if self.small_edge is not None:
            images = _resized(images, *_in_proportion(images.shape[1:3], self.small_edge))
        if self.square is not None:
            images = _resized(images, self.square, self.square)
        if self.crop is not None:
            top, left = (round((edge - self.crop) / 2) for edge in images.shape[1:3])
            images = images[:, top : top + self.crop, left : left + self.crop]
        return np.array(np.broadcast_to(images, (*images.shape[:3], 3)), order="C")  # a copy

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] as float32 [B, 3, H, W]: (x / 255 - mean) / std."""
        x = images.astype(np.float32)
        x /= np.float32(255)
        x -= np.array(self.mean, np.float32)
        x /= np.array(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))

    def as_imagenet(self, images: np.ndarray) -> np.ndarray:
        """Pixels that ImageNet's normalisation turns into ours, for models that normalise inside.

        uint8 [B, H, W, 3] in and out. Exact where the normalisation is ImageNet's; else rounded to
        whole pixels, so a network sees values that are off by at most 0.5 / 255 / std.
        """
        if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return images
        levels = np.arange(256)[:, None] / 255
        wanted = (levels - np.array(self.mean)) / np.array(self.std)
        pixels = 255 * (np.array(IMAGENET_MEAN) + np.array(IMAGENET_STD) * wanted)
        if pixels.min() < -0.5 or pixels.max() > 255.5:
            raise MembenchError(
                f"mean {self.mean}, std {self.std}: out of reach of a model that normalises inside"
            )
        table = np.rint(pixels).astype(np.uint8)
        return np.stack([table[images[..., c], c] for c in range(3)], axis=-1)


PRESETS: dict[str, Preprocessing] = {
    # the README of facebookresearch/sscd-copy-detection: `small_288` and `skew_320`
    "official_288": Preprocessing(small_edge=288),
    "official_320": Preprocessing(square=320),
    # diff_retrieval.py of somepago/DCR
    "dcr_224": Preprocessing(small_edge=256, crop=224, mean=(0.5,) * 3, std=(0.5,) * 3),
    # scripts/eval.py of chenchen-usyd/AMG-sd
    "amg_224": Preprocessing(square=224, mean=(0.0,) * 3, std=(1.0,) * 3),
}


def chosen(choice: DescriptorChoice, default: str | None) -> Preprocessing:
    """The preprocessing of a choice; `default` is the descriptor's own preset."""
    preset = choice.preset or default
    if choice.input_size is not None:
        how = Preprocessing(square=choice.input_size)
    elif preset is None:
        how = Preprocessing()
    elif preset in PRESETS:
        how = PRESETS[preset]
    else:
        raise MembenchError(f"preset: {preset!r}, expected one of {', '.join(PRESETS)}")
    return replace(how, resize_first=choice.resize_first)


def _in_proportion(size: tuple[int, ...], small_edge: int) -> tuple[int, int]:
    """(height, width) whose smaller edge is `small_edge`; the other is rounded down."""
    height, width = size
    if width <= height:
        return int(small_edge * height / width), small_edge
    return small_edge, int(small_edge * width / height)


def _resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
    if images.shape[1:3] == (height, width):
        return images
    out = np.empty((len(images), height, width, images.shape[3]), np.uint8)
    for row, image in zip(out, images, strict=True):
        picture = Image.fromarray(image[..., 0] if images.shape[3] == 1 else image)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        row[:] = np.asarray(resized).reshape(row.shape)
    return out
