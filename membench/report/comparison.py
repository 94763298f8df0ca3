"""What `membench compare` and `membench extracted` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from membench.report.table import new_table, percent, with_interval

_TITLES = {"ams": "AMS", "excess": "excess AMS (member minus held-out)", "ums": "UMS"}


def comparison(found: Mapping[str, Any]) -> RenderableType:
    """A table for each metric: difference, interval, p, p after Holm, verdict."""
    lines = found["comparisons"]
    at = "mean over guidance scales" if found["scale"] is None else f"scale {found['scale']:g}"
    seeds = ", ".join(map(str, found["seeds"]))
    head = (
        f"{found['dataset']} / {found['target']}, {found['mode']} bands, {at}: "
        f"{found['images']:,} paired images (seeds {seeds})"
    )
    parts: list[RenderableType] = [Text(head, style="bold")]
    for metric, title in _TITLES.items():
        mine = [line for line in lines if line["metric"] == metric]
        if not mine:
            continue
        table = new_table(f"{title}: method minus {mine[0]['baseline']}, % of images")
        table.add_column("band")
        table.add_column("method")
        table.add_column("difference [95 %]", justify="right")
        table.add_column("p", justify="right")
        table.add_column("p, Holm", justify="right")
        table.add_column("visible", justify="right", style="dim")
        table.add_column("verdict")
        for line in mine:
            table.add_row(
                line["band"],
                escape(line["method"]),
                with_interval(line["value"], line["interval"]),
                _p(line["p"]),
                _p(line["adjusted"]),
                percent(line["visible"]),
                escape(line["verdict"]),
            )
        parts += [Text(), table]
    count = len(lines) // max(1, len({line["metric"] for line in lines}))
    tests = sorted({line["test"] for line in lines})
    note = (
        f"Holm's correction over the {count} lines of a table; intervals are of one comparison. "
        f"visible: the smallest difference that would have been found in 80 % of cases. "
        f"Tests: {', '.join(tests)}."
    )
    return Group(*parts, Text(), Text(note, style="dim"))


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def extraction(found: Mapping[str, Any], top: int) -> RenderableType:
    """The most often extracted training images, and each class's share."""
    rows, groups = found["images"], found["groups"]
    head = (
        f"{found['title']}, {found['mode']} {found['band']} band: {len(rows):,} of "
        f"{found['n_members']:,} training images extracted"
    )
    parts: list[RenderableType] = [Text(head, style="bold"), Text()]
    if rows:
        counts = [key for key in rows[0] if key.startswith("count_at_")]
        table = new_table(f"The {min(top, len(rows))} most often extracted")
        shown = [key for key in ("member", "source_index", "label", "count") if key in rows[0]]
        for key in shown:
            table.add_column(key.replace("_", " "), justify="right")
        for key in counts:
            table.add_column(f"at {key.removeprefix('count_at_')}", justify="right", style="dim")
        table.add_column("best score", justify="right")
        table.add_column("in image", justify="right")
        for row in rows[:top]:
            place = f"{row['best_image']} at {row['best_at']:g}"
            cells = [str(row[key]) for key in (*shown, *counts)]
            table.add_row(*cells, f"{row['best_score']:.3f}", place)
        parts += [table, Text()]
    if groups:
        parts += [_groups(groups), Text()]
    return Group(*parts)


def _groups(groups: list[Mapping[str, Any]]) -> Table:
    table = new_table("By class, % of its members")
    table.add_column("class")
    table.add_column("members", justify="right")
    table.add_column("extracted [95 %]", justify="right")
    table.add_column("if uniform", justify="right", style="dim")
    table.add_column("matches", justify="right")
    for group in groups:
        table.add_row(
            escape(group["name"]),
            f"{group['members']:,}",
            with_interval(group["share"], group["interval"]),
            percent(group["expected"] / group["members"]),
            f"{group['matches']:,}",
        )
    return table
