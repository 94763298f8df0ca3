"""Readers of the official layouts: which images there are, what they are of, where they lie.

A reader lists its images in a fixed order, row by row, without decoding any, and then streams
their payloads. Every complaint names the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from membench.data import arrays
from membench.data.celeba import CelebA
from membench.data.containers import (
    IMAGES,
    TARS,
    ZIPS,
    Container,
    is_image,
    open_container,
    read_file,
    split_name,
)
from membench.data.decode import Payload
from membench.data.reader import Item, Reader
from membench.errors import MembenchError
from membench.specs import DataCard, Preparation

PARTS = ("train", "test", "val", "valid", "validation")
_CIFAR_RECORD = 1 + 3 * 32 * 32


class Files(Reader):
    """Image files of a container; subclasses say what a name tells."""

    def __init__(self, container: Container):
        self.container = container
        self.source = container.path

    def item(self, name: str) -> Item | None:
        """What the name tells; None: not an image of this data set."""
        return Item(name) if is_image(name) else None

    def items(self) -> Iterator[Item]:
        previous: Item | None = None
        for name, _ in self.container.files():
            item = self.item(name)
            if item is None:
                continue
            if previous is not None and _id(item.name) == _id(previous.name):
                raise MembenchError(
                    f"{self.source}: duplicate id: {previous.name!r} and {item.name!r}"
                )
            previous = item
            yield item

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        rows: dict[str, int] | None = None
        row = 0
        for name, payload in self.container.stream():
            if self.item(name) is None:
                continue
            if isinstance(payload, bytes):  # a packed archive comes in its own order
                rows = rows or {item.name: i for i, item in enumerate(self.items())}
                row = rows[name]
            yield row, name, payload
            row += 1


def _id(name: str) -> tuple[list[str], str]:
    return split_name(name)[:2]


class ClassFolders(Files):
    """`[.../train|test|val/]CLASS/IMAGE`; the class is the image's folder.

    folders: those to read, in the order of their labels; () means all. persons: each class is one.
    """

    def __init__(
        self, container: Container, folders: tuple[str, ...] = (), *, persons: bool = False
    ):
        super().__init__(container)
        self.folders = set(folders)
        self.persons = persons

    def item(self, name: str) -> Item | None:
        folders, _, suffix = split_name(name)
        if suffix.lower() not in IMAGES:
            return None
        folder = folders[-1] if folders else ""
        if not folder or folder in PARTS:
            raise MembenchError(
                f"{self.source}: {name}: image without label: it is in no class folder"
            )
        if self.folders and folder not in self.folders:
            return None
        part = next((folder for folder in reversed(folders) if folder in PARTS), "all")
        return Item(name, part, folder, folder if self.persons else None)


class ByName(Files):
    """Rows in the order of the files' own names, in whatever folders they lie."""

    def items(self) -> Iterator[Item]:
        found = sorted(super().items(), key=lambda item: PurePosixPath(item.name).stem)
        for one, other in pairwise(found):
            if PurePosixPath(one.name).stem == PurePosixPath(other.name).stem:
                raise MembenchError(f"{self.source}: duplicate id: {one.name!r} and {other.name!r}")
        yield from found

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        rows = {item.name: row for row, item in enumerate(self.items())}
        for _, name, payload in super().payloads():
            yield rows[name], name, payload


SOLUTION = "LOC_val_solution.csv"


class ImageNet(ByName, ClassFolders):
    """ILSVRC 2012 or Imagenette, unpacked; the file's name says if it was for training.

    `ILSVRC2012_val_*.JPEG` are of the part `val` in whatever folder they lie: Imagenette moves
    images between its `train` and `val`. Validation images in one flat folder get their class from
    `LOC_val_solution.csv`.
    """

    @cached_property
    def solution(self) -> dict[str, str]:
        """Name of a flat validation image -> class, of the list beside the images or in the archive
        (Kaggle's zip has it at the top)."""
        beside = self.source.parent / SOLUTION
        names = [name for name, _ in self.container.files() if PurePosixPath(name).name == SOLUTION]
        if names:
            text = read_file(self.container, min(names, key=len)).decode("utf-8")
        elif beside.is_file():
            text = beside.read_text(encoding="utf-8")
        else:
            return {}
        lines = text.splitlines()[1:]
        pairs = (line.replace(",", " ").split() for line in lines if line.strip())
        return {pair[0]: pair[1] for pair in pairs if len(pair) > 1}

    def item(self, name: str) -> Item | None:
        path = PurePosixPath(name)
        validation = path.name.startswith("ILSVRC2012_val_")
        if validation and is_image(name) and path.parent.name in ("", *PARTS):
            label = self.solution.get(path.stem)
            if label is None:
                raise MembenchError(
                    f"{self.source}: {name}: image without label: put it into its class folder, or "
                    f"{SOLUTION} into or beside the source"
                )
            if self.folders and label not in self.folders:
                return None
        else:
            if path.parent.name in ("", *PARTS):
                return None
            found = super().item(name)
            if found is None or found.label is None:
                return None
            label = found.label
        return Item(name, part="val" if validation else "train", label=label)


class LFW(ByName):
    """Labeled Faces in the Wild: `PERSON_0001.jpg`, flat or in a folder per person.

    only: the images to use, by name without suffix; others are passed over.
    """

    def __init__(self, container: Container, only: frozenset[str] | None = None):
        super().__init__(container)
        self.only = only

    def item(self, name: str) -> Item | None:
        if not is_image(name):
            return None
        path = PurePosixPath(name)
        if self.only is not None and path.stem not in self.only:
            return None
        found = re.fullmatch(r"(.+)_\d{4}", path.stem)
        if found is None:
            raise MembenchError(
                f"{self.source}: {name}: image without label: expected PERSON_0001.jpg"
            )
        return Item(name, label=found[1], person=found[1])

    def items(self) -> Iterator[Item]:
        found = list(super().items())
        missing = set(self.only or ()) - {PurePosixPath(item.name).stem for item in found}
        if missing:
            raise MembenchError(
                f"{self.source}: {min(missing)}.jpg is missing"
                + (f", and {len(missing) - 1} more of the card's list" if len(missing) > 1 else "")
            )
        yield from found


@dataclass
class Cifar10(Reader):
    """`cifar-10-binary.tar.gz`, packed or not: records of a label byte and 3 x 32 x 32 bytes."""

    container: Container
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        self.source = self.container.path

    def items(self) -> Iterator[Item]:
        for file, records in self._files():
            part = "test" if "test" in file else "train"
            for i, label in enumerate(records[:, 0]):
                yield Item(f"{file}#{i}", part=part, label=self.classes[label])

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        row = 0
        for file, records in self._files():
            for i, record in enumerate(records):
                yield row, f"{file}#{i}", record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                row += 1

    def _files(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each .bin file as uint8 [N, 3073], one in memory; the test's first, as with folders."""
        there = [name for name, _ in self.container.files()]
        for wanted in ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))):
            name = next((name for name in there if PurePosixPath(name).name == wanted), None)
            if name is None:
                raise MembenchError(f"{self.source}: {wanted} is missing")
            content = read_file(self.container, name)
            if not content or len(content) % _CIFAR_RECORD:
                raise MembenchError(
                    f"{self.source}: {name}: truncated: {len(content):,} bytes are not whole "
                    f"records of {_CIFAR_RECORD}"
                )
            records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
            wrong = np.flatnonzero(records[:, 0] >= len(self.classes))
            if len(wrong):
                raise MembenchError(
                    f"{self.source}: {name}: record {wrong[0]} has label {records[wrong[0], 0]}, "
                    f"expected 0 to {len(self.classes) - 1}"
                )
            yield wanted, records


def open_source(card: DataCard, source: Path, folder: Path) -> Reader:
    """The reader of a card's layout over what the user downloaded.

    folder: what lies beside the card. source: a folder or an archive; a folder that holds one of
    the card's downloads, or a single archive and nothing else, stands for that archive.
    """
    rule = card.preparation
    assert rule is not None
    if not source.exists():
        raise MembenchError(f"{source}: missing; {how_to_get(card)}")
    if rule.layout == "celeba":
        return CelebA(source, rule)
    source = _archive_in(source, rule)
    if rule.layout == "images":
        array = arrays.open_arrays(source)
        if array is not None:
            return array
    container = open_container(source)
    if rule.layout == "cifar10":
        return _cifar10(container, card)
    if rule.layout == "imagenet":
        return ImageNet(container, rule.folders)
    if rule.layout == "lfw":
        return LFW(container, None if rule.only is None else _only(folder / rule.only))
    if rule.layout == "images" and rule.labels == "none":
        return Files(container)
    return ClassFolders(container, rule.folders, persons=rule.labels == "identity")


def _cifar10(container: Container, card: DataCard) -> Reader:
    names = {name.rpartition("/")[2] for name, _ in container.files()}
    if names & {"data_batch_1.bin", "test_batch.bin"}:
        return Cifar10(container, card.images.classes)
    if names & {"data_batch_1", "test_batch"}:
        raise MembenchError(
            f"{container.path}: the pickled CIFAR-10 is never read; download cifar-10-binary.tar.gz"
        )
    return ClassFolders(container, card.images.classes)


def _archive_in(source: Path, rule: Preparation) -> Path:
    if not source.is_dir():
        return source
    for download in rule.downloads:
        path = source / download.file
        if path.is_file() and path.name.lower().endswith(ZIPS + TARS):
            return path
    inside = [path for path in source.iterdir() if not path.name.startswith(".")]
    archives = [path for path in inside if path.name.lower().endswith(ZIPS + TARS)]
    return archives[0] if len(inside) == len(archives) == 1 else source


def _only(path: Path) -> frozenset[str]:
    """Names from a file of lines `PERSON,1 3 12`: the numbers of that person's images."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MembenchError(f"{path}: the card's list of images cannot be read ({error})") from None
    pairs: Iterable[tuple[str, str, str]] = (line.partition(",") for line in lines if line)
    return frozenset(
        f"{person}_{int(number):04d}" for person, _, numbers in pairs for number in numbers.split()
    )


def how_to_get(card: DataCard) -> str:
    """`download A and B from URL` for one line of advice."""
    assert card.preparation is not None
    files = card.preparation.downloads
    names = " and ".join(dict.fromkeys(download.file for download in files))
    return f"download {names} from {files[0].url}"
