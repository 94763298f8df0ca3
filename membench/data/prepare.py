"""`membench prepare`: from the official files to memory-mapped arrays, whole or not at all.

    source -> listing -> draw of the splits -> pixels, on all cores -> hashes -> manifest

Everything is written into a hidden folder beside the final one and renamed at the very end. A
journal there names the batches whose pixels are on disk: after a kill the same command goes on
where it was, and starts anew when source or card have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from membench.console import Stages
from membench.data.imageset import ARRAYS, MANIFEST, preparation_key
from membench.data.layouts import open_source
from membench.data.pool import Work, create_array, decode_all, existing_array, rule_of
from membench.data.reader import Item, Reader
from membench.data.splits import draw_splits
from membench.errors import MembenchError
from membench.files import locked, write_array, write_json, writing
from membench.hashing import array_file_hash, array_hash, content_hash
from membench.specs import SPLITS, DataCard

FORMAT = 1
"""Of the manifest."""
NAMES, JOURNAL = "names.txt", "journal.txt"
SYNC_SECONDS = 5.0
"""A killed run loses at most so much work."""


@dataclass(frozen=True)
class Listing:
    """A source without its pixels. labels: [N], numbers in `classes`, -1 without one."""

    count: int
    names_sha256: str
    labels: np.ndarray
    classes: tuple[str, ...]
    parts: np.ndarray
    part_names: tuple[str, ...]
    persons: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """What a preparation did: its folder, and how fast."""

    folder: Path
    images: int
    decoded: int
    seconds: float
    manifest: dict[str, Any]


class _Numbers:
    """Gives every new name the next number."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def __call__(self, name: str | None) -> int:
        return -1 if name is None else self.of.setdefault(name, len(self.of))


def prepare(
    card: DataCard,
    card_folder: Path,
    source: Path,
    data: Path,
    progress: Stages,
    *,
    workers: int | None = None,
) -> Prepared:
    """Prepare a data set in DATA/NAME and return what was done.

    card_folder: what lies beside the card. Raises `MembenchError` naming the file at fault; then
    DATA/NAME is what it was before.
    """
    rule = card.preparation
    if rule is None:
        raise MembenchError(f"{card.name} comes with membench: there is nothing to prepare")
    final, partial = data / card.name, data / f".{card.name}.partial"
    with writing(data, "--data"), locked(data / f".{card.name}.lock"):
        files = check_downloads(card, source, progress)
        reader = open_source(card, source, card_folder)
        partial.mkdir(exist_ok=True)
        listing = _list(reader, partial / NAMES, card, progress)
        index = draw_splits(rule.draw, listing.parts, listing.part_names, listing.persons)
        _check_draw(card, reader, listing, index)
        key = content_hash(
            [preparation_key(card), FORMAT, listing.names_sha256, files, _fingerprint(source)]
            + [array_hash(rows) for rows in index.values()]
        )
        started, decoded = time.monotonic(), 0
        decoded = _pixels(card, reader, partial, key, index, progress, workers)
        seconds = time.monotonic() - started
        manifest = _finish(card, partial, listing, index, files)
        _install(partial, final)
    return Prepared(final, listing.count, decoded, seconds, manifest)


def check_downloads(card: DataCard, source: Path, progress: Stages) -> list[dict[str, Any]]:
    """Files of the card's downloads that are there: name, bytes, SHA-256; each as published.

    Only a file with the official name is held to the official checksum: the same images may come
    unpacked, or in another archive.
    """
    assert card.preparation is not None
    found = []
    for download in card.preparation.downloads:
        places = (
            [source] if source.is_file() else [source, *(p for p in source.glob("*") if p.is_dir())]
        )
        paths = [p if p.is_file() else p / download.file for p in places]
        path = next((p for p in paths if p.name == download.file and p.is_file()), None)
        if path is None:
            continue
        size = path.stat().st_size
        hashes = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
        with (
            progress(f"checksum of {path.name}", size, "bytes") as advance,
            open(path, "rb") as stream,
        ):
            while block := stream.read(1 << 20):
                for digest in hashes.values():
                    digest.update(block)
                advance(len(block))
        for kind, digest in hashes.items():
            expected = getattr(download, kind)
            if expected is not None and digest.hexdigest() != expected:
                raise MembenchError(
                    f"{path}: its {kind.upper()} is {digest.hexdigest()}, the published file's is "
                    f"{expected}; truncated or another file: fetch it again from {download.url}"
                )
        found.append({"file": path.name, "bytes": size, "sha256": hashes["sha256"].hexdigest()})
    return found


def _list(reader: Reader, names: Path, card: DataCard, progress: Stages) -> Listing:
    """One pass over the source: names to a file, numbers to arrays; no pixel is touched."""
    rule = card.preparation
    assert rule is not None
    folders = rule.folders or card.images.classes
    digest, count = hashlib.sha256(), 0
    label_of, part_of, person_of = _Numbers(), _Numbers(), _Numbers()
    labels, parts, persons = (_Column(np.int32) for _ in range(3))
    with (
        progress(f"list {card.name}", rule.count or 0, "images") as advance,
        open(names, "w", encoding="utf-8") as stream,
    ):
        for item in reader.items():
            line = f"{item.name}\t{item.part}\t{item.label or ''}\n"
            stream.write(line)
            digest.update(line.encode())
            labels.append(label_of(_label(item, rule.labels, folders, reader)))
            parts.append(part_of(item.part))
            persons.append(person_of(item.person))
            count += 1
            if not count % 1000:
                advance(1000)
        advance(count % 1000)
    if not count:
        raise MembenchError(f"{reader.source}: no images of {card.name} in it")
    if rule.count is not None and count != rule.count:
        raise MembenchError(
            f"{reader.source}: {count:,} images, the card says {rule.count:,}: not the whole data "
            "set, or another one"
        )
    classes = list(folders) or sorted(label_of.of, key=_natural)
    number = {label_of.of[name]: i for i, name in enumerate(classes) if name in label_of.of} | {
        -1: -1
    }
    people = sorted(person_of.of, key=_natural)
    person_number = {person_of.of[name]: i for i, name in enumerate(people)} | {-1: -1}
    if rule.draw.unit == "person" and not people:
        raise MembenchError(
            f"{reader.source}: the card deals out persons, but none are named in it"
        )
    return Listing(
        count,
        digest.hexdigest(),
        _renumber(labels.array(), number),
        tuple(card.images.classes or classes),
        parts.array(),
        tuple(part_of.of),
        _renumber(persons.array(), person_number),
    )


class _Column:
    """A growing array of numbers."""

    def __init__(self, dtype: type[np.integer]):
        self.blocks: list[np.ndarray] = []
        self.block = np.empty(1 << 16, dtype)
        self.filled = 0

    def append(self, value: int) -> None:
        if self.filled == len(self.block):
            self.blocks.append(self.block.copy())
            self.filled = 0
        self.block[self.filled] = value
        self.filled += 1

    def array(self) -> np.ndarray:
        return np.concatenate([*self.blocks, self.block[: self.filled]])


def _label(item: Item, kind: str, classes: tuple[str, ...], reader: Reader) -> str | None:
    if kind == "none":
        return None
    if item.label is None:
        raise MembenchError(f"{reader.source}: {item.name}: image without label")
    if kind == "class" and classes and item.label not in classes:
        raise MembenchError(
            f"{reader.source}: {item.name}: class {item.label!r} is none of the card's: "
            f"{', '.join(classes[:12])}"
        )
    return item.label


def _natural(name: str) -> tuple[int, str]:
    """Numbers by value, other names after them."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def _renumber(values: np.ndarray, number: dict[int, int]) -> np.ndarray:
    table = np.full(max(number) + 2, -1, np.int32)
    for old, new in number.items():
        table[old] = new
    return table[values]


def _check_draw(
    card: DataCard, reader: Reader, listing: Listing, index: dict[str, np.ndarray]
) -> None:
    if len(listing.classes) > np.iinfo(np.int16).max:
        raise MembenchError(f"{reader.source}: {len(listing.classes):,} labels, at most 32,767")
    for split, rows in index.items():
        expected = getattr(card.splits, split)
        if expected.count is not None and len(rows) != expected.count:
            raise MembenchError(
                f"{reader.source}: {split}: {len(rows)} images, the card says {expected.count}"
            )
        if expected.index_sha256 is not None and array_hash(rows) != expected.index_sha256:
            raise MembenchError(
                f"{reader.source}: {split}: the drawn list of images differs from the card's "
                "index_sha256: the source has other parts or persons than the card's"
            )


def _fingerprint(source: Path) -> list[Any]:
    status = source.stat()
    return [str(source.resolve()), status.st_mtime_ns, status.st_size if source.is_file() else 0]


def _pixels(
    card: DataCard,
    reader: Reader,
    partial: Path,
    key: str,
    index: dict[str, np.ndarray],
    progress: Stages,
    workers: int | None,
) -> int:
    """Fill the images' arrays, from where an interrupted run with the same key left them."""
    assert card.preparation is not None
    journal = partial / JOURNAL
    paths = {split: partial / f"{split}.images.npy" for split in SPLITS}
    done = _read_journal(journal, key)
    shape = (card.images.height, card.images.width, card.images.channels)
    if done is None or not all(path.is_file() for path in paths.values()):
        done = {}
        journal.unlink(missing_ok=True)
        _check_space(partial, sum(len(rows) for rows in index.values()) * int(np.prod(shape)))
        targets = tuple(create_array(paths[s], (len(index[s]), *shape)) for s in SPLITS)
        journal.write_text(key + "\n")
    else:
        targets = tuple(existing_array(paths[split]) for split in SPLITS)
    total = sum(len(rows) for rows in index.values())
    with (
        progress(f"prepare {card.name}", total, "images") as advance,
        _Journal(journal, [target.path for target in targets]) as log,
    ):
        advance(sum(done.values()))

        def finished(number: int, count: int) -> None:
            log.add(number, count)
            advance(count)

        decode_all(
            _work(reader, index),
            targets,
            rule_of(card.images, card.preparation.resize),
            total=total,
            workers=workers,
            skip=frozenset(done),
            finished=finished,
        )
    return total - sum(done.values())


def _work(reader: Reader, index: dict[str, np.ndarray]) -> Iterator[Work]:
    """Every drawn image with its place, in the order in which the source is read."""
    rows = 1 + max(int(chosen.max()) for chosen in index.values())
    split_of, position_of = np.full(rows, -1, np.int8), np.zeros(rows, np.int32)
    for number, split in enumerate(SPLITS):
        split_of[index[split]] = number
        position_of[index[split]] = np.arange(len(index[split]))
    found = 0
    for row, name, payload in reader.payloads():
        if row < rows and split_of[row] >= 0:
            found += 1
            yield int(split_of[row]), int(position_of[row]), name, payload
    expected = int((split_of >= 0).sum())
    if found != expected:
        raise MembenchError(
            f"{reader.source}: {expected - found} images vanished while it was being read"
        )


class _Journal:
    """Names batches as done once their pixels are flushed to disk."""

    def __init__(self, path: Path, arrays: list[str]):
        self.path, self.arrays = path, arrays
        self.pending: list[tuple[int, int]] = []
        self.last = time.monotonic()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()

    def add(self, number: int, count: int) -> None:
        self.pending.append((number, count))
        if time.monotonic() - self.last > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        for array in self.arrays:
            with open(array, "rb") as stream:
                os.fsync(stream.fileno())
        with open(self.path, "a") as stream:
            stream.writelines(f"{number} {count}\n" for number, count in self.pending)
            stream.flush()
            os.fsync(stream.fileno())
        self.pending.clear()
        self.last = time.monotonic()


def _read_journal(path: Path, key: str) -> dict[int, int] | None:
    """Batches that are on disk and their sizes; None: nothing there that fits."""
    try:
        head, *lines = path.read_text().split("\n")
    except OSError:
        return None
    if head != key:
        return None
    whole = lines[:-1]  # what follows the last newline was cut off
    return {int(number): int(count) for number, _, count in (line.partition(" ") for line in whole)}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MembenchError(
            f"{folder.parent}: needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
            "make room or choose another folder with --data"
        )


def _finish(
    card: DataCard,
    partial: Path,
    listing: Listing,
    index: dict[str, np.ndarray],
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """Labels, indices, hashes, and last of all the manifest."""
    splits: dict[str, Any] = {}
    for split, rows in index.items():
        write_array(partial / f"{split}.labels.npy", listing.labels[rows].astype(np.int16))
        write_array(partial / f"{split}.index.npy", rows)
        splits[split] = {"count": len(rows)}
        for kind in ARRAYS:
            path = partial / f"{split}.{kind}.npy"
            splits[split][f"{kind}_sha256"] = array_file_hash(path)
    people = {split: set(listing.persons[rows].tolist()) - {-1} for split, rows in index.items()}
    manifest = {
        "format": FORMAT,
        "name": card.name,
        "revision": card.revision,
        "preparation_sha256": preparation_key(card),
        "source": {"images": listing.count, "names_sha256": listing.names_sha256, "files": files},
        "splits": splits,
        "classes": list(listing.classes),
        "persons": {split: len(found) for split, found in people.items()},
        "persons_shared_with_members": {
            split: len(people[split] & people["members"]) for split in ("auxiliary", "heldout")
        },
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }
    write_json(partial / MANIFEST, manifest)
    return json.loads(json.dumps(manifest))


def _install(partial: Path, final: Path) -> None:
    """Put the finished folder in its place; the one before goes only then."""
    (partial / JOURNAL).unlink()
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
