"""The contract every descriptor keeps, checked on a few images of `fashion_mini`.

`membench test NAME` runs these on any descriptor, offline; the project's own tests run them on
those that come with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from membench.data.imageset import load_dataset
from membench.plugins import Descriptor
from membench.registry import Registry
from membench.similarity.descriptors import Extractor, describe, identity, load
from membench.specs import DescriptorChoice

TOLERANCE = 1e-4
"""How far a descriptor may move when the batch changes: no score moves by more than that."""
IMAGES = 10  # one full batch and a short one


@dataclass(frozen=True)
class DescriptorBench:
    """One descriptor and images for it: grey uint8 [N, 16, 16, 1], colour uint8 [N, 16, 16, 3]."""

    descriptor: Descriptor
    grey: np.ndarray
    colour: np.ndarray
    extractor: Extractor
    weights: Path | None

    def fresh(self) -> Extractor:
        return load(
            self.descriptor, DescriptorChoice(name=self.descriptor.name), "cpu", self.weights
        )


def bench(registry: Registry, plugin: Descriptor, weights: Path | None) -> DescriptorBench:
    """Raises `MembenchError` where the descriptor's weights are missing or wrong."""
    extractor = load(plugin, DescriptorChoice(name=plugin.name), "cpu", weights)
    folder = registry.data_folder("fashion_mini")
    members = load_dataset(registry.card("fashion_mini"), folder).members.images
    grey = np.array(members[:IMAGES])
    colour = np.concatenate([members[k * IMAGES : (k + 1) * IMAGES] for k in range(3)], axis=3)
    return DescriptorBench(plugin, grey, colour, extractor, weights)


def describes_itself(bench: DescriptorBench) -> None:
    """Title, paper and docstring are there, and the identity is JSON."""
    for field in ("title", "paper", "summary"):
        assert getattr(bench.descriptor, field).strip(), f"{field} is empty"
    choice = DescriptorChoice(name=bench.descriptor.name)
    json.dumps(identity(bench.descriptor, choice, "cpu"), allow_nan=False)


def gives_unit_vectors(bench: DescriptorBench) -> None:
    """Descriptors are float32 [B, D] of length one, of the declared D, for grey and colour."""
    for images in (bench.grey, bench.colour):
        rows = describe(images, bench.extractor)
        assert rows.dtype == np.float32 and rows.ndim == 2 and len(rows) == len(images)
        assert bench.descriptor.dimensions in (None, rows.shape[1])
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
        assert np.abs(lengths - 1).max() < 1e-6, (
            f"a length of {lengths[np.abs(lengths - 1).argmax()]}"
        )


def tells_images_apart(bench: DescriptorBench) -> None:
    """Two images have different descriptors."""
    rows = describe(bench.colour, bench.extractor)
    assert len(np.unique(rows, axis=0)) == len(rows), "two images have one descriptor"


def grey_is_colour(bench: DescriptorBench) -> None:
    """A grey image and its RGB copy have the same descriptor."""
    rows = describe(bench.grey, bench.extractor)
    copies = describe(np.repeat(bench.grey, 3, axis=3), bench.extractor)
    assert np.array_equal(rows, copies), "they differ"


def is_deterministic(bench: DescriptorBench) -> None:
    """The same images give the same descriptors, bit for bit, also when it is loaded again."""
    first = describe(bench.colour, bench.extractor)
    for extractor in (bench.extractor, bench.extractor, bench.fresh()):
        assert np.array_equal(first, describe(bench.colour, extractor)), "they differ"


def batches_do_not_matter(bench: DescriptorBench) -> None:
    """An image alone has the descriptor it has in a batch, within 1e-4."""
    rows = describe(bench.colour, bench.extractor)
    alone = np.concatenate([bench.extractor(image[None]) for image in bench.colour])
    moved = np.linalg.norm(rows.astype(np.float64) - alone, axis=1).max()
    assert moved <= TOLERANCE, f"it moves by {moved:.2g}"


DESCRIPTOR_CHECKS: tuple[Callable[[DescriptorBench], None], ...] = (
    describes_itself,
    gives_unit_vectors,
    tells_images_apart,
    grey_is_colour,
    is_deterministic,
    batches_do_not_matter,
)
