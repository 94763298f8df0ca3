"""A record on disk: the names of its files, how it is sealed, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from membench.errors import MembenchError
from membench.files import read_json
from membench.hashing import content_hash

SCHEMA, CALIBRATION_SCHEMA, DIVERGENCE_SCHEMA = 2, 1, 1
"""Versions of the layouts of a run's record, of a calibration's and of a divergence's."""
RECORD, SHEET, NULL = "record.json", "contact_sheet.png", "matches-heldout.npz"
PARTS = ("identity", "calibration", "null", "scores", "per_image", "attack", "files")
UNSEALED = ("results_sha256", "cost", "provenance")
"""What may differ between two computations of the same cell."""


def seal(record: Mapping[str, Any]) -> str:
    """`results_sha256`: the hash of everything in a record that must be the same every time."""
    return content_hash({key: value for key, value in record.items() if key not in UNSEALED})


def read_record(path: Path) -> dict[str, Any]:
    """A record whose frame is sound; a `MembenchError` names what is missing or was edited.

    The scores themselves are not recomputed: `membench.verify` does that.
    """
    record = read_json(path)
    if not isinstance(record, dict) or "schema" not in record:
        raise MembenchError(f"{path}: not a record of membench (no schema)")
    if record["schema"] != SCHEMA:
        raise MembenchError(
            f"{path}: schema {record['schema']!r}, this membench reads {SCHEMA}; run it again"
        )
    for part in ("id", "results_sha256", *PARTS):
        if part not in record:
            raise MembenchError(f"{path}: no {part!r}: not a whole record")
    for part in PARTS:
        if not isinstance(record[part], dict):
            raise MembenchError(f"{path}: {part} is not an object")
    if record["id"] != content_hash(record["identity"]):
        raise MembenchError(f"{path}: id is not the hash of identity: the record was edited")
    if record["results_sha256"] != seal(record):
        raise MembenchError(f"{path}: results_sha256 is not the hash of the results: edited")
    return record


def read_calibration(path: Path) -> dict[str, Any]:
    """A calibration record whose frame is sound; a `MembenchError` names what was edited."""
    return _read_other(path, "calibration", CALIBRATION_SCHEMA, "calibrate again")


def read_divergence(path: Path) -> dict[str, Any]:
    """A divergence record whose frame is sound; a `MembenchError` names what was edited."""
    return _read_other(path, "divergence", DIVERGENCE_SCHEMA, "run `membench diverge` again")


def _read_other(path: Path, kind: str, schema: int, again: str) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise MembenchError(f"{path}: not a {kind} of membench")
    if record.get("schema") != schema:
        raise MembenchError(
            f"{path}: schema {record.get('schema')!r}, this membench reads {schema}; {again}"
        )
    for part in ("id", "identity", "results", "files", "results_sha256", "provenance"):
        if part not in record:
            raise MembenchError(f"{path}: no {part!r}: not a whole {kind}")
    if record["id"] != content_hash(record["identity"]):
        raise MembenchError(f"{path}: id is not the hash of identity: the record was edited")
    if record["results_sha256"] != seal(record):
        raise MembenchError(f"{path}: results_sha256 is not the hash of the results: edited")
    return record
