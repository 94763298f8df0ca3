"""Descriptors of images: float32 unit vectors whose inner product is the similarity (spec 3).

    gamma(x, y) = <f(x), f(y)> = 1 - |f(x) - f(y)|^2 / 2

`load` makes a descriptor plugin ready, `describe` runs it over images on a fixed grid of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.similarity.preprocessing import Preprocessing, chosen
from membench.specs import DescriptorChoice

if TYPE_CHECKING:
    from membench.plugins import Describe, Descriptor, Weights

BATCH, BATCH_GPU = 8, 64
"""Images a batch: on the CPU more are slower (their activations leave the cache)."""


@dataclass(frozen=True)
class Extractor:
    """A descriptor that is ready: images uint8 [B, H, W, 1 or 3] -> float32 [B, D], unit rows."""

    name: str
    dimensions: int | None
    preprocessing: Preprocessing
    batch_size: int
    describe: Describe

    def __call__(self, images: np.ndarray) -> np.ndarray:
        rows = np.asarray(self.describe(self.preprocessing.apply(images)))
        wanted = (len(images), rows.shape[-1] if self.dimensions is None else self.dimensions)
        if rows.shape != wanted:
            raise MembenchError(f"descriptor {self.name}: shape {rows.shape}, expected {wanted}")
        rows = rows.astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        if len(bad):
            raise MembenchError(
                f"descriptor {self.name}: of length {norms[bad[0], 0]:g} for image {bad[0]} of a "
                "batch; it must be finite and not zero"
            )
        unit: np.ndarray = (rows / norms).astype(np.float32)
        return unit


def identity(plugin: Descriptor, choice: DescriptorChoice, device: str) -> dict[str, Any]:
    """Everything that could change descriptors, JSON-able; needs no weights."""
    return {
        "name": plugin.name,
        "version": plugin.version,
        "weights": None if plugin.weights is None else plugin.weights.sha256,
        "preprocessing": chosen(choice, plugin.preset).identity(),
        "storage": choice.storage,
        "compute": {"device": _device(plugin, device).partition(":")[0], "dtype": "float32"},
        "batch_size": _batch_size(plugin, device),
    }


def load(
    plugin: Descriptor,
    choice: DescriptorChoice,
    device: str = "cpu",
    weights: Path | None = None,
) -> Extractor:
    """Make a descriptor ready.

    weights: the user's file, for a descriptor that no package brings along and whose choice does
    not name one.

    Raises `MembenchError` when the file is missing or not the one that is published.
    """
    given = Path(choice.weights).expanduser() if choice.weights else None
    path = None
    if plugin.weights is not None:
        mine = weights if plugin.weights.find is None else None
        path = checked(plugin.name, plugin.weights, given or mine)
    how = chosen(choice, plugin.preset)
    from membench.plugins import Setup

    function = plugin.load(Setup(path, _device(plugin, device), how))
    return Extractor(plugin.name, plugin.dimensions, how, _batch_size(plugin, device), function)


def describe(
    images: np.ndarray,
    extractor: Extractor,
    *,
    flipped: bool = False,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Descriptors float32 [N, D] of images uint8 [N, H, W, C] (a memory map will do).

    flipped: of their mirror images. progress: is told how many images are done, batch by batch.
    """
    rows: np.ndarray | None = None
    for start in range(0, len(images), extractor.batch_size):
        batch = np.asarray(images[start : start + extractor.batch_size])
        found = extractor(batch[:, :, ::-1] if flipped else batch)
        if rows is None:
            rows = np.empty((len(images), found.shape[1]), np.float32)
        rows[start : start + len(found)] = found
        if progress is not None:
            progress(len(found))
    if rows is None:
        raise MembenchError(f"descriptor {extractor.name}: there are no images to describe")
    return rows


def checked(name: str, weights: Weights, given: Path | None) -> Path:
    """The weights file of descriptor `name`, its size and SHA-256 compared with the published."""
    what = f"{weights.file} (published at {weights.published}; SHA-256 {weights.sha256})"
    path = given
    if weights.find is not None and path is None:
        try:
            path = weights.find()
        except ImportError as error:
            raise MembenchError(
                f"descriptor {name}: no {error.name} installed, which brings {what}"
            ) from None
    if path is None:
        raise MembenchError(
            f"descriptor {name}: needs {what}; give it with --descriptor-weights PATH "
            "or as `weights` in the card"
        )
    try:
        size = path.stat().st_size
        if size != weights.size:
            raise MembenchError(
                f"{path}: {size} bytes, expected the {weights.size} of {what}; get it again"
            )
        found = file_hash(path)
    except OSError as error:
        raise MembenchError(
            f"{path}: cannot be read ({error.strerror}); descriptor {name} needs {what}"
        ) from None
    if found != weights.sha256:
        raise MembenchError(f"{path}: SHA-256 {found}, expected {what}; get it again")
    return path


def _device(plugin: Descriptor, device: str) -> str:
    return "cpu" if plugin.cpu_only else device


def _batch_size(plugin: Descriptor, device: str) -> int:
    return BATCH if _device(plugin, device) == "cpu" else BATCH_GPU
