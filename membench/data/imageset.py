"""A data set on disk: memory-mapped images, labels and source indices, one set per split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from membench.errors import MembenchError
from membench.files import read_json
from membench.hashing import array_file_hash, content_hash
from membench.specs import SPLITS, DataCard, Split

MANIFEST = "manifest.json"
ARRAYS = ("images", "labels", "index")


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    images: uint8 [N, H, W, C], memory-mapped; labels: int16 [N], -1 where there are none; index:
    int32 [N], the row of each image in its source. The order is random, so that any prefix is a
    random sample.
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """A card, complete with what the manifest of a prepared data set says, and its splits."""

    card: DataCard
    members: ImageSet
    auxiliary: ImageSet
    heldout: ImageSet

    @property
    def heldout_twin(self) -> ImageSet:
        """The held-out reference: the first images of `heldout`, as many as there are members.

        All of them where there are fewer; then `members_twin` is what it may be compared with.
        """
        return _rows(self.heldout, slice(0, len(self.members)))

    @property
    def members_twin(self) -> ImageSet:
        """The members that stand against the twin: the first ones, as many as the twin has.

        All members, unless the held-out part is smaller. False matches grow with the reference and
        nL2's denominator depends on it too, so only references of one size can be compared.
        """
        return _rows(self.members, slice(0, len(self.heldout_twin)))

    @property
    def twin_is_smaller(self) -> bool:
        """Whether there are fewer held-out images than members."""
        return len(self.heldout) < len(self.members)

    @property
    def heldout_rest(self) -> ImageSet:
        """The held-out images outside the twin; what `oracle:RATE` copies instead of members."""
        return _rows(self.heldout, slice(len(self.members), None))

    @property
    def unseen(self) -> ImageSet:
        """Held-out and auxiliary images, copied into memory: real images no target trains on.

        A larger null for a calibration that involves neither a target nor a classifier.
        """
        parts = (self.heldout, self.auxiliary)
        return ImageSet(*(np.concatenate([getattr(p, kind) for p in parts]) for kind in ARRAYS))


def _rows(images: ImageSet, rows: slice) -> ImageSet:
    return ImageSet(images.images[rows], images.labels[rows], images.index[rows])


def preparation_key(card: DataCard) -> str:
    """Hash of everything in a card that decides what `membench prepare` writes."""
    rule = None if card.preparation is None else card.preparation.identity()
    if rule is not None:
        rule.pop("downloads")  # where files come from does not change them
    return content_hash([card.name, card.revision, card.images.identity(), rule])


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MembenchError(f"{path}: missing; prepare or reinstall the data set") from None
    except (ValueError, OSError, EOFError) as error:
        raise MembenchError(f"{path}: truncated or not an array file ({error})") from None


def _load_split(folder: Path, name: str, split: Split, shape: tuple[int, int, int]) -> ImageSet:
    arrays = {}
    for kind in ARRAYS:
        path = folder / f"{name}.{kind}.npy"
        array = arrays[kind] = _load_array(path)
        expected = (split.count, *shape) if kind == "images" else (split.count,)
        if array.shape != expected:
            raise MembenchError(f"{path}: shape {array.shape}, the card says {expected}")
        if array_file_hash(path) != getattr(split, f"{kind}_sha256"):
            raise MembenchError(f"{path}: content differs from the card's {kind}_sha256")
    return ImageSet(**arrays)


def load_dataset(card: DataCard, folder: Path) -> Dataset:
    """Open the prepared arrays of a card; every array is checked against the card's hashes.

    What the card of a data set that the user prepares leaves open comes from the folder's manifest;
    `Dataset.card` is the card with all of it filled in. Raises `MembenchError` naming the file
    when one is missing, truncated or different, and telling how to prepare the data set if it is
    not there.
    """
    if card.preparation is not None:
        card = complete(card, folder)
    shape = (card.images.height, card.images.width, card.images.channels)
    splits = {name: _load_split(folder, name, getattr(card.splits, name), shape) for name in SPLITS}
    if card.preparation is None and len(splits["heldout"]) < len(splits["members"]):
        raise MembenchError(
            f"{folder}: {len(splits['heldout'])} held-out images, expected at least the "
            f"{len(splits['members'])} of the members"
        )
    return Dataset(card, **splits)


def complete(card: DataCard, folder: Path) -> DataCard:
    """A card with the counts, hashes and class names of its prepared folder."""
    path = folder / MANIFEST
    if not path.is_file():
        from membench.data.layouts import how_to_get

        raise MembenchError(
            f"{card.name} is not prepared yet (no {path}): {how_to_get(card)}, then run: "
            f"membench prepare {card.name} --source FOLDER --data {folder.parent}"
        )
    manifest = read_json(path)
    again = f"run again: membench prepare {card.name} --source FOLDER --data {folder.parent}"
    try:
        if manifest["name"] != card.name or manifest["revision"] != card.revision:
            raise MembenchError(
                f"{path}: prepared for revision {manifest['revision']} of {manifest['name']}, the "
                f"card is revision {card.revision} of {card.name}; {again}"
            )
        if manifest["preparation_sha256"] != preparation_key(card):
            raise MembenchError(f"{path}: prepared by another rule than the card's; {again}")
        splits = {name: _completed(path, card, name, manifest["splits"][name]) for name in SPLITS}
        classes = tuple(str(name) for name in manifest["classes"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MembenchError(f"{path}: not a manifest of membench ({error!r}); {again}") from None
    return card.model_copy(
        update={
            "splits": card.splits.model_copy(update=splits),
            "images": card.images.model_copy(update={"classes": card.images.classes or classes}),
        }
    )


def _completed(path: Path, card: DataCard, name: str, found: dict[str, Any]) -> Split:
    said = getattr(card.splits, name)
    prepared = Split.model_validate(found)
    for field, value in said:
        if value is not None and value != getattr(prepared, field):
            raise MembenchError(
                f"{path}: splits.{name}.{field}: {getattr(prepared, field)}, the card says {value}"
            )
    missing = [field for field, value in prepared if value is None]
    if missing:
        raise ValueError(f"splits.{name} lacks {missing[0]}")
    return prepared
