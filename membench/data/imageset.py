"""A data set on disk: memory-mapped images, labels and source indices, one set per split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from membench.errors import MembenchError
from membench.hashing import array_hash
from membench.specs import SPLITS, DataCard, Split


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    images: uint8 [N, H, W, C], memory-mapped; labels: int16 [N]; index: int32 [N], the row of each
    image in its source.
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """A card and its three disjoint splits."""

    card: DataCard
    members: ImageSet
    auxiliary: ImageSet
    heldout: ImageSet

    @property
    def heldout_twin(self) -> ImageSet:
        """The held-out reference: the first images of `heldout`, as many as there are members."""
        return _rows(self.heldout, slice(0, len(self.members)))

    @property
    def heldout_rest(self) -> ImageSet:
        """The held-out images outside the twin; what `oracle:RATE` copies instead of members."""
        return _rows(self.heldout, slice(len(self.members), None))


def _rows(images: ImageSet, rows: slice) -> ImageSet:
    return ImageSet(images.images[rows], images.labels[rows], images.index[rows])


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MembenchError(f"{path}: missing; prepare or reinstall the data set") from None
    except (ValueError, OSError, EOFError) as error:
        raise MembenchError(f"{path}: truncated or not an array file ({error})") from None


def _load_split(folder: Path, name: str, split: Split, shape: tuple[int, int, int]) -> ImageSet:
    arrays = {}
    for kind in ("images", "labels", "index"):
        path = folder / f"{name}.{kind}.npy"
        array = arrays[kind] = _load_array(path)
        expected = (split.count, *shape) if kind == "images" else (split.count,)
        if array.shape != expected:
            raise MembenchError(f"{path}: shape {array.shape}, the card says {expected}")
        if array_hash(array) != getattr(split, f"{kind}_sha256"):
            raise MembenchError(f"{path}: content differs from the card's {kind}_sha256")
    return ImageSet(**arrays)


def load_dataset(card: DataCard, folder: Path) -> Dataset:
    """Open the prepared arrays of a card; every array is checked against the card's hashes.

    Raises `MembenchError` naming the file when one is missing, truncated or different.
    """
    shape = (card.images.height, card.images.width, card.images.channels)
    splits = {name: _load_split(folder, name, getattr(card.splits, name), shape) for name in SPLITS}
    heldout, members = len(splits["heldout"]), len(splits["members"])
    if heldout < members:
        raise MembenchError(
            f"{folder}: {heldout} held-out images, expected at least the {members} of the members"
        )
    return Dataset(card, **splits)
