"""Which training images a run extracted, from its record and saved matches."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from membench.compare import saved_matches
from membench.data.imageset import Dataset, load_dataset
from membench.errors import MembenchError
from membench.files import replace_atomically
from membench.metrics.calibration import Calibration
from membench.metrics.extracted import by_group, extracted, in_band
from membench.record import RECORD, read_record
from membench.registry import Registry
from membench.report import table
from membench.similarity.measures import LEVELS


def extraction(
    registry: Registry, path: Path, *, mode: str | None = None, band: str = "mid"
) -> dict[str, Any]:
    """The extracted training images of a record, the most often matched first, and their classes.

    mode: of bands, the headline one if None. Labels and source indices are those of the data set,
    if its files are here. Raises MembenchError for a band without a threshold or unsaved matches.
    """
    path = path / RECORD if path.is_dir() else path
    record = read_record(path)
    identity = record["identity"]
    mode = mode or identity["similarity"]["band_modes"][0]
    if band not in LEVELS or mode not in record["scores"]["average"]["bands"]:
        known = ", ".join(record["scores"]["average"]["bands"])
        raise MembenchError(f"no band {mode}:{band}; expected one of {known}, and low, mid or high")
    values = Calibration.from_dict(record["calibration"]).values
    scales, n_members = {}, 0
    for scale in sorted(record["scores"]["scales"], key=float):
        matches = saved_matches(record, path.parent, scale)
        edges = matches.measure.bands(mode, values)[band]  # type: ignore[arg-type]
        if edges is None:
            reason = record["scores"]["average"]["bands"][mode][band]["reason"]
            raise MembenchError(f"{path}: no {mode} {band} band: {reason}")
        n_members = matches.members.rows
        scales[float(scale)] = in_band(matches, edges, "members", identity["similarity"]["match"])
    found = extracted(scales, n_members, lower=matches.measure.sign == 1)
    data = _dataset(registry, identity["dataset"])
    groups = []
    if data is not None:
        names = data.card.images.classes
        counts = found.counts(n_members)
        groups = [
            {"name": names[group.group]} | asdict(group)
            for group in by_group(counts, data.members.labels, len(names))
        ]
    facts = (None, None) if data is None else (data.members.index, data.members.labels)
    return {
        "title": table.title(record),
        "record": record["id"],
        "mode": mode,
        "band": band,
        "n_members": n_members,
        "images": found.rows(*facts),
        "groups": groups,
    }


def _dataset(registry: Registry, named: Mapping[str, Any]) -> Dataset | None:
    """The record's data set, if it is here and the same; else the table does without labels."""
    try:
        card = registry.card(named["name"])
        data = load_dataset(card, registry.data_folder(card.name))
    except MembenchError:
        return None
    return data if data.card.splits.identity() == named["splits"] else None


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys as CSV; floats as Python prints them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda partial: partial.write_text(text.getvalue(), encoding="utf-8"))
