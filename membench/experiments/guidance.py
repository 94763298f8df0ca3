"""Extraction against the guidance scale (SIDE, "impact of the guidance scale")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from membench.errors import MembenchError
from membench.experiments.common import Result, Setting, facts, known_published, run_all, title
from membench.experiments.figures import draw_guidance
from membench.report.records import Estimate, Row
from membench.report.table import percent
from membench.run import Cell
from membench.similarity.measures import LEVELS

NAME = "guidance"
SCALES = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
TOP = ("1", "5", "10")
"""Top-percent means that the figure draws."""


def cells(setting: Setting, scales: Sequence[float]) -> list[Cell]:
    """One cell for each seed, with every scale of the sweep."""
    found = setting.cells(tuple(scales))
    if found[0].surrogate is None:
        raise MembenchError(f"--method {setting.method}: it has no guidance to sweep")
    return found


def guidance(prepared: Sequence[Cell], mode: str, level: str, beside: str | None = None) -> Result:
    """AMS, UMS and top-percent means at every scale, with held-out twin and intervals.

    Seeds are pooled. beside: a data set whose published sweep is drawn in panels of its own.
    """
    row = run_all(prepared)
    printed = known_published("guidance_scale_sweep", beside, prepared[0].card.name)
    rows = [line for scale in row.scales for line in _lines(row, scale)]
    measure = prepared[0].lab.matcher.measure
    made_of = facts(prepared, row.records) | {
        "experiment": NAME, "band": f"{mode}:{level}", "published": printed,
    }  # fmt: skip
    figure = draw_guidance(rows, mode, level, measure, TOP, title(prepared), printed)
    return Result(NAME, rows, figure, made_of, _reading(row, mode, level))


def _lines(row: Row, scale: str) -> list[dict[str, Any]]:
    """One flat line for each band at a scale; plain figures repeat in each."""
    scores = row.scores(scale)
    tops: dict[str, Any] = {}
    for x in scores[0]["top_percent"]["members"]:
        for side in ("members", "heldout"):
            values = [score["top_percent"][side][x] for score in scores]
            tops[f"top_{x}_{side}"] = sum(values) / len(values)
    lines = []
    for mode, bands in scores[0]["bands"].items():
        for level in LEVELS:
            line: dict[str, Any] = {
                "guidance_scale": float(scale), "mode": mode, "band": level,
                "lower": bands[level]["lower"], "upper": bands[level]["upper"],
                "images": scores[0]["n_images"], "seeds": len(scores),
            }  # fmt: skip
            for metric in ("ams", "ums"):
                for side in ("members", "heldout", "excess"):
                    found = row.band(mode, level, side, metric, scale)
                    line |= _estimate(f"{metric}_{side}", found)
            lines.append(line | tops)
    return lines


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    low, high = (found.interval or (None, None)) if found else (None, None)
    return {name: found.value if found else None, f"{name}_low": low, f"{name}_high": high}


def _reading(row: Row, mode: str, level: str) -> list[str]:
    """Where the sweep peaks, and whether that is beyond no guidance at all."""
    lines = []
    for metric, side in (("ams", "excess"), ("ums", "members")):
        found = {s: row.band(mode, level, side, metric, s) for s in row.scales}
        known = {s: e for s, e in found.items() if e is not None}
        if not known:
            lines.append(f"no {metric.upper()}: the {mode} {level} band has no threshold")
            continue
        best = max(known, key=lambda s: known[s].value)
        first, last = row.scales[0], row.scales[-1]
        label = "excess AMS" if side == "excess" else "UMS"
        text = f"{label}, {mode} {level}: highest at scale {best} ({_shown(known[best])} %)"
        if first in known and last in known:
            text += f"; {_shown(known[first])} % at {first}, {_shown(known[last])} % at {last}"
            if best != first and known[best].overlaps(known[first]):
                text += f"; the intervals at {best} and {first} overlap"
        lines.append(text)
    return lines


def _shown(found: Estimate) -> str:
    interval = found.interval
    bounds = "" if interval is None else f" [{percent(interval[0])}, {percent(interval[1])}]"
    return percent(found.value) + bounds
