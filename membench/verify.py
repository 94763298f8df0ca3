"""Recompute every number of a record from its saved matches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from membench.errors import MembenchError
from membench.files import read_json
from membench.hashing import file_hash
from membench.matching import FACTS, Facts
from membench.metrics import METRIC_VERSIONS
from membench.record import NULL, RECORD, read_record
from membench.scoring import calibrate_from, incidence, null_facts, per_image, score_all
from membench.similarity.matches import Matches
from membench.specs import Similarity, explain
from membench.submission import SUBMISSION, read_submission


def verify_any(path: Path) -> dict[str, Any]:
    """Check a record of any kind (its JSON file or its folder) and return it.

    Runs and scored images by `verify`, calibrations and divergences by their own modules. Raises
    `MembenchError` naming the first thing that differs, or what a folder lacks.
    """
    from membench import calibrating, diverge

    kinds = {
        RECORD: verify,
        calibrating.RECORD: calibrating.verify_calibration,
        diverge.RECORD: diverge.verify_divergence,
    }
    if path.is_dir():
        names = [name for name in kinds if (path / name).is_file()]
        if not names:
            raise MembenchError(f"{path}: no {' or '.join(kinds)} in it")
        path = path / names[0]
    kind = read_json(path).get("kind") if path.is_file() else None
    by_kind = {
        "calibration": calibrating.verify_calibration,
        "divergence": diverge.verify_divergence,
    }
    return by_kind.get(str(kind), verify)(path)


def verify(path: Path) -> dict[str, Any]:
    """Check the record of a run (its JSON file or its folder) and return it.

    The id must be the hash of the identity, every file must have its hash (a submission may lack
    its images), and calibration and scores, computed again from the matches, must be equal to the
    last bit. Raises `MembenchError` naming the first thing that differs.
    """
    path = path / RECORD if path.is_dir() else path
    absent: Collection[str] = ()
    if (path.parent / SUBMISSION).is_file():
        absent = read_submission(path.parent).absent
    record = read_record(path)
    try:
        _verify(path, record, absent)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MembenchError(f"{path}: not a whole record ({error!r})") from None
    return record


def check_files(path: Path, record: dict[str, Any], absent: Collection[str] = ()) -> None:
    """Whether every file that a record names lies beside it, unchanged; `absent` may be missing."""
    folder = path.parent
    for name, expected in record["files"].items():
        file = folder / name
        if "/" in name or name.startswith("."):
            raise MembenchError(f"{path}: files: {name!r} is not a plain file name")
        if not file.is_file() and name in absent:
            continue
        if not file.is_file():
            raise MembenchError(f"{file}: missing; {path.name} names it, keep them in one folder")
        if file_hash(file) != expected:
            raise MembenchError(f"{file}: truncated or changed: its SHA-256 is not the record's")


def _verify(path: Path, record: dict[str, Any], absent: Collection[str]) -> None:
    versions = record["identity"]["metrics"]
    if versions != dict(METRIC_VERSIONS):
        raise MembenchError(
            f"{path}: made with metric versions {versions}, this membench has "
            f"{dict(METRIC_VERSIONS)}; use the membench that made it, or run again"
        )
    folder = path.parent
    check_files(path, record, absent)
    identity = record["identity"]
    try:
        similarity = Similarity.model_validate(identity["similarity"])
    except ValidationError as error:
        raise MembenchError(f"{path}: identity.similarity.{explain(error)}") from None

    scales = [float(scale) for scale in identity["guidance_scales"]]
    matches = {
        scale: Matches.load(_named(folder / f"matches-{scale:g}.npz", record)) for scale in scales
    }
    for scale, found in matches.items():
        count = identity["images_per_scale"]
        if len(found) != count:
            raise MembenchError(f"{folder}: matches-{scale:g}.npz: not {count} images")
    null = Matches.load(_named(folder / NULL, record))
    keep = Facts.load(_named(folder / FACTS, record)).null_rows(similarity)
    if len(keep) != len(null):
        raise MembenchError(f"{folder / FACTS}: {len(keep)} held-out images, not {len(null)}")
    calibration = calibrate_from(null, keep, similarity)
    compare(path, "calibration", record["calibration"], calibration.to_dict())
    compare(path, "null", record["null"], null_facts(null, keep, similarity))
    compare(path, "scores", record["scores"], score_all(matches, calibration, similarity))
    compare(path, "per_image", record["per_image"], per_image(matches, calibration, similarity))
    if "incidence" in record:  # records of before UMS could be rarefied have none
        compare(path, "incidence", record["incidence"], incidence(matches, calibration, similarity))


def _named(path: Path, record: dict[str, Any]) -> Path:
    """A file whose hash, which was checked, stands in the record."""
    if path.name not in record["files"]:
        raise MembenchError(f"{path.name}: the record does not name this file's hash")
    return path


def compare(path: Path, where: str, saved: Any, computed: Any) -> None:
    """Raises `MembenchError` naming the first leaf in which two JSON values differ."""
    for field, old, new in differences(where, saved, computed):
        raise MembenchError(f"{path}: {field} is {old!r}, recomputed {new!r}")


def differences(where: str, saved: Any, computed: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every leaf in which two JSON values differ: (path, saved, computed)."""
    if isinstance(saved, dict) and isinstance(computed, dict):
        for key in sorted(saved.keys() | computed.keys()):
            absent = "nothing"
            yield from differences(
                f"{where}.{key}", saved.get(key, absent), computed.get(key, absent)
            )
    elif isinstance(saved, list) and isinstance(computed, list | tuple):
        if len(saved) != len(computed):
            yield f"{where}: length", len(saved), len(computed)
        for i, (old, new) in enumerate(zip(saved, computed, strict=False)):
            yield from differences(f"{where}[{i}]", old, new)
    elif type(saved) is not type(computed) or saved != computed:
        yield where, saved, computed
