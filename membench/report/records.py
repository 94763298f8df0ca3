"""Committed records: read, checked, and grouped into the rows of a board."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.errors import MembenchError
from membench.hashing import canonical_json
from membench.metrics.invariants import check_invariants
from membench.record import read_record
from membench.report.rarefied import rarefied_ums

Record = Mapping[str, Any]

SIDES = ("members", "heldout", "excess")
_APART = (
    "dataset",
    "target",
    "similarity",
    "descriptor",
    "metrics",
    "mitigation",
)
_POOLED = ("seed", "attack_seed", "artifacts")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its 95 % interval and the least and most of any seed."""

    value: float
    lower: float | None
    upper: float | None
    least: float
    most: float

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.lower is None or self.upper is None else (self.lower, self.upper)

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals share a point; False where one is missing."""
        if self.interval is None or other.interval is None:
            return False
        return self.interval[1] >= other.interval[0] and other.interval[1] >= self.interval[0]


@dataclass(frozen=True)
class Row:
    """One method with one set of parameters: its runs, which differ in nothing but the seed.

    ums_images: how many images per scale and seed UMS is given at, to be the same in a section;
    None for as many as were drawn.
    """

    label: str
    records: tuple[Record, ...]
    ums_images: int | None = None

    @property
    def images(self) -> int:
        """N_G of one guidance scale and seed."""
        return int(self.records[0]["identity"]["images_per_scale"])

    @property
    def seeds(self) -> list[int]:
        return [record["identity"]["seed"] for record in self.records]

    @property
    def scales(self) -> list[str]:
        return sorted(self.records[0]["scores"]["scales"], key=float)

    def scores(self, scale: str | None = None) -> list[Record]:
        """The scores of every seed, at one guidance scale or averaged."""
        found = [record["scores"] for record in self.records]
        return [s["average"] if scale is None else s["scales"][scale] for s in found]

    def band(
        self, mode: str, band: str, side: str, metric: str = "ams", scale: str | None = None
    ) -> Estimate | None:
        """For instance AMS of `members` in the `mid` band of mode `calibrated`.

        UMS is rarefied to `ums_images`; None where the records cannot say what it is there.
        """
        if metric == "ums" and self.ums_images not in (None, self.images):
            return self._rarefied(mode, band, side, scale)
        found = [s["bands"].get(mode, {}).get(band, {}).get(side) for s in self.scores(scale)]
        if any(part is None or part.get(metric) is None for part in found):
            return None
        return pooled((part[metric], part.get(f"{metric}_interval")) for part in found)

    def _rarefied(self, mode: str, band: str, side: str, scale: str | None) -> Estimate | None:
        headline = self.records[0]["identity"]["similarity"]["band_modes"][0]
        if mode != headline or self.ums_images is None:
            return None
        found = [rarefied_ums(r, band, side, self.ums_images, scale) for r in self.records]
        return None if any(part is None for part in found) else pooled(p for p in found if p)

    def plain(self, *keys: str) -> Estimate | None:
        """A figure of the average over scales, found by its keys: `plain("l2_ratio", "excess")`."""
        *path, last = keys
        parts: list[Any] = self.scores()
        for key in path:
            parts = [part.get(key) or {} for part in parts]
        if any(part.get(last) is None for part in parts):
            return None
        return pooled((part[last], part.get(f"{last}_interval")) for part in parts)


@dataclass(frozen=True)
class Section:
    """What can be compared: one target of one data set, scored alike; UMS at a common N_G."""

    identity: Record
    rows: tuple[Row, ...]

    @property
    def target(self) -> str:
        return str(self.identity["target"]["name"])

    @property
    def mitigation(self) -> str | None:
        found = self.identity.get("mitigation")
        if not found:
            return None
        return str(found["name"]) if isinstance(found, Mapping) and "name" in found else str(found)

    @property
    def ums_images(self) -> int:
        """Images per scale and seed at which UMS stands in this section."""
        return min(row.images for row in self.rows)


def pooled(parts: Iterable[tuple[float, Sequence[float] | None]]) -> Estimate:
    """Mean of independent estimates.

    Its interval is recovered from theirs (MOVER; Zou and Donner 2008): half-widths add in squares,
    lower and upper ones apart, and are divided by the number of estimates.
    """
    found = list(parts)
    values = [value for value, _ in found]
    mean = math.fsum(values) / len(values)
    lower = upper = None
    intervals = [interval for _, interval in found if interval is not None]
    if len(intervals) == len(found):
        below = math.hypot(*(v - i[0] for v, i in zip(values, intervals, strict=True)))
        above = math.hypot(*(i[1] - v for v, i in zip(values, intervals, strict=True)))
        lower, upper = mean - below / len(found), mean + above / len(found)
    return Estimate(mean, lower, upper, min(values), max(values))


def enters_board(record: Record) -> bool:
    """Whole, finished runs only: neither limited nor failed."""
    return not record.get("limited") and not record.get("error") and bool(record.get("scores"))


def load_records(folder: Path) -> dict[str, list[Record]]:
    """The records of every data set from `folder/DATASET/*.json`, sorted by id.

    Limited and failed ones are among them: `enters_board` tells. Raises `MembenchError` for a
    record that cannot be read, lies in another data set's folder, or is there twice.
    """
    found: dict[str, list[Record]] = {}
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = read_record(path)
        try:
            dataset = record["identity"]["dataset"]["name"]
            if enters_board(record):
                _check_layout(record)
            for scores in (record["scores"]["average"], *record["scores"]["scales"].values()):
                check_invariants(scores)
        except MembenchError as error:
            raise MembenchError(f"{path}: {error}") from None
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise MembenchError(f"{path}: not a whole record ({error!r})") from None
        if dataset != path.parent.name:
            raise MembenchError(f"{path}: a record of {dataset!r}, expected it in {dataset}/")
        if record["id"] in places:
            raise MembenchError(f"{path}: the same run as {places[record['id']]}; delete one")
        places[record["id"]] = path
        found.setdefault(dataset, []).append(record)
    return {name: sorted(records, key=lambda r: r["id"]) for name, records in found.items()}


def _check_layout(record: Record) -> None:
    """Touch what every board needs, so that a gap is found where the file's name is known."""
    identity = record["identity"]
    for name in (identity["target"]["name"], identity["method"]["name"]):
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is not a name")
    _ = identity["seed"] + identity["images_per_scale"], record["provenance"]["finished"]
    _ = record["cost"]["unet_calls"], record["cost"]["seconds"]
    for score in (record["scores"]["average"], *record["scores"]["scales"].values()):
        for bands in score["bands"].values():
            for band in bands.values():
                _ = band["upper"], [(band[side]["ams"], band[side]["ums"]) for side in SIDES]
    _ = record["scores"]["average"]["bands"]["calibrated"]["mid"]
    if not record["scores"]["scales"]:
        raise KeyError("scores.scales")


def sections(records: Iterable[Record]) -> list[Section]:
    """Group what may stand in one ranking, and within it the runs that differ by seed alone."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        identity = record["identity"]
        apart = canonical_json({key: identity.get(key) for key in _APART})
        alike = canonical_json({k: v for k, v in identity.items() if k not in _POOLED})
        groups.setdefault(apart, {}).setdefault(alike, []).append(record)
    found = []
    for apart, methods in groups.items():
        for group in methods.values():
            _refuse_twins(group)
        runs = [tuple(sorted(group, key=_by_seed)) for _, group in sorted(methods.items())]
        common = min(run[0]["identity"]["images_per_scale"] for run in runs)
        rows = tuple(Row(_label(group, runs), group, common) for group in runs)
        found.append(Section(json.loads(apart), tuple(sorted(rows, key=lambda row: row.label))))
    return sorted(found, key=lambda s: (s.target, canonical_json(s.identity)))


def _refuse_twins(group: Sequence[Record]) -> None:
    """Two records of one seed in one row would count the same images twice."""
    seen: dict[tuple[int, int], str] = {}
    for record in group:
        seeds = (record["identity"]["seed"], record["identity"].get("attack_seed", 0))
        if seeds in seen:
            raise MembenchError(
                f"records {seen[seeds][:12]} and {record['id'][:12]} are of one method, target and "
                "seed, but were made by other code or data: delete the older one"
            )
        seen[seeds] = record["id"]


def _by_seed(record: Record) -> tuple[int, str]:
    return record["identity"]["seed"], record["id"]


def _label(group: tuple[Record, ...], runs: Sequence[tuple[Record, ...]]) -> str:
    """The method's name, with whatever tells it from its namesakes in the section."""
    mine = group[0]["identity"]
    name = str(mine["method"]["name"])
    others = [
        run[0]["identity"]
        for run in runs
        if run is not group and run[0]["identity"]["method"]["name"] == name
    ]
    if not others:
        return name
    flat, flats = _flat(mine), [_flat(other) for other in others]
    differing = sorted(
        key
        for key in flat
        if key.split(".")[0] not in _POOLED and any(o.get(key) != flat[key] for o in flats)
    )
    parts = [f"{key.rpartition('.')[2]}={flat[key]}" for key in differing]
    return f"{name} ({', '.join(parts)})" if parts else name


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out
