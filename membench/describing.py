"""Descriptors of a whole set of images as an artifact: computed once, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from membench.files import read_json, write_array, write_joined, write_json
from membench.similarity.descriptors import describe, identity, load
from membench.specs import DescriptorChoice
from membench.store import PARTS, Artifact, Store, Work

if TYPE_CHECKING:
    from membench.data.imageset import Dataset
    from membench.lab import Progress
    from membench.plugins import Descriptor
    from membench.registry import Registry

BLOCK = 256
"""Images in a file of their own until all are done: what a kill loses at most. Whole batches."""
DESCRIPTORS = "descriptors.npy"


def descriptors_artifact(
    plugin: Descriptor,
    choice: DescriptorChoice,
    images: Callable[[], np.ndarray],
    count: int,
    *,
    source: dict[str, Any],
    inputs: tuple[Artifact[Any], ...] = (),
    of: str,
    flipped: bool,
    progress: Progress,
    device: str,
    weights: Path | None,
) -> Artifact[np.ndarray]:
    """Descriptors [N, D] of `choice.storage`, memory-mapped; rows are unit vectors.

    images: gives uint8 [N, H, W, C] when they are needed; source: their identity, if they are no
    artifact among `inputs`; of: what the images are, for people. float16 moves a score by up to
    2^-10 (`tests/test_descriptors.py`); on 59 million pairs of real faces by 1.4e-4.
    """
    title = f"{choice.name} of {of}{', flipped' if flipped else ''}"

    def make(folder: Path, work: Work) -> None:
        parts = folder / PARTS
        extractor = None
        with progress(title, count, "images") as advance:
            for start in range(0, count, BLOCK):
                part = parts / f"block-{start // BLOCK:06d}.npy"
                log = part.with_suffix(".json")
                if log.is_file():
                    advance(min(BLOCK, count - start))
                else:
                    extractor = extractor or load(plugin, choice, device, weights)
                    began = time.monotonic()
                    block = images()[start : start + BLOCK]
                    rows = describe(block, extractor, flipped=flipped, progress=advance)
                    write_array(part, rows.astype(choice.storage))
                    write_json(log, {"seconds": time.monotonic() - began})
                work.seconds += read_json(log)["seconds"]
        write_joined(folder / DESCRIPTORS, sorted(parts.glob("block-*.npy")), count)

    return Artifact(
        "descriptors",
        title,
        source | {"descriptor": identity(plugin, choice, device), "flipped": flipped},
        make,
        lambda folder: np.load(folder / DESCRIPTORS, mmap_mode="r"),
        inputs,
    )


@dataclass(frozen=True)
class Describer:
    """Describes images by descriptors of a registry, into a store.

    weights: the user's file, for descriptors that need one.
    """

    registry: Registry
    store: Store
    progress: Progress
    device: str = "cpu"
    weights: Path | None = None

    def identity(self, choice: DescriptorChoice) -> dict[str, Any]:
        """What pins the descriptor's scores, its weights' hash and preprocessing spelled out."""
        return identity(self.registry.descriptor(choice.name), choice, self.device)

    def of_split(
        self, dataset: Dataset, split: str, choice: DescriptorChoice, flipped: bool = False
    ) -> Artifact[np.ndarray]:
        """Unit vectors [N, D] of one split's images (or their mirror images), memory-mapped."""
        described = getattr(dataset.card.splits, split)
        return self._artifact(
            choice,
            lambda: getattr(dataset, split).images,
            described.count,
            source={"images": described.images_sha256},
            of=split,
            flipped=flipped,
        )

    def of_images(
        self, images: Artifact[Any], choice: DescriptorChoice, flipped: bool = False
    ) -> Artifact[np.ndarray]:
        """Unit vectors [N_G, D] of what a target returned (`Lab.images`), memory-mapped."""
        return self._artifact(
            choice,
            lambda: self.store.get(images).images,
            images.identity["count"],
            source={},
            inputs=(images,),
            of=images.title,
            flipped=flipped,
        )

    def of_array(
        self, images: np.ndarray, sha256: str, choice: DescriptorChoice, flipped: bool = False
    ) -> Artifact[np.ndarray]:
        """Unit vectors [N_G, D] of images uint8 [N_G, H, W, C] of that `array_hash`."""
        return self._artifact(
            choice,
            lambda: images,
            len(images),
            source={"images": sha256},
            of="images",
            flipped=flipped,
        )

    def _artifact(
        self, choice: DescriptorChoice, images: Callable[[], np.ndarray], count: int, **what: Any
    ) -> Artifact[np.ndarray]:
        return descriptors_artifact(
            self.registry.descriptor(choice.name),
            choice,
            images,
            count,
            progress=self.progress,
            device=self.device,
            weights=self.weights,
            **what,
        )
