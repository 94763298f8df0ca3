"""Folders, zip and tar archives seen alike: safe names in a fixed order, and where bytes lie."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from membench.data.decode import Payload, Ref
from membench.errors import MembenchError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
ZIPS, TARS = (".zip",), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_ENTRY = 1 << 28
"""Bytes of one entry of an archive; more is taken for a decompression bomb."""
MAX_RATIO = 1000
"""No image is packed this well; what is, and would fill a megabyte, is taken for a bomb."""
_DEEPEST = 16


def split_name(name: str) -> tuple[list[str], str, str]:
    """Folders, stem and suffix (`.jpg`) of a name; far faster than pathlib on millions of them."""
    *folders, file = name.split("/")
    stem, dot, suffix = file.rpartition(".")
    return (folders, stem, dot + suffix) if stem else (folders, file, "")


def is_image(name: str) -> bool:
    return split_name(name)[2].lower() in IMAGES


order = split_name
"""Sort key: a folder's files before its folders, and two files of one stem together."""


class Container:
    """Files by name, in the order of `order`; names are relative and use `/`."""

    path: Path

    def files(self) -> Iterator[tuple[str, Ref | None]]:
        """Every file and where it lies; None where the archive can only be streamed."""
        raise NotImplementedError

    def stream(self) -> Iterator[tuple[str, Payload]]:
        """Every file with a reference or its bytes, in the order that is cheapest to read."""
        for name, ref in self.files():
            assert ref is not None
            yield name, ref


class Folder(Container):
    def __init__(self, path: Path):
        self.path = path

    def files(self) -> Iterator[tuple[str, Ref | None]]:
        yield from self._walk(self.path, "", 0)

    def _walk(self, folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, Ref | None]]:
        if depth > _DEEPEST:
            raise MembenchError(f"{folder}: more than {_DEEPEST} folders deep (a loop of links?)")
        try:
            with os.scandir(folder) as entries:
                here = [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".")]
        except OSError as error:
            raise MembenchError(f"{folder}: cannot be read ({error.strerror})") from None
        for name in sorted((name for name, is_dir in here if not is_dir), key=order):
            yield prefix + name, Ref(os.path.join(folder, name))  # noqa: PTH118 (millions of them)
        for name in sorted(name for name, is_dir in here if is_dir and name != "__MACOSX"):
            yield from self._walk(folder / name, f"{prefix}{name}/", depth + 1)


class Zip(Container):
    def __init__(self, path: Path):
        self.path = path
        self._files: list[tuple[str, Ref | None]] | None = None

    def files(self) -> Iterator[tuple[str, Ref | None]]:
        if self._files is None:
            self._files = list(self._read())
        yield from self._files

    def _read(self) -> Iterator[tuple[str, Ref | None]]:
        path = str(self.path)
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        for entry in entries:
            _check_name(self.path, entry.filename)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise MembenchError(f"{path}: {entry.filename!r} is a link; refused")
        previous = None
        for entry in sorted(entries, key=lambda entry: order(entry.filename)):
            name = entry.filename
            if _is_hidden(name):
                continue
            if name == previous:
                raise MembenchError(f"{path}: duplicate id: {name!r} is in the archive twice")
            previous = name
            if entry.flag_bits & 1:
                raise MembenchError(f"{path}: {name!r} is encrypted")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise MembenchError(f"{path}: {name!r}: compression {entry.compress_type} unknown")
            size, packed = entry.file_size, entry.compress_size
            if size > MAX_ENTRY or (size > 1 << 20 and size > MAX_RATIO * max(packed, 1)):
                raise MembenchError(
                    f"{path}: {name!r}: decompression bomb: {size:,} bytes out of {packed:,}"
                )
            where, method = entry.header_offset, entry.compress_type
            yield name, Ref(path, "zip", where, packed, size, method, entry.CRC)


class Tar(Container):
    """A tar archive; an uncompressed one is read in place, a compressed one is streamed twice."""

    def __init__(self, path: Path):
        self.path = path
        self.packed = path.suffix != ".tar"

    def files(self) -> Iterator[tuple[str, Ref | None]]:
        found: dict[str, Ref | None] = {}
        with (
            _readable(self.path),
            tarfile.open(self.path, "r|*" if self.packed else "r:") as archive,
        ):
            for entry in archive:
                name = self._name(entry)
                if name is None:
                    continue
                if name in found:
                    raise MembenchError(f"{self.path}: duplicate id: {name!r} is in it twice")
                place = Ref(str(self.path), "tar", entry.offset_data, entry.size, entry.size)
                found[name] = None if self.packed else place
        for name in sorted(found, key=order):
            yield name, found[name]

    def stream(self) -> Iterator[tuple[str, Payload]]:
        if not self.packed:
            yield from super().stream()
            return
        with _readable(self.path), tarfile.open(self.path, "r|*") as archive:
            for entry in archive:
                name = self._name(entry)
                content = None if name is None else archive.extractfile(entry)
                if name is not None and content is not None:
                    yield name, content.read()

    def _name(self, entry: tarfile.TarInfo) -> str | None:
        _check_name(self.path, entry.name)
        if entry.issym() or entry.islnk():
            raise MembenchError(f"{self.path}: {entry.name!r} is a link; refused")
        name = PurePosixPath(entry.name).as_posix()
        if not entry.isfile() or _is_hidden(name):
            return None
        if entry.size > MAX_ENTRY:
            raise MembenchError(
                f"{self.path}: {name!r}: decompression bomb: {entry.size:,} bytes announced"
            )
        return name


def _is_hidden(name: str) -> bool:
    return name[0] == "." or "/." in name or "__MACOSX" in name.split("/")


def _check_name(archive: Path, name: str) -> None:
    if (
        name.startswith(("/", "\\"))
        or (".." in name and ".." in name.replace("\\", "/").split("/"))
        or name[1:2] == ":"
        or not name
    ):
        raise MembenchError(f"{archive}: {name!r} escapes its folder; the archive is refused")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MembenchError(f"{path}: missing") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise MembenchError(f"{path}: truncated or not an archive ({error})") from None
    except OSError as error:  # gzip reports damage as OSError
        raise MembenchError(f"{path}: cannot be read ({error.strerror or error})") from None


def open_container(path: Path) -> Container:
    """A folder, zip or tar archive, by its kind and name; `MembenchError` if it is none."""
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise MembenchError(f"{path}: missing")
    name = path.name.lower()
    if name.endswith(ZIPS):
        return Zip(path)
    if name.endswith(TARS):
        return Tar(path)
    raise MembenchError(f"{path}: expected a folder, {', '.join(ZIPS + TARS)}")


def read_file(container: Container, name: str) -> bytes:
    """One file of a container, whole; for lists and records, not for images."""
    from membench.data.decode import read

    for found, payload in container.stream():
        if found == name:
            assert not hasattr(payload, "dtype")
            return read(name, payload) if isinstance(payload, Ref) else bytes(payload)
    raise MembenchError(f"{container.path}: {name} is missing")
