"""Extraction against the number of classes or clusters (SIDE, "impact of the classifier")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from membench.errors import MembenchError
from membench.experiments.common import Result, Setting, facts, known_published, run_all, title
from membench.experiments.figures import draw_classes
from membench.metrics.regression import LinearFit, linear_fit
from membench.run import Cell
from membench.similarity.measures import LEVELS

NAME = "classes"
VALUES = (2, 5, 10, 20, 40, 70, 100, 150, 200)
METRICS = ("ams", "ums")


def cells(
    setting: Setting, parameter: str, values: Sequence[int], scales: tuple[float, ...] | None
) -> list[list[Cell]]:
    """For each value of the method's parameter, one cell for each seed."""
    found = [setting.cells(scales, {parameter: str(value)}) for value in values]
    if found[0][0].surrogate is None:
        raise MembenchError(f"--method {setting.method}: it has no classifier")
    return found


def classes(
    prepared: Sequence[Sequence[Cell]], parameter: str, mode: str, beside: str | None = None
) -> Result:
    """AMS and UMS, mean over guidance scales, against the classes the classifier tells apart.

    Every cell (value and seed) is a point; each band of a mode gets its own line. What counts is
    the number of classes the classifier has in the end, not what the parameter asked for.
    """
    rows: list[dict[str, Any]] = []
    records: list[Mapping[str, Any]] = []
    for group in prepared:
        row = run_all(group)
        records += row.records
        for cell, record in zip(group, row.records, strict=True):
            rows += _lines(cell, record, parameter)
    fits = {
        f"{metric}_{level}": fit
        for metric in METRICS
        for level in LEVELS
        if (fit := _fit(rows, mode, level, metric)) is not None
    }
    printed = known_published("classes_regression", beside, prepared[0][0].card.name)
    every = [cell for group in prepared for cell in group]
    made_of = facts(every, records) | {
        "experiment": NAME,
        "parameter": parameter,
        "mode": mode,
        "guidance_scales": list(every[0].images),
        "fits": {name: asdict(fit) for name, fit in fits.items()},
        "published": printed,
    }
    figure = draw_classes(rows, fits, mode, title(every), parameter)
    return Result(NAME, rows, figure, made_of, _reading(fits, mode, printed))


def _lines(cell: Cell, record: Mapping[str, Any], parameter: str) -> list[dict[str, Any]]:
    assert cell.surrogate is not None
    classifier = cell.lab.store.get(cell.surrogate.classifier)
    average = record["scores"]["average"]
    lines = []
    for mode, bands in average["bands"].items():
        for level in LEVELS:
            line: dict[str, Any] = {
                "parameter": parameter,
                "value": cell.spec.parameters[parameter],
                "classes": classifier.n_labels,
                "seed": cell.spec.seed,
                "mode": mode,
                "band": level,
                "images": average["n_images"],
                "scales": average["n_scales"],
            }
            for metric in METRICS:
                for side in ("members", "heldout", "excess"):
                    part = bands[level][side]
                    low, high = part[f"{metric}_interval"] or (None, None)
                    line |= {f"{metric}_{side}": part[metric]}
                    line |= {f"{metric}_{side}_low": low, f"{metric}_{side}_high": high}
            lines.append(line)
    return lines


def _fit(rows: Sequence[dict[str, Any]], mode: str, level: str, metric: str) -> LinearFit | None:
    points = [
        (row["classes"], row[f"{metric}_members"])
        for row in rows
        if row["mode"] == mode and row["band"] == level and row[f"{metric}_members"] is not None
    ]
    if not points:
        return None
    x, y = np.array(points, np.float64).T
    return linear_fit(x, y)


def _reading(fits: dict[str, LinearFit], mode: str, printed: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    for name, fit in fits.items():
        metric, level = name.split("_")
        low, high = fit.coefficient_interval
        lines.append(
            f"{metric.upper()} {mode} {level}: coefficient {fit.coefficient:.2g} "
            f"[{low:.2g}, {high:.2g}], intercept {fit.intercept:.3f}, R2 {fit.r_squared:.2f}, "
            f"correlation {fit.correlation:.2f}, p {fit.p:.3f} ({fit.n} points)"
        )
    lines += [
        f"published, {row['dataset']}: {row['relationship']}: coefficient {row['coefficient']}, "
        f"intercept {row['intercept']}, R2 {row['r_squared']}, correlation {row['correlation']}"
        for row in printed
    ]
    return lines
