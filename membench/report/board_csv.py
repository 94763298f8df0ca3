"""The board as CSV: every number of a data set, shares (not percent), for whoever computes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from membench.report.cells import device
from membench.report.ranking import Ranked
from membench.report.records import SIDES, Row
from membench.report.table import modes

_FIGURES = [(metric, side) for metric in ("ams", "ums") for side in SIDES]
_COSTS = ("unet_calls", "classifier_calls", "seconds")


def csv_text(dataset: str, found: Sequence[Ranked]) -> str:
    """One line per target, method, scale (or `average`), mode and band.

    Rank, top-percent means, cost and date belong to the average over scales and stand in its lines.
    """
    header = ["dataset", "revision", "target", "mitigation", "method", "seeds",
              "images_per_scale", "scale", "mode", "band", "lower", "upper"]  # fmt: skip
    for metric, side in _FIGURES:
        header += [f"{metric}_{side}{end}" for end in ("", "_lower", "_upper", "_least", "_most")]
    shares = sorted({x for ranked in found for row in ranked.rows for x in _shares(row)}, key=float)
    header += ["ums_images", "rank", *(f"top_{x}_percent_{side}" for x in shares for side in SIDES)]
    header += [*_COSTS, "device", "peak_memory_bytes", "newest"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, "records"])
    for ranked in found:
        for row in ranked.rows:
            about = _about(row, shares)
            for scale in (None, *row.scales):
                for mode in modes(row.scores(scale)[0]):
                    for name, band in row.scores(scale)[0]["bands"][mode].items():
                        line = [_cell(dataset), *_place(ranked, row), scale or "average"]
                        line += [_cell(mode), _cell(name)]
                        line += [_float(band.get("lower")), _float(band["upper"])]
                        line += _figures(row, mode, name, scale)
                        ranking = ranked.by_band.get(name) if mode == "calibrated" else None
                        rank = ranking.rank(row.label) if ranking and scale is None else None
                        line += [row.ums_images or row.images, "" if rank is None else rank]
                        line += about if scale is None else [""] * len(about)
                        line.append(" ".join(record["id"][:12] for record in row.records))
                        writer.writerow(line)
    return out.getvalue()


def _place(ranked: Ranked, row: Row) -> list[Any]:
    section = ranked.section
    return [
        _cell(str(section.identity["dataset"].get("revision"))),
        _cell(section.target),
        _cell(section.mitigation or ""),
        _cell(row.label),
        " ".join(map(str, row.seeds)),
        row.images,
    ]


def _figures(row: Row, mode: str, band: str, scale: str | None) -> list[str]:
    cells: list[str] = []
    for metric, side in _FIGURES:
        e = row.band(mode, band, side, metric, scale)
        values = (e.value, e.lower, e.upper, e.least, e.most) if e else [None] * 5
        cells += map(_float, values)
    return cells


def _shares(row: Row) -> list[str]:
    return list(row.scores()[0].get("top_percent", {}).get("members", {}))


def _about(row: Row, shares: Sequence[str]) -> list[Any]:
    """Top-percent means, cost of a run (mean; the highest peak), and the newest run's date."""
    cells: list[Any] = []
    for x in shares:
        for side in SIDES:
            found = row.plain("top_percent", side, x)
            cells.append(_float(found.value if found else None))
    costs = [record["cost"] for record in row.records]
    cells += [_float(sum(c.get(key, 0) for c in costs) / len(costs)) for key in _COSTS]
    cells += [_cell(device(row)), max(cost.get("peak_memory_bytes", 0) for cost in costs)]
    return [*cells, _cell(max(record["provenance"]["finished"] for record in row.records))]


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"'{clean}" if clean[:1] in set("=+-@") else clean


def _float(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.6g}"
