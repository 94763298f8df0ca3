"""Files that are whole or not there: atomic writes, locks, one clear line for a full disk."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from membench.errors import DiskFull, MembenchError

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an advisory lock on `path`; waits for whoever holds it. Shared ones do not exclude each
    other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            what = path.stem.lstrip(".") if path.suffix else path.parent.name
            print(f"membench: waiting for another process to finish {what}", file=sys.stderr)
            fcntl.flock(stream, kind)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold an advisory lock on `path`, unless another process does: True if it is ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def writing(folder: Path, option: str = "--results") -> Iterator[None]:
    """Turn the operating system's refusals to write into one clear line; `option` names FOLDER."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error, option) from None
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN):
            raise
        raise _refused(Path(error.filename or folder), error, option) from None


def _refused(path: Path, error: OSError, option: str) -> MembenchError:
    if error.errno in _FULL:
        reason = "no space left on the disk; free some and run again, finished work is kept"
        return DiskFull(f"{path}: {reason}")
    reason = f"cannot be written ({error.strerror}); choose another folder with {option}"
    return MembenchError(f"{path}: {reason}")


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
        partial.unlink(missing_ok=True)  # left where both were links to one file
    except BaseException as error:
        full = shutil.disk_usage(path.parent).free < 1 << 20
        partial.unlink(missing_ok=True)
        if full and isinstance(error, Exception):  # torch and safetensors have errors of their own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON, indented by one; a list of plain values takes one line, however long it is."""
    text = _indented(value, "") + "\n"
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _indented(value: Any, margin: str) -> str:
    inner = margin + " "
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(str(k))}: {_indented(v, inner)}" for k, v in value.items())
        return "{\n" + inner + f",\n{inner}".join(items) + f"\n{margin}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        parts = (_indented(v, inner) for v in value)
        return "[\n" + inner + f",\n{inner}".join(parts) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)


def read_json(path: Path) -> Any:
    """A JSON file; `MembenchError` names it when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MembenchError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MembenchError(f"{path}: truncated or not JSON ({error})") from None
    except OSError as error:
        raise MembenchError(f"{path}: cannot be read ({error.strerror})") from None


def write_array(path: Path, array: np.ndarray) -> None:
    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:  # np.save would add .npy to the name
            np.save(stream, array, allow_pickle=False)

    replace_atomically(path, write)


def write_npz(path: Path, contents: Mapping[str, Any]) -> None:
    """Arrays as an .npz that np.load can read; the same content always gives the same bytes."""

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(contents):
                array = np.asarray(contents[name])
                array = array.astype(array.dtype.newbyteorder("<"), order="C")
                entry = io.BytesIO()
                np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)
                info = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
                info.create_system = 3
                archive.writestr(info, entry.getvalue())

    replace_atomically(path, write)


def link_or_copy(source: Path, destination: Path) -> None:
    """Give a finished file a second name; a copy where the file system has no hard links."""

    def write(partial: Path) -> None:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)

    replace_atomically(destination, write)


def write_joined(path: Path, parts: Iterable[Path], count: int) -> None:
    """Concatenate .npy files along the first axis into one of `count` rows, a part in memory."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            for i, part in enumerate(parts):
                array = np.load(part, allow_pickle=False)
                if i == 0:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    shape = (count, *array.shape[1:])
                    np.lib.format.write_array_header_1_0(stream, header | {"shape": shape})
                stream.write(np.ascontiguousarray(array).tobytes())

    replace_atomically(path, write)
