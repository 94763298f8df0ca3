"""What a sweep found: one row for each cell, the missing ones with their reason, and boards."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from membench.errors import MembenchError
from membench.extraction import write_csv
from membench.files import read_json, write_json, writing
from membench.record import read_record
from membench.report.leaderboard import add, build
from membench.report.records import enters_board
from membench.report.table import MAIN_BAND
from membench.store import MANIFEST as ARTIFACT
from membench.sweep.folder import BOARD, SUMMARY, Sweep
from membench.sweep.tasks import CellPlan, Status

Row = dict[str, Any]


def rows(sweep: Sweep, statuses: Mapping[str, Status] | None = None) -> list[Row]:
    """One row for each cell, in the order of the file.

    state: that of its record's task, or `failed` for one that could not be planned; cause, reason,
    log: of the task that stands in its way, `task`. Scores are those of the main band in the first
    band mode, averaged over scales.
    """
    found = statuses or sweep.statuses()
    return [_row(sweep, cell, found) for cell in sweep.manifest.cells]


def _row(sweep: Sweep, cell: CellPlan, statuses: Mapping[str, Status]) -> Row:
    options = cell.options
    row: Row = {
        "title": cell.title,
        "method": options["method"],
        "parameters": ", ".join(f"{k}={v}" for k, v in options["settings"].items()),
        "dataset": options["dataset"],
        "target": options["target"],
        "seed": options["seed"],
        "state": "failed",
        "task": None,
        "cause": None,
        "reason": cell.failed,
        "log": list(cell.log),
        "id": cell.id,
        "record": None,
    }
    if cell.record is None and cell.waits is None:
        return row | {"cause": "error in code"}
    name = cell.record or cell.waits
    assert name is not None
    status = statuses[name]
    if cell.record is None and status.state not in ("failed", "skipped"):
        return row | {"state": "waiting", "reason": "its target is not trained yet"}
    row |= {"state": status.state, "reason": status.reason or None}
    if status.state == "done":
        return row | _scores(sweep, cell)
    culprit = _culprit(sweep, name, statuses)
    if culprit is not None:
        row |= {"task": culprit.task, "cause": culprit.cause and str(culprit.cause)}
        row |= {"log": list(culprit.last.log_tail) if culprit.last else []}
        if status.state == "skipped":
            row["reason"] = f"not run, because {status.reason}: {culprit.reason}"
    return row


def _culprit(sweep: Sweep, name: str, statuses: Mapping[str, Status]) -> Status | None:
    """The first failed task among one and all that it needs."""
    status = statuses[name]
    if status.state in ("failed", "stopped"):
        return status
    for need in sweep.tasks[name].needs:
        found = _culprit(sweep, need, statuses)
        if found is not None:
            return found
    return None


def _scores(sweep: Sweep, cell: CellPlan) -> Row:
    record = _record(sweep, cell)
    mode = record["identity"]["similarity"]["band_modes"][0]
    band = record["scores"]["average"]["bands"][mode][MAIN_BAND]
    return {
        "record": _path(cell),
        "band": f"{mode} {MAIN_BAND}",
        "ams": band["members"]["ams"],
        "ams_heldout": band["heldout"]["ams"],
        "ams_excess": band["excess"]["ams"],
        "ums": band["members"]["ums"],
        "unet_calls": record["cost"]["unet_calls"],
        "classifier_calls": record["cost"]["classifier_calls"],
        "seconds": record["cost"]["seconds"],
        "results_sha256": record["results_sha256"],
        "limited_by": "; ".join(record["limited_by"]),
    }


def _path(cell: CellPlan) -> str:
    return f"{cell.folder}/record.json"


def _record(sweep: Sweep, cell: CellPlan) -> dict[str, Any]:
    return read_record(sweep.results / _path(cell))


SCORES = ("record", "band", "ams", "ams_heldout", "ams_excess", "ums", "unet_calls",
          "classifier_calls", "seconds", "results_sha256", "limited_by")  # fmt: skip


def summarise(sweep: Sweep) -> Path:
    """Write `summary.json`, `summary.csv` and, of the records that may enter one, `board/`."""
    found = rows(sweep)
    boards = sweep.folder / BOARD
    entered = [r for r in _records(sweep, found) if enters_board(r)]
    with writing(sweep.folder):
        shutil.rmtree(boards, ignore_errors=True)  # a record of before may be gone
        for record in entered:
            add(record, boards)
        files = build(boards) if entered else []
        write_json(
            sweep.folder / f"{SUMMARY}.json",
            {
                "sweep": sweep.name,
                "created": sweep.manifest.created,
                "code": sweep.manifest.code,
                "cells": len(found),
                "done": sum(row["state"] == "done" for row in found),
                "model_calls": model_calls(sweep, found),
                "boards": [path.relative_to(sweep.folder).as_posix() for path in files],
                "rows": found,
            },
        )
        plain = [
            {k: v for k, v in row.items() if k not in ("title", "log")}
            | {k: row.get(k) for k in SCORES}
            for row in found
        ]
        write_csv(sweep.folder / f"{SUMMARY}.csv", plain)
    return sweep.folder / f"{SUMMARY}.json"


def model_calls(sweep: Sweep, found: Iterable[Row]) -> dict[str, Any]:
    """Model calls behind the finished records, from the bills of the artifacts.

    together: each artifact once; apart: what as many runs in folders of their own would take.
    """
    index = {
        path.name: path
        for kind in (sweep.results / "artifacts").glob("*")
        for path in kind.iterdir()
        if (path / ARTIFACT).is_file()
    }
    works: dict[str, dict[str, Any]] = {}
    apart = {"unet": 0, "classifier": 0}
    for record in _records(sweep, found):
        apart["unet"] += record["cost"]["unet_calls"]
        apart["classifier"] += record["cost"]["classifier_calls"]
        waiting = list(record["identity"]["artifacts"].values())
        while waiting:
            path = index.get(waiting.pop()[:32])
            if path is not None and path.name not in works:
                manifest = read_json(path / ARTIFACT)
                works[path.name] = manifest["work"]
                waiting += manifest["inputs"]
    together = {
        "unet": sum(work["unet_calls"] for work in works.values()),
        "classifier": sum(work["classifier_calls"] for work in works.values()),
    }
    return {"together": together, "apart": apart}


def _records(sweep: Sweep, found: Iterable[Row]) -> list[dict[str, Any]]:
    return [read_record(sweep.results / row["record"]) for row in found if row["record"]]


def collect(sweep: Sweep, boards: Path) -> tuple[list[Path], list[Row]]:
    """Verify the finished records, copy those that may enter beside `boards`, and build these.

    Returns the files written and the rows that are missing, with the reason.
    """
    from membench.verify import verify_any

    found = rows(sweep)
    missing = [row for row in found if row["state"] != "done"]
    written: list[Path] = []
    for row in found:
        if row["state"] != "done":
            continue
        record = verify_any(sweep.results / row["record"])
        if enters_board(record):
            written.append(add(record, boards))
        else:
            missing.append(row | {"reason": f"enters no board: {row['limited_by']}"})
    if written:
        written += build(boards)
    elif not missing:
        raise MembenchError(f"{sweep.name}: it has no cells")
    return written, missing
