"""Sources that are arrays already, or tables with image bytes: npy, npz, parquet."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from membench.data.decode import Payload
from membench.data.reader import Item, Reader
from membench.errors import MembenchError

_ROWS = 256
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img", "jpg", "png"), ("label", "labels", "class")


def open_arrays(source: Path) -> Reader | None:
    """A reader of a .npy, .npz or .parquet file, or of a folder of parquet; None: no such."""
    suffix = source.suffix.lower()
    if suffix == ".npy":
        return Npy(source)
    if suffix == ".npz":
        return Npz(source)
    files = [source] if suffix == ".parquet" else []
    if source.is_dir():
        files = sorted(source.rglob("*.parquet"))
    return Parquet(source, files) if files else None


class Npy(Reader):
    """Images uint8 [N, H, W] or [N, H, W, C] in one file, memory-mapped; no labels."""

    def __init__(self, source: Path):
        self.source = source

    def items(self) -> Iterator[Item]:
        for row in range(len(self._images())):
            yield Item(f"{self.source.name}#{row}")

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        for row, image in enumerate(self._images()):
            yield row, f"{self.source.name}#{row}", np.array(image)

    def _images(self) -> np.ndarray:
        try:
            images = np.load(self.source, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise MembenchError(f"{self.source}: missing") from None
        except (ValueError, OSError, EOFError) as error:
            raise MembenchError(
                f"{self.source}: truncated or not an array file ({error})"
            ) from None
        check(self.source, "", images.dtype, images.shape)
        return images


class Npz(Reader):
    """`images` (or the only array of four axes) and, if there are any, `labels`; streamed."""

    def __init__(self, source: Path):
        self.source = source
        with self._archive() as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            shapes = {name: self._header(archive, name) for name in names}
            self.labels = self._small(archive, names)
        images = [name for name in names if name == "images.npy"] or [
            name for name, (shape, _, _) in shapes.items() if len(shape) == 4
        ]
        if len(images) != 1:
            raise MembenchError(
                f"{source}: expected one array of images, named `images`; it holds "
                f"{', '.join(name.removesuffix('.npy') for name in names) or 'nothing'}"
            )
        self.name = images[0]
        self.shape, fortran, dtype = shapes[self.name]
        check(source, self.name.removesuffix(".npy"), dtype, self.shape)
        if fortran:
            raise MembenchError(f"{source}: {self.name}: in Fortran order; save it in C order")
        if self.labels is not None and len(self.labels) != self.shape[0]:
            raise MembenchError(
                f"{source}: {len(self.labels)} labels for {self.shape[0]} images, expected one each"
            )

    def items(self) -> Iterator[Item]:
        for row in range(self.shape[0]):
            label = None if self.labels is None else str(self.labels[row])
            yield Item(f"{self.source.name}#{row}", label=label)

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        size = int(np.prod(self.shape[1:]))
        with self._archive() as archive, archive.open(self.name) as stream:
            npy.read_magic(stream)
            (npy.read_array_header_1_0)(stream)
            for start in range(0, self.shape[0], _ROWS):
                rows = min(_ROWS, self.shape[0] - start)
                try:
                    content = stream.read(rows * size)
                except (zipfile.BadZipFile, OSError, EOFError) as error:
                    raise MembenchError(f"{self.source}: {self.name}: damaged ({error})") from None
                if len(content) != rows * size:
                    raise MembenchError(f"{self.source}: {self.name}: truncated")
                block = np.frombuffer(content, np.uint8).reshape(rows, *self.shape[1:])
                for i, image in enumerate(block):
                    yield start + i, f"{self.source.name}#{start + i}", image

    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.source)
        except FileNotFoundError:
            raise MembenchError(f"{self.source}: missing") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise MembenchError(f"{self.source}: truncated or not an npz file ({error})") from None

    def _header(self, archive: zipfile.ZipFile, name: str) -> tuple[Any, bool, np.dtype]:
        with archive.open(name) as stream:
            try:
                if npy.read_magic(stream) != (1, 0):
                    raise ValueError("an .npy version other than 1.0")
                return npy.read_array_header_1_0(stream)
            except ValueError as error:
                raise MembenchError(f"{self.source}: {name}: {error}") from None

    def _small(self, archive: zipfile.ZipFile, names: list[str]) -> np.ndarray | None:
        for column in _LABEL_COLUMNS:
            if f"{column}.npy" in names:
                with archive.open(f"{column}.npy") as stream:
                    try:
                        return npy.read_array(stream, allow_pickle=False)
                    except ValueError as error:
                        raise MembenchError(f"{self.source}: {column}: {error}") from None
        return None


def check(source: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Refuse what is not uint8 [N, H, W] or [N, H, W, C]."""
    where = f"{source}: {name}" if name else f"{source}"
    if dtype.hasobject:
        raise MembenchError(f"{where}: holds Python objects (a pickle), which are never read")
    if (
        dtype != np.uint8
        or len(shape) not in (3, 4)
        or (len(shape) == 4 and shape[3] not in (1, 3, 4))
    ):
        raise MembenchError(
            f"{where}: {dtype} {list(shape)}, expected uint8 [N, H, W, C] of 0 to 255"
        )


class Parquet(Reader):
    """Tables with image bytes, as on hubs: `image` (bytes, or a struct with them) and `label`."""

    def __init__(self, source: Path, files: list[Path]):
        self.source = source
        self.paths = files
        try:
            import pyarrow.parquet
        except ImportError:
            raise MembenchError(
                f"{source}: reading parquet needs pyarrow: pip install 'membench[parquet]'"
            ) from None
        self.pyarrow = pyarrow

    def items(self) -> Iterator[Item]:
        for file in self.paths:
            part = file.name.split("-")[0]
            table, column, label = self._open(file)
            row = 0
            for batch in table.iter_batches(_ROWS, columns=[label] if label else [column]):
                values = batch.column(0).to_pylist() if label else [None] * batch.num_rows
                for value in values:
                    if label and value is None:
                        raise MembenchError(f"{file}: row {row}: image without label")
                    yield Item(f"{file.name}#{row}", part, None if value is None else str(value))
                    row += 1

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        row = 0
        for file in self.paths:
            table, column, _ = self._open(file)
            i = 0
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(content, bytes):
                        raise MembenchError(f"{file}: row {i}: {column} holds no image bytes")
                    yield row, f"{file.name}#{i}", content
                    row, i = row + 1, i + 1

    def _open(self, file: Path) -> tuple[Any, str, str | None]:
        try:
            table = self.pyarrow.parquet.ParquetFile(file)
        except (self.pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise MembenchError(f"{file}: truncated or not parquet ({reason})") from None
        names = table.schema_arrow.names
        column = next((name for name in _IMAGE_COLUMNS if name in names), None)
        if column is None:
            raise MembenchError(
                f"{file}: no column {' or '.join(_IMAGE_COLUMNS)}; it has: {', '.join(names)}"
            )
        return table, column, next((name for name in _LABEL_COLUMNS if name in names), None)
