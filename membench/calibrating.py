"""`membench calibrate`: what real images that nobody trained on score, and what moves it.

No model is involved. Held-out images are compared with the members exactly as generated ones are,
once as the card says and once for each variation: mirrored too, with fewer members, at other
resolutions, with other preprocessing. All variations score the same images, those that are no
near-duplicate of a member (and, where labels are identities, whose person is not among them).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from membench.data.imageset import Dataset, ImageSet, load_dataset
from membench.describing import Describer
from membench.errors import MembenchError
from membench.files import (
    link_or_copy,
    locked,
    replace_atomically,
    write_json,
    writing,
)
from membench.hashing import canonical_json, content_hash, file_hash
from membench.lab import Progress
from membench.matching import FACTS, MATCHES, Facts, Matcher
from membench.metrics import METRIC_VERSIONS
from membench.provenance import provenance
from membench.record import CALIBRATION_SCHEMA, read_calibration, seal
from membench.registry import Registry
from membench.scoring import calibrate_from, null_facts
from membench.similarity.matches import Matches
from membench.similarity.preprocessing import PRESETS
from membench.specs import Similarity, explain
from membench.store import Artifact, Store

RECORD, FIGURE = "calibration.json", "calibration.svg"
GROUPS = ("flips", "members", "resolution", "preprocessing", "duplicates")
SHARES = (2, 4, 8)
"""Of the members: a half, a quarter, an eighth."""
INPUTS = (128, 224, 320)
SMALLEST = 8


@dataclass(frozen=True)
class Variation:
    """One way of scoring the same held-out images; group: what it varies, "" for the card's."""

    name: str
    group: str
    matcher: Matcher

    @property
    def null(self) -> Artifact[Matches]:
        return self.matcher.null(title=self.name)

    def identity(self) -> dict[str, Any]:
        card = self.matcher.dataset.card
        return {
            "name": self.name,
            "group": self.group,
            **self.matcher.identity(),
            "members": card.splits.members.count,
            "shape": list(card.images.shape),
            "null": self.null.key,
        }


@dataclass(frozen=True)
class Calibrating:
    """A calibration whose parts are described, but not computed; the card's own way comes first."""

    variations: tuple[Variation, ...]
    facts: Artifact[Facts]
    store: Store
    device: str

    @property
    def base(self) -> Matcher:
        return self.variations[0].matcher

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that could change a number of the record."""
        card = self.base.dataset.card
        return {
            "schema": CALIBRATION_SCHEMA,
            "dataset": {
                "name": card.name,
                "revision": card.revision,
                "splits": card.splits.identity(),
            },
            **self.base.identity(),
            "variations": [variation.identity() for variation in self.variations],
            "metrics": dict(METRIC_VERSIONS),
        }

    @property
    def id(self) -> str:
        return content_hash(self.identity)

    @property
    def folder(self) -> Path:
        name = f"{self.base.similarity.name}-{self.id[:12]}"
        return self.store.root / "calibrations" / self.base.dataset.card.name / name


def prepare(
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    dataset: str,
    similarity: Similarity | None = None,
    vary: Sequence[str] = GROUPS,
    everything_unseen: bool = False,
    device: str = "cpu",
    descriptor_weights: Path | None = None,
) -> Calibrating:
    """Describe a calibration; nothing is computed.

    similarity: another than the card's. vary: which of `GROUPS`. everything_unseen: the null is
    made of held-out and auxiliary images, since no classifier is involved that saw the latter.
    """
    for group in vary:
        if group not in GROUPS:
            raise MembenchError(f"--vary {group}: expected one of {', '.join(GROUPS)}")
    data = load_dataset(registry.card(dataset), registry.data_folder(dataset))
    if everything_unseen:
        data = _with_heldout(data, data.unseen)
    store = Store(results)
    describer = Describer(registry, store, progress, device, descriptor_weights)
    base = Matcher(data, similarity or data.card.similarity, store, progress, describer)
    found = [Variation("as the card says", "", base)]
    for group in GROUPS:
        if group in vary:
            known = {variation.null.key for variation in found}
            found += [v for v in _variations(group, base) if v.null.key not in known]
    return Calibrating(tuple(found), base.facts(), store, device)


def _variations(group: str, base: Matcher) -> list[Variation]:
    data, similarity = base.dataset, base.similarity
    if group == "flips":
        name = "not mirrored" if similarity.flips else "mirrored too"
        return [Variation(name, group, _other(base, flips=not similarity.flips))]
    if group == "duplicates":
        name = "with near-duplicates" if similarity.dedup_reference else "members deduplicated"
        kept = not similarity.dedup_reference
        return [Variation(name, group, _other(base, dedup_reference=kept))]
    if group == "members":
        sizes = [len(data.members) // share for share in SHARES]
        return [
            Variation(f"{size:,} members", group, replace(base, dataset=_fewer(data, size)))
            for size in sizes
            if size > similarity.neighbours
        ]
    choice = similarity.descriptor
    if choice is None:
        if group == "preprocessing":
            return []
        _, height, width = data.card.images.shape
        sizes = [s for s in (height // 2, height // 4) if s >= SMALLEST and height == width]
        return [
            Variation(f"{size} x {size} pixels", group, replace(base, dataset=_shrunk(data, size)))
            for size in sizes
        ]
    if group == "preprocessing":
        others = [preset for preset in PRESETS if preset != choice.preset]
        changes: list[tuple[str, dict[str, Any]]] = [
            (preset, {"preset": preset, "input_size": None}) for preset in others
        ]
    else:
        changes = [
            (f"input {size} x {size}", {"preset": None, "input_size": size})
            for size in INPUTS
            if size != choice.input_size
        ]
    return [
        Variation(name, group, _other(base, descriptor=choice.model_copy(update=change)))
        for name, change in changes
    ]


def _other(base: Matcher, **changes: Any) -> Matcher:
    return replace(base, similarity=base.similarity.model_copy(update=changes))


def _fewer(data: Dataset, size: int) -> Dataset:
    """The first members only: splits lie in random order."""
    members = ImageSet(*(getattr(data.members, kind)[:size] for kind in vars(data.members)))
    return _with_split(replace(data, members=members), "members", size, {"first": size})


def _with_heldout(data: Dataset, heldout: ImageSet) -> Dataset:
    also = {"and": data.card.splits.auxiliary.images_sha256}
    return _with_split(replace(data, heldout=heldout), "heldout", len(heldout), also)


def _with_split(data: Dataset, name: str, count: int, change: dict[str, Any]) -> Dataset:
    """The card of a data set one of whose splits was changed: hashes of what was done to it."""
    split = getattr(data.card.splits, name)
    hashes = {
        key: content_hash([getattr(split, key), change])
        for key in ("images_sha256", "labels_sha256", "index_sha256")
    }
    splits = data.card.splits.model_copy(
        update={name: split.model_copy(update={"count": count} | hashes)}
    )
    return replace(data, card=data.card.model_copy(update={"splits": splits}))


def _shrunk(data: Dataset, size: int) -> Dataset:
    """All images averaged down (Pillow BOX) to `size` pixels a side."""
    for name in ("members", "heldout"):
        images: ImageSet = getattr(data, name)
        small = ImageSet(_boxed(images.images, size), images.labels, images.index)
        changed = (
            replace(data, members=small) if name == "members" else replace(data, heldout=small)
        )
        data = _with_split(changed, name, len(small), {"box": size})
    shape = data.card.images.model_copy(update={"height": size, "width": size})
    return replace(data, card=data.card.model_copy(update={"images": shape}))


def _boxed(images: np.ndarray, size: int) -> np.ndarray:
    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for row, image in zip(out, images, strict=True):
        picture = Image.fromarray(np.asarray(image).squeeze())
        row[:] = np.asarray(picture.resize((size, size), Image.Resampling.BOX)).reshape(row.shape)
    return out


def run(calibrating: Calibrating) -> dict[str, Any]:
    """Compute a calibration, write its folder and return its record; a killed run goes on."""
    from membench.report.variations import draw_calibration

    started = datetime.now(UTC)
    store = calibrating.store
    facts = store.get(calibrating.facts)
    folder, names = calibrating.folder, {}
    nulls = []
    for number, variation in enumerate(calibrating.variations):
        nulls.append(store.get(variation.null))
        names[f"null-{number:02d}.npz"] = store.folder(variation.null) / MATCHES
    with writing(folder), locked(folder.with_name(f".{folder.name}.lock")):
        names[FACTS] = store.folder(calibrating.facts) / FACTS
        for name, source in names.items():
            link_or_copy(source, folder / name)
        record: dict[str, Any] = {
            "schema": CALIBRATION_SCHEMA,
            "kind": "calibration",
            "id": calibrating.id,
            "identity": calibrating.identity,
            "results": summarise(calibrating.identity, facts, nulls),
            "files": {name: file_hash(folder / name) for name in sorted(names)},
        }
        record = json.loads(canonical_json(record))
        record["results_sha256"] = seal(record)
        record["provenance"] = provenance(started, calibrating.device)
        figure = draw_calibration(record)
        replace_atomically(folder / FIGURE, lambda path: path.write_text(figure, "utf-8"))
        write_json(folder / RECORD, record)
    return record


def summarise(
    identity: dict[str, Any], facts: Facts, nulls: Sequence[Matches]
) -> list[dict[str, Any]]:
    """Every number of a record from the saved matches: pure, so that `verify` can repeat it.

    One entry a variation: {"name", "group", "calibration": thresholds, "null": false-match rates of
    the fixed bands and of every threshold, "quantiles": of the best scores, "near_duplicates"}.
    """
    keep = facts.null_rows(Similarity.model_validate(identity["similarity"]))
    found = []
    for described, null in zip(identity["variations"], nulls, strict=True):
        similarity = Similarity.model_validate(described["similarity"])
        best = null.scores()[keep, 0]
        nearest = 1 - np.array([0.5, 0.95, 0.99, 0.998])
        quantiles = null.measure.far(np.quantile(null.measure.far(best), nearest))
        limit = similarity.near_duplicate_rmse
        found.append(
            {
                "name": described["name"],
                "group": described["group"],
                "calibration": calibrate_from(null, keep, similarity).to_dict(),
                "null": null_facts(null, keep, similarity),
                "quantiles": dict(zip(("50", "95", "99", "99.8"), quantiles.tolist(), strict=True)),
            }
        )
    found[0]["near_duplicates"] = {
        "heldout_of_members": int((facts.heldout_rmse <= limit).sum()),
        "heldout": len(facts.heldout_rmse),
        "nearest_rmse": float(facts.heldout_rmse.min()),
        "members": int((facts.members_rmse <= limit).sum()),
        "shared_labels": int((~keep).sum() - (facts.heldout_rmse <= limit).sum()),
    }
    return found


def verify_calibration(path: Path) -> dict[str, Any]:
    """Check a calibration record (its JSON file or its folder), recomputing it from its matches.

    Raises `MembenchError` naming the first thing that differs.
    """
    from membench.verify import check_files, compare

    path = path / RECORD if path.is_dir() else path
    record = read_calibration(path)
    identity = record["identity"]
    if identity["metrics"] != dict(METRIC_VERSIONS):
        raise MembenchError(f"{path}: made with other metric versions; calibrate again")
    check_files(path, record)
    count = len(identity["variations"])
    nulls = [Matches.load(path.parent / f"null-{number:02d}.npz") for number in range(count)]
    facts = Facts.load(path.parent / FACTS)
    try:
        results = json.loads(canonical_json(summarise(identity, facts, nulls)))
    except ValidationError as error:
        raise MembenchError(f"{path}: identity.similarity.{explain(error)}") from None
    compare(path, "results", record["results"], results)
    return record
