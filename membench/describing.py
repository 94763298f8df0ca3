"""Descriptors of a whole set of images as an artifact: computed once, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from membench.files import read_json, write_array, write_joined, write_json
from membench.similarity.descriptors import describe, identity, load
from membench.specs import DescriptorChoice
from membench.store import PARTS, Artifact, Work

if TYPE_CHECKING:
    from membench.lab import Progress
    from membench.plugins import Descriptor

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
    about 5e-4 (`tests/test_descriptors.py`).
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
