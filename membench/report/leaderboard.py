"""Boards: generated from committed records and from nothing else.

`leaderboards/records/DATASET/*.json` -> `leaderboards/DATASET.md`, `.csv` and figures, and the
summary of all of them in `leaderboards/README.md`. Figures in `leaderboards/published/DATASET.csv`
(`source,method,band,ams_percent,ums_percent`) stand beside ours, unranked; divergences in
`leaderboards/divergence/DATASET/*.json` and calibrations in `leaderboards/calibrations/` too.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from membench.errors import MembenchError
from membench.files import write_json, writing
from membench.hashing import canonical_json
from membench.record import read_calibration, read_divergence, read_record
from membench.report.board import COMMAND, GENERATED, RECORDS, board, chance, published_part
from membench.report.markdown import escaped
from membench.report.ranking import Ranked, rank_section
from membench.report.records import Record, enters_board, load_records, sections
from membench.report.summary import NAME as SUMMARY
from membench.report.summary import summary
from membench.report.variations import draw_calibration

PUBLISHED, CALIBRATIONS, DIVERGENCES = "published", "calibrations", "divergence"


def build(folder: Path) -> list[Path]:
    """Write every board of `folder` from `folder/records`; returns the files, boards of data sets
    that have no records any more removed."""
    files = render(folder)
    for path in _boards(folder):
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in files]


def add(record: Record, folder: Path) -> Path:
    """Copy a verified record beside the boards; one already there is left as it is.

    Raises `MembenchError` for a limited or failed record: neither may enter a board.
    """
    if record.get("kind") == "calibration":
        return _add_calibration(record, folder)
    if not enters_board(record):
        why = "; ".join(map(str, record.get("limited_by") or ["limited or failed"]))
        raise MembenchError(f"record {record['id'][:12]} enters no board: {why}")
    identity = record["identity"]
    parts = (identity["target"]["name"], identity["method"]["name"], f"seed{identity['seed']}")
    name = "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in parts)
    dataset = str(identity["dataset"]["name"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", dataset):
        raise MembenchError(f"record {record['id'][:12]}: {dataset!r} is no name of a data set")
    path = folder / RECORDS / dataset / f"{name}-{record['id'][:12]}.json"
    if not path.exists():
        with writing(path.parent):
            write_json(path, record)
    elif read_record(path)["results_sha256"] != record["results_sha256"]:
        raise MembenchError(
            f"{path}: the same run with other results; delete that file if the new ones are right"
        )
    return path


def _add_calibration(record: Record, folder: Path) -> Path:
    """A calibration takes the place of the one its data set had."""
    name = str(record["identity"]["dataset"]["name"])
    path = folder / CALIBRATIONS / f"{name}.json"
    with writing(path.parent):
        write_json(path, record)
    return path


def check(folder: Path) -> int:
    """How many files `folder` holds, all being what `build` would write; else a `MembenchError`.

    Figures are compared by the data they were drawn from: another matplotlib draws other bytes.
    """
    files = render(folder, draw=False)
    for name, text in files.items():
        path = folder / name
        try:
            found = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise MembenchError(f"{path}: missing; run: {COMMAND}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise MembenchError(f"{path}: unreadable ({error}); run: {COMMAND}") from None
        same = text in found if name.endswith(".svg") else found == text
        if not same:
            raise MembenchError(f"{path}: stale, its records say otherwise; run: {COMMAND}")
    for path in _boards(folder):
        if path.name not in files:
            raise MembenchError(f"{path}: no record stands behind it; run: {COMMAND}")
    return len(files)


@dataclass(frozen=True)
class Material:
    """All that the boards are made of, by data set: read and checked, nothing computed."""

    records: dict[str, list[Record]]
    calibrations: dict[str, Record]
    divergences: dict[str, list[Record]]
    published: dict[str, list[dict[str, str]]]

    @property
    def datasets(self) -> list[str]:
        return sorted(self.records.keys() | self.calibrations.keys())

    def entering(self, dataset: str) -> list[Record]:
        """The whole, finished runs of a data set."""
        return [r for r in self.records.get(dataset, []) if enters_board(r)]

    def ranked(self) -> dict[str, list[Ranked]]:
        """The ranked sections of every data set that has runs."""
        found = {name: self.entering(name) for name in self.datasets}
        return {
            name: [rank_section(section) for section in sections(records)]
            for name, records in found.items()
            if records
        }


def gather(folder: Path, extra: Sequence[Record] = ()) -> Material:
    """What lies in a folder of boards; `extra` are records taken as if they lay there too."""
    records = load_records(folder / RECORDS)
    known = {record["id"] for found in records.values() for record in found}
    for record in extra:
        if record["id"] not in known:
            records.setdefault(str(record["identity"]["dataset"]["name"]), []).append(record)
    calibrations: dict[str, Record] = {
        path.stem: read_calibration(path) for path in sorted((folder / CALIBRATIONS).glob("*.json"))
    }
    divergences: dict[str, list[Record]] = {}
    for path in sorted((folder / DIVERGENCES).glob("*/*.json")):
        divergences.setdefault(path.parent.name, []).append(read_divergence(path))
    published = {
        name: _published(folder / PUBLISHED / f"{name}.csv")
        for name in records.keys() | calibrations.keys()
    }
    return Material(records, calibrations, divergences, published)


def render(folder: Path, *, draw: bool = True) -> dict[str, str]:
    """Name and text of every file that `folder/records` gives; see `board`."""
    files: dict[str, str] = {}
    found = gather(folder)
    for dataset in found.datasets:
        records, calibration = found.records.get(dataset, []), found.calibrations.get(dataset)
        if calibration is not None:
            figure = draw_calibration(calibration)
            files[f"{dataset}.calibration.svg"] = figure if draw else figure.splitlines()[-1] + "\n"
        published = found.published[dataset]
        if found.entering(dataset):
            files |= board(
                dataset, records, published, draw=draw, calibration=calibration,
                divergences=found.divergences.get(dataset, []),
            )  # fmt: skip
        elif calibration is not None:
            parts = [_bare_head(dataset), *chance(dataset, calibration)]
            parts += published_part(published) if published else []
            files[f"{dataset}.md"] = "\n\n".join(parts) + "\n"
    if files:
        bare = [name for name in found.calibrations if f"{name}.md" in files]
        files[SUMMARY] = summary(found.ranked(), bare)
    return files


def _bare_head(dataset: str) -> str:
    lines = [
        f"# {escaped(dataset)}: what chance gives",
        "",
        GENERATED,
        "",
        "No run of an extraction method has been published on this data set yet; this is what real "
        "images score that nobody trained on.",
    ]
    return "\n".join(lines)


def _boards(folder: Path) -> list[Path]:
    """The generated files that lie there: a board that says so, and what goes with it."""
    found = []
    for path in sorted(folder.glob("*.md")):
        if GENERATED in path.read_text(encoding="utf-8", errors="replace"):
            companions = (".csv", ".methods.svg", ".curves.svg", ".calibration.svg")
            found += [path, *(path.with_name(path.stem + end) for end in companions)]
    return [path for path in found if path.is_file()]


def _published(path: Path) -> list[dict[str, str]]:
    """Published figures of a data set, if there are any."""
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MembenchError(f"{path}: not a readable CSV file ({error})") from None
    needed = {"source", "method", "band", "ams_percent", "ums_percent"}
    for row in rows:
        if not needed <= row.keys() or any(row[key] is None for key in needed):
            raise MembenchError(f"{path}: every line needs {', '.join(sorted(needed))}")
    return sorted(rows, key=lambda row: canonical_json({k: row[k] for k in needed}))
