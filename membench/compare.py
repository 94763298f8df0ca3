"""Compare methods by their records, paired by seed and image. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.metrics.calibration import Calibration
from membench.metrics.comparison import (
    Difference,
    excess_difference,
    holm,
    rate_difference,
    unique_difference,
)
from membench.metrics.scores import count_band
from membench.record import RECORD, read_record
from membench.report.records import Row, sections
from membench.scoring import unpack_bits, unpack_counts
from membench.similarity.matches import Matches
from membench.similarity.measures import LEVELS

Record = Mapping[str, Any]
METRICS = ("ams", "excess", "ums")
_ALIKE = (
    "dataset", "target", "similarity", "descriptor", "images_per_scale", "sampling", "label",
    "mitigation", "compute", "metrics",
)  # fmt: skip

SIDES = ("members", "heldout")


@dataclass(frozen=True)
class _Outcome:
    """One band of one row: hits of both sides [S, seeds Q], and per seed what UMS needs.

    unique: mean over scales; exclusive: a_i, mean over scales [Q]; None where pairs are missing.
    """

    members: NDArray[np.bool_]
    heldout: NDArray[np.bool_]
    unique: list[float] | None
    exclusive: list[NDArray[np.float64]] | None


def compare(
    paths: Sequence[Path],
    *,
    baseline: str | None = None,
    mode: str | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Every method against a baseline, in every band: AMS, excess AMS and UMS.

    paths: records or their folders; those that differ by seed alone are pooled. baseline: a
    method's label, the first record's if None. mode: of bands, the headline one if None; others
    need the saved matches. scale: compare at one guidance scale, not at the mean over them.
    Raises MembenchError unless all are of one data set, target, similarity and sampler and every
    method has the same seeds.
    """
    loaded = _load(paths)
    folders = {id(record): path.parent for path, record in loaded}
    records = [record for _, record in loaded]
    _refuse_unlike(loaded)
    rows = sections(records)[0].rows
    labels = [row.label for row in rows]
    if baseline is None:
        baseline = next(row.label for row in rows if any(r is records[0] for r in row.records))
    if baseline not in labels:
        raise MembenchError(f"--baseline {baseline}: expected one of {', '.join(labels)}")
    others = [row for row in rows if row.label != baseline]
    if not others:
        raise MembenchError("nothing to compare: all records are of one method; name another's")
    seeds = _common_seeds(rows)
    headline = records[0]["identity"]["similarity"]["band_modes"][0]
    mode = mode or headline
    if mode not in records[0]["scores"]["average"]["bands"]:
        known = ", ".join(records[0]["scores"]["average"]["bands"])
        raise MembenchError(f"--band-mode {mode}: these records have {known}")

    base = next(row for row in rows if row.label == baseline)
    found: dict[str, list[tuple[str, str, Difference]]] = {metric: [] for metric in METRICS}
    for level in LEVELS:
        of_base = _outcome(base, mode, level, scale, folders, headline)
        for row in others:
            of_row = _outcome(row, mode, level, scale, folders, headline)
            if of_row is None or of_base is None:
                continue
            for metric, difference in _differences(of_row, of_base).items():
                found[metric].append((level, row.label, difference))
    lines = []
    for metric in METRICS:
        corrected = holm([difference for _, _, difference in found[metric]])
        for (level, label, _), difference in zip(found[metric], corrected, strict=True):
            verdict = difference.verdict(label, baseline)
            line = {"metric": metric, "band": level, "method": label, "baseline": baseline}
            lines.append(line | asdict(difference) | {"verdict": verdict})
    identity = records[0]["identity"]
    return {
        "dataset": identity["dataset"]["name"],
        "target": identity["target"]["name"],
        "mode": mode,
        "scale": scale,
        "seeds": seeds,
        "images": identity["images_per_scale"] * len(seeds),
        "records": sorted(record["id"] for record in records),
        "comparisons": lines,
    }


def _load(paths: Iterable[Path]) -> list[tuple[Path, Record]]:
    files = [path / RECORD if path.is_dir() else path for path in paths]
    found: list[tuple[Path, Record]] = []
    seen = set()
    for file in files:
        record = read_record(file)
        if record["id"] not in seen:
            found.append((file, record))
        seen.add(record["id"])
    return found


def _refuse_unlike(loaded: Sequence[tuple[Path, Record]]) -> None:
    first_path, first = loaded[0]
    for path, record in loaded[1:]:
        for key in _ALIKE:
            mine, other = first["identity"].get(key), record["identity"].get(key)
            if mine != other:
                raise MembenchError(
                    f"{path}: {key} is {_short(other)}, but {_short(mine)} in {first_path}; only "
                    "runs that differ in method and seed alone can be compared"
                )


def _short(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else None
    text = str(name or value)
    return text if len(text) <= 60 else text[:59] + "…"


def _common_seeds(rows: Sequence[Row]) -> list[int]:
    for row in rows:
        if len(set(row.seeds)) < len(row.seeds):
            raise MembenchError(f"{row.label}: two records of one seed; leave one out")
        if set(row.seeds) != set(rows[0].seeds):
            raise MembenchError(
                f"{row.label} has seeds {_list(row.seeds)}, {rows[0].label} has "
                f"{_list(rows[0].seeds)}; images are paired by seed, so all need the same"
            )
    return sorted(rows[0].seeds)


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _outcome(
    row: Row, mode: str, level: str, scale: float | None, folders: dict[int, Path], headline: str
) -> _Outcome | None:
    """One band of a row, its seeds in order; None where the band has no threshold."""
    chosen = row.scales
    if scale is not None and chosen != ["0"]:  # without guidance there is one scale to be at
        if f"{scale:g}" not in chosen:
            raise MembenchError(f"{row.label} has no scale {scale:g}, only {', '.join(chosen)}")
        chosen = [f"{scale:g}"]
    hits: dict[str, list[NDArray[np.bool_]]] = {side: [] for side in SIDES}
    unique: list[float] = []
    exclusive: list[NDArray[np.float64]] = []
    for record in sorted(row.records, key=lambda r: r["identity"]["seed"]):
        read = _packed if mode == headline else _recounted
        parts = read(record, folders.get(id(record), Path()), mode, level, chosen)
        if parts is None:
            return None
        for side in SIDES:
            hits[side].append(np.array(parts[side]))
        if all(a is not None for a in parts["exclusive"]):
            unique.append(float(np.mean(parts["unique"])))
            exclusive.append(np.mean(parts["exclusive"], axis=0))
    whole = len(unique) == len(row.records)
    return _Outcome(
        np.concatenate(hits["members"], axis=1),
        np.concatenate(hits["heldout"], axis=1),
        unique if whole else None,
        exclusive if whole else None,
    )


def _packed(
    record: Record, folder: Path, mode: str, level: str, scales: Sequence[str]
) -> dict[str, list[Any]] | None:
    """The headline bands, as the record itself keeps them."""
    if level not in record["per_image"]:
        return None
    count = record["identity"]["images_per_scale"]
    kept = record["per_image"][level]
    parts: dict[str, list[Any]] = {
        side: [unpack_bits(kept[side][s]["hits"], count) for s in scales] for side in SIDES
    }
    packed = [kept["members"][s].get("exclusive") for s in scales]
    parts["exclusive"] = [None if p is None else unpack_counts(p, count) for p in packed]
    bands = [record["scores"]["scales"][s]["bands"][mode][level] for s in scales]
    parts["unique"] = [band["members"]["unique"] for band in bands]
    return parts


def _recounted(
    record: Record, folder: Path, mode: str, level: str, scales: Sequence[str]
) -> dict[str, list[Any]] | None:
    """Other bands, from the saved matches beside the record."""
    parts: dict[str, list[Any]] = {name: [] for name in (*SIDES, "exclusive", "unique")}
    for scale in scales:
        matches = saved_matches(record, folder, scale)
        values = Calibration.from_dict(record["calibration"]).values
        band = matches.measure.bands(mode, values)[level]  # type: ignore[arg-type]
        if band is None:
            return None
        for side in SIDES:
            counted = count_band(matches, side, band, record["identity"]["similarity"]["match"])
            parts[side].append(counted.hits)
            if side == "members":
                parts["exclusive"].append(counted.exclusive if counted.known else None)
                parts["unique"].append(int(np.count_nonzero(counted.counts)))
    return parts


def saved_matches(record: Record, folder: Path, scale: str) -> Matches:
    """The matches of one guidance scale beside a record, whose hash the record must name."""
    path = folder / f"matches-{scale}.npz"
    if not path.is_file():
        raise MembenchError(f"{path}: missing; name the run's folder, where its matches are")
    if record["files"].get(path.name) != file_hash(path):
        raise MembenchError(f"{path}: truncated or changed: its SHA-256 is not the record's")
    return Matches.load(path)


def _differences(first: _Outcome, second: _Outcome) -> dict[str, Difference]:
    images = first.members.shape[1]
    found = {
        "ams": rate_difference(first.members, second.members),
        "excess": excess_difference(
            first.members.astype(int) - first.heldout, second.members.astype(int) - second.heldout
        ),
    }
    if first.unique is None or second.unique is None:
        return found
    assert first.exclusive is not None and second.exclusive is not None
    unique = [a - b for a, b in zip(first.unique, second.unique, strict=True)]
    exclusive = [a - b for a, b in zip(first.exclusive, second.exclusive, strict=True)]
    return found | {"ums": unique_difference(unique, exclusive, images // len(unique))}


def excess_by_pairs(rows: Sequence[Row], level: str) -> dict[tuple[str, str], Difference] | None:
    """Excess AMS of every row minus that of every later one, paired, in a headline band.

    Corrected together (`holm`). Rows that drew different numbers of images are paired on the first
    ones: image i of a seed starts from the same noise at any N_G. None where the rows cannot be
    paired: not the same seeds, no hits by image in the records, or a band without a threshold.
    """
    first = rows[0].records[0]["identity"]
    headline = first.get("similarity", {}).get("band_modes", [None])[0]
    if headline is None or not all(r.get("per_image") for row in rows for r in row.records):
        return None
    if any(sorted(row.seeds) != sorted(rows[0].seeds) for row in rows):
        return None
    common = min(row.images for row in rows)
    excess: dict[str, NDArray[np.int64]] = {}
    for row in rows:
        outcome = _outcome(row, headline, level, None, {}, headline)
        if outcome is None:
            return None
        steps = outcome.members.astype(np.int64) - outcome.heldout
        by_seed = steps.reshape(len(steps), len(row.seeds), row.images)[:, :, :common]
        excess[row.label] = by_seed.reshape(len(steps), -1)
    pairs = list(combinations(excess, 2))
    found = holm([excess_difference(excess[a], excess[b]) for a, b in pairs])
    return dict(zip(pairs, found, strict=True))
