"""Images that another tool made: a folder, an archive or an array file, as one array."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np

from membench.data.arrays import open_arrays
from membench.data.containers import open_container
from membench.data.layouts import Files
from membench.data.pool import Work, create_array, decode_all, rule_of
from membench.data.reader import Reader
from membench.errors import MembenchError
from membench.files import writing
from membench.specs import Images, Resize


class Progress(Protocol):
    """A bar: `membench.console.Stages`."""

    def __call__(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


class Advance(Protocol):
    def __call__(self, count: int, /) -> object: ...


def _silent(title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    return nullcontext(lambda count: None)


def read_images(
    path: Path,
    shape: tuple[int, int, int],
    resize: Resize | None = None,
    *,
    progress: Progress = _silent,
    workers: int | None = None,
) -> np.ndarray:
    """Images of a folder, zip, tar, npz, npy or parquet, uint8 [N, H, W, C], memory-mapped.

    shape: (C, H, W), as of a card. Files of a folder or archive are sorted by folder and name.
    Without `resize` every image must have the shape already; with it, see `specs.Resize`. The array
    lies in an unnamed temporary file (TMPDIR says where) that goes when the array does, and is
    decoded on all cores in constant memory. Raises `MembenchError` naming the file that is missing,
    truncated, no image, or of the wrong size or mode.
    """
    reader = open_images(path)
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"shape {shape}: expected (C, H, W) with 1 or 3 channels")
    card = Images(height=height, width=width, channels=1 if channels == 1 else 3)
    total = sum(1 for _ in reader.items())
    if not total:
        raise MembenchError(f"{path}: no images in it")
    with writing(Path(tempfile.gettempdir()), "TMPDIR"), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        target = create_array(file, (total, height, width, channels))
        with progress(f"read {path.name}", total, "images") as advance:
            decode_all(
                _work(reader),
                (target,),
                rule_of(card, resize),
                total=total,
                workers=workers,
                finished=lambda number, count: _ignore(advance(count)),
            )
        return np.load(file, mmap_mode="r", allow_pickle=False)


def image_names(path: Path) -> list[str]:
    """Names of the images in the order of `read_images`."""
    return [item.name for item in open_images(path).items()]


def open_images(path: Path) -> Reader:
    """A reader of images without labels."""
    return open_arrays(path) or Files(open_container(path))


def _work(reader: Reader) -> Iterator[Work]:
    for row, name, payload in reader.payloads():
        yield 0, row, name, payload


def _ignore(value: object) -> None:
    """A bar may return anything."""
