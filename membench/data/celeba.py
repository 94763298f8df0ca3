"""CelebA as published: aligned images and their lists of identities, attributes and partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from membench.data.containers import Container, Folder, Zip, is_image
from membench.data.decode import Payload
from membench.data.reader import Item, Reader
from membench.errors import MembenchError
from membench.specs import Preparation

IMAGES = "img_align_celeba"
PARTS = ("train", "val", "test")
"""Of `list_eval_partition.txt`: 0, 1, 2."""
_PLACES = ("", "Img", "Anno", "Eval", "celeba", "CelebA/Img", "CelebA/Anno", "CelebA/Eval")
T = TypeVar("T")


class CelebA(Reader):
    """`img_align_celeba.zip` or the folder, with the lists beside it or in `Anno` and `Eval`."""

    def __init__(self, source: Path, rule: Preparation):
        self.source = source if source.is_dir() else source.parent
        self.rule = rule
        self.container = self._images()
        identities = self._find("identity_CelebA.txt")
        partition = self._find("list_eval_partition.txt")
        self.persons = _read(identities, 0, lambda fields: str(int(fields[0])))
        self.parts = _read(partition, 0, lambda fields: PARTS[int(fields[0])])
        self.labels = self.persons
        self.label_list = identities
        if rule.attributes:
            self.label_list = self._find("list_attr_celeba.txt")
            self.labels = _attributes(self.label_list, rule.attributes)
        self.lists = (
            (identities, self.persons),
            (partition, self.parts),
            (self.label_list, self.labels),
        )

    def _images(self) -> Container:
        for place in _PLACES:
            folder = self.source / place
            if (folder / f"{IMAGES}.zip").is_file():
                return Zip(folder / f"{IMAGES}.zip")
            if (folder / IMAGES).is_dir():
                return Folder(folder / IMAGES)
        raise MembenchError(f"{self.source}: {IMAGES}.zip (or the folder {IMAGES}) is missing")

    def _find(self, name: str) -> Path:
        for place in _PLACES:
            if (self.source / place / name).is_file():
                return self.source / place / name
        raise MembenchError(f"{self.source}: {name} is missing")

    def items(self) -> Iterator[Item]:
        """In the order of the images' numbers; every list must know every image, and no other."""
        count = 0
        for name, _ in self._files():
            number = PurePosixPath(name).name
            for path, entries in self.lists:
                if number not in entries:
                    raise MembenchError(
                        f"{self.container.path}: {name}: image without label in {path}"
                    )
            count += 1
            yield Item(name, self.parts[number], self.labels[number], self.persons[number])
        for path, entries in self.lists:
            if len(entries) != count:
                there = {PurePosixPath(name).name for name, _ in self._files()}
                lost = min(entries.keys() - there)
                raise MembenchError(
                    f"{path}: label without image: {lost} is not in {self.container.path}"
                )

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        for row, (name, payload) in enumerate(self._files()):
            yield row, name, payload

    def _files(self) -> Iterator[tuple[str, Payload]]:
        previous = ""
        for name, payload in self.container.stream():
            if is_image(name):
                stem = PurePosixPath(name).stem
                if stem == previous:
                    raise MembenchError(
                        f"{self.container.path}: duplicate id: {stem} is there twice"
                    )
                previous = stem
                yield name, payload


def _read(path: Path, header: int, parse: Callable[[list[str]], T]) -> dict[str, T]:
    """`000001.jpg FIELD ...` line by line, after `header` lines."""
    found: dict[str, T] = {}
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                fields = line.split()
                if number <= header or not fields:
                    continue
                if fields[0] in found:
                    raise MembenchError(f"{path}:{number}: duplicate id: {fields[0]}")
                try:
                    found[fields[0]] = parse(fields[1:])
                except (ValueError, IndexError):
                    raise MembenchError(
                        f"{path}:{number}: not understood: {line.strip()!r}"
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MembenchError(f"{path}: cannot be read ({error})") from None
    return found


def _attributes(path: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    """Image -> `Male+ Smiling-`: what it has and has not, of the wanted attributes."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        stream.readline()
        names = stream.readline().split()
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise MembenchError(f"{path}: no attribute {unknown[0]!r} in its second line")
    columns = [names.index(name) for name in wanted]

    def parse(fields: list[str]) -> str:
        if len(fields) != len(names):
            raise ValueError
        signs = [{1: "+", -1: "-", 0: "-"}[int(fields[column])] for column in columns]
        return " ".join(name + sign for name, sign in zip(wanted, signs, strict=True))

    return _read(path, 2, parse)
