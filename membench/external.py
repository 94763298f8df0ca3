"""`membench score`: every image-level metric for images that some other tool made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from membench.data.images import read_images
from membench.data.imageset import load_dataset
from membench.describing import Describer
from membench.diverge import knn_of_images
from membench.errors import MembenchError
from membench.files import link_or_copy, locked, write_array, write_json, writing
from membench.hashing import array_hash, canonical_json, content_hash, file_hash
from membench.lab import Progress
from membench.limits import ELSEWHERE
from membench.matching import FACTS, MATCHES, Matcher
from membench.metrics import METRIC_VERSIONS
from membench.provenance import provenance
from membench.record import NULL, RECORD, SCHEMA, SHEET, seal
from membench.registry import Registry
from membench.report import table
from membench.report.contact_sheet import contact_sheet
from membench.run import cost_of
from membench.scoring import calibrate_from, incidence, null_facts, per_image, score_all
from membench.specs import Resize, Similarity
from membench.store import Store

SCALE = 0.0
"""Images from elsewhere stand where a run's guidance scale 0 does."""


@dataclass(frozen=True)
class Scoring:
    """Images to be scored, read but not compared."""

    name: str
    images: np.ndarray
    matcher: Matcher
    device: str

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that could change a number of the record."""
        card = self.matcher.dataset.card
        return {
            "schema": SCHEMA,
            "dataset": {
                "name": card.name,
                "revision": card.revision,
                "splits": card.splits.identity(),
            },
            "target": {"name": "elsewhere", "kind": "images"},
            "method": {"name": self.name, "version": 0, "parameters": {}},
            "mitigation": None,
            "seed": 0,
            "guidance_scales": [SCALE],
            "images_per_scale": len(self.images),
            "images_sha256": array_hash(self.images),
            "shape": list(card.images.shape),
            **self.matcher.identity(),
            "metrics": dict(METRIC_VERSIONS),
        }

    @property
    def folder(self) -> Path:
        root, card = self.matcher.store.root, self.matcher.dataset.card
        return root / "scored" / card.name / f"{self.name}-{content_hash(self.identity)[:12]}"


def prepare(
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    images: Path,
    dataset: str,
    name: str | None = None,
    resize: bool = False,
    similarity: Similarity | None = None,
    device: str = "cpu",
    descriptor_weights: Path | None = None,
) -> Scoring:
    """Read the images of a folder, zip, npz, npy or parquet file; nothing is compared yet.

    resize: bring them to the data set's size and mode; without it another size is an error.
    Raises `MembenchError` naming the first file that is no image of the right size.
    """
    data = load_dataset(registry.card(dataset), registry.data_folder(dataset))
    rule = Resize(convert=True) if resize else None
    pixels = read_images(images, data.card.images.shape, rule, progress=progress)
    label = name or images.resolve().stem
    clean = "".join(c if c.isalnum() or c in "._" else "_" for c in label).strip("._")
    if not clean:
        raise MembenchError(f"--name {label!r}: expected letters or digits")
    store = Store(results)
    describer = Describer(registry, store, progress, device, descriptor_weights)
    matcher = Matcher(data, similarity or data.card.similarity, store, progress, describer)
    return Scoring(clean, pixels, matcher, device)


def run(scoring: Scoring) -> dict[str, Any]:
    """Compare, score, and write a record that `membench verify` can repeat; it enters no board."""
    started = datetime.now(UTC)
    matcher, identity = scoring.matcher, scoring.identity
    store, similarity = matcher.store, matcher.similarity
    found = matcher.matches_of(scoring.images, identity["images_sha256"], title="matches")
    matches = {SCALE: store.get(found)}
    null, facts = store.get(matcher.null()), store.get(matcher.facts())
    keep = facts.null_rows(similarity)
    calibration = calibrate_from(null, keep, similarity)
    knn = None
    if len(scoring.images) > 3:
        with matcher.progress("knn divergence", 1, "estimates") as advance:
            knn = knn_of_images(np.asarray(scoring.images), matcher.dataset)
            advance(1)
    folder = scoring.folder
    with writing(folder), locked(folder.with_name(f".{folder.name}.lock")):
        link_or_copy(store.folder(found) / MATCHES, folder / f"matches-{SCALE:g}.npz")
        link_or_copy(store.folder(matcher.null()) / MATCHES, folder / NULL)
        link_or_copy(store.folder(matcher.facts()) / FACTS, folder / FACTS)
        write_array(folder / f"images-{SCALE:g}.npy", np.asarray(scoring.images))
        files = sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".npz"))
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "id": content_hash(identity),
            "limited": True,
            "limited_by": [ELSEWHERE],
            "identity": identity,
            "calibration": calibration.to_dict(),
            "null": null_facts(null, keep, similarity),
            "scores": score_all(matches, calibration, similarity),
            "per_image": per_image(matches, calibration, similarity),
            "incidence": incidence(matches, calibration, similarity),
            "attack": {"surrogate": None, "guidance_ratio": {}},
            "knn": knn,
            "files": {path.name: file_hash(path) for path in files},
        }
        record = json.loads(canonical_json(record))
        record["results_sha256"] = seal(record)
        record["cost"] = cost_of(store.bill([found, matcher.null(), matcher.facts()]))
        record["provenance"] = provenance(started, scoring.device)
        if matcher.dataset.card.show_images:
            contact_sheet(
                folder / SHEET,
                {SCALE: scoring.images},
                matches,
                matcher.dataset.members.images,
                title=table.title(record),
            )
        write_json(folder / RECORD, record)
    return record
