"""Everything that can be checked of a record where it lies, and what cannot, said so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.data.imageset import load_dataset
from membench.errors import MembenchError
from membench.hashing import canonical_json, file_hash
from membench.limits import ELSEWHERE, departures
from membench.metrics.invariants import check_invariants
from membench.record import PARTS, RECORD, UNSEALED
from membench.registry import Registry
from membench.submission import IMAGES, SUBMISSION, Submission, read_submission, source_of
from membench.verify import compare, verify, verify_any

if TYPE_CHECKING:
    from membench.run import Cell


@dataclass
class Report:
    """What was found sound, in words, and what nobody checked: part of the record -> why."""

    record: Mapping[str, Any]
    checked: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    cell: Cell | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.record["id"],
            "checked": self.checked,
            "not_checked": self.not_checked,
        }


def check(path: Path, registry: Registry, results: Path) -> Report:
    """Check a record, a run's folder or a submission; a `MembenchError` names what is wrong.

    Recomputes every number from the saved matches, and compares the identity with what card,
    plugin and target give here, where they are here. results: where weights of trained targets lie.
    """
    path = path / RECORD if (path / RECORD).is_file() else path
    if path.name != RECORD or not path.is_file() or "kind" in _peek(path):
        record = verify_any(path)
        if "kind" in record:
            return Report(
                record,
                ["every number, recomputed from the saved values"],
                dict.fromkeys(("cost", "provenance"), "under no hash"),
            )
    submission = None
    if (path.parent / SUBMISSION).is_file():
        submission = read_submission(path.parent)
    record = verify(path)
    found = Report(record)
    if submission is not None:
        count = len(submission.files)
        found.checked.append(f"submission: layout, seal and the hashes of {count} files")
    found.checked += [
        "identity and results: their hashes",
        "calibration, null, scores, per-image hits and incidence: recomputed from the matches, "
        "equal to the last bit",
    ]
    for scores in (record["scores"]["average"], *record["scores"]["scales"].values()):
        check_invariants(scores)
    found.checked.append("invariants of every score")
    _check_images(path, record, found)
    _check_card(path, record, registry, found)
    _check_method(path, record, registry, submission, found)
    _check_identity(path, record, registry, results, found)
    known = (*PARTS, *UNSEALED, "schema", "id", "limited", "limited_by", "incidence")
    for part in record:
        if part not in known:
            found.not_checked[part] = "under the seal, but recomputed by nobody"
    found.not_checked["attack"] = (
        "reports of classifiers and guidance: under the seal, but recomputed by nobody"
    )
    where = "under no hash" if submission is None else "under no hash but the submission's"
    found.not_checked |= {"cost": where, "provenance": where}
    return found


def _peek(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_images(path: Path, record: Mapping[str, Any], found: Report) -> None:
    for name in record["files"]:
        if IMAGES.fullmatch(name):
            here = (path.parent / name).is_file()
            why = "that the target drew them" if here else "not here"
            found.not_checked[f"files.{name}"] = f"{why}: --rerun N draws some of them again"


def _check_card(path: Path, record: Mapping[str, Any], registry: Registry, found: Report) -> None:
    """Revision, splits and departures, against the card of that name."""
    identity = record["identity"]
    named = identity["dataset"]
    if named["name"] not in registry.datasets:
        found.not_checked["identity.dataset"] = f"there is no card {named['name']!r} here"
        found.not_checked["limited"] = "nothing to compare with, without the card"
        return
    card = registry.card(named["name"])
    if card.revision != named["revision"]:
        raise MembenchError(
            f"{path}: made on revision {named['revision']} of {card.name}, the card here is "
            f"revision {card.revision}; use the membench that has it, or run again"
        )
    try:
        card = load_dataset(card, registry.data_folder(card.name)).card
    except MembenchError as error:
        found.not_checked["identity.dataset.splits"] = f"the data set is not here ({error})"
    else:
        compare(path, "identity.dataset.splits", named["splits"], card.splits.identity())
        found.checked.append(f"card: revision {card.revision} and the hashes of its splits")
    if identity["target"].get("kind") == "images":
        expected = [ELSEWHERE]
    else:
        guided = record["attack"].get("surrogate") is not None
        expected = departures(identity, card, guided=guided)
    compare(path, "limited_by", record.get("limited_by"), expected)
    compare(path, "limited", record.get("limited"), bool(expected))
    found.checked.append("limits: whether it may enter a board")


def _check_method(
    path: Path,
    record: Mapping[str, Any],
    registry: Registry,
    submission: Submission | None,
    found: Report,
) -> None:
    named = record["identity"]["method"]
    ran = record["provenance"].get("method_source_sha256")
    if submission is not None:
        mine = submission.method
        for key, value in (("name", named["name"]), ("version", named["version"])):
            if getattr(mine, key) != value:
                raise MembenchError(f"{path.parent / SUBMISSION}: method.{key} is not the record's")
        if mine.source_sha256 != ran:
            raise MembenchError(f"{path.parent / SUBMISSION}: method.source_sha256: not what ran")
    if named["version"] == 0:  # images from elsewhere
        return
    try:
        method = registry.method(named["name"])
    except MembenchError:
        found.not_checked["identity.method"] = f"there is no method {named['name']!r} here"
        return
    if method.version != named["version"]:
        raise MembenchError(
            f"{path}: made with version {named['version']} of {method.name}, here is version "
            f"{method.version}; use the membench that has it, or run again"
        )
    source = source_of(method)
    if source is not None and file_hash(source) == ran:
        found.checked.append(f"method: {method.name}, the very source that is here")
    else:
        found.not_checked["identity.method"] = (
            f"the source of {method.name} here has another hash than the one that ran"
        )


def _check_identity(
    path: Path, record: Mapping[str, Any], registry: Registry, results: Path, found: Report
) -> None:
    """Compare with what the same names give here: target, settings and artifacts included."""
    if record["identity"]["target"].get("kind") == "images":
        found.not_checked["identity"] = "images from elsewhere: nothing here could draw them"
        return
    try:
        cell = cell_of(record, registry, results)
    except MembenchError as error:
        found.not_checked["identity"] = f"cannot be derived here ({error})"
        return
    derived = json.loads(canonical_json(cell.identity))
    compare(path, "identity", record["identity"], derived)
    found.checked.append("identity: the same as card, plugin and target give here")
    found.cell = cell


def cell_of(record: Mapping[str, Any], registry: Registry, results: Path) -> Cell:
    """The cell that a record says it is of, by the names in its identity; nothing is computed.

    Raises `MembenchError` where method, data, target, descriptor or device are not here.
    """
    from membench import run
    from membench.contract import silent
    from membench.specs import Similarity

    identity = record["identity"]
    card = registry.card(identity["dataset"]["name"])
    similarity = Similarity.model_validate(identity["similarity"])
    guided = record["attack"].get("surrogate") is not None
    return run.prepare(
        registry,
        results,
        silent,
        method=identity["method"]["name"],
        dataset=card.name,
        target=identity["target"]["name"],
        settings=_typed(identity["method"]["parameters"]),
        guidance_scales=tuple(identity["guidance_scales"]) if guided else None,
        images=identity["images_per_scale"],
        steps=identity["sampling"]["steps"],
        batch_size=identity["sampling"]["batch_size"],
        precision=identity["sampling"].get("precision", "float32"),
        compile=identity["sampling"].get("compile", False),
        label=identity["label"],
        seed=identity["seed"],
        attack_seed=identity["attack_seed"],
        device=identity["compute"]["device"],
        similarity=similarity if similarity != card.similarity else None,
    )


def _typed(parameters: Mapping[str, Any]) -> dict[str, str]:
    """A method's parameters as `--set` takes them."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in parameters.items()
        if value is not None
    }
