"""Cells of Markdown tables: percents, intervals, counts, and names that cannot do anything."""

from __future__ import annotations

from collections.abc import Sequence

from membench.report.markdown import escaped
from membench.report.records import Estimate, Row
from membench.report.table import percent


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def bold_names(names: Sequence[str]) -> str:
    return ", ".join(f"**{escaped(name)}**" for name in names)


def code_text(text: str) -> str:
    """Text for a code span: nothing in it can end the span."""
    return "".join(c if c.isalnum() or c in "_-:. " else "?" for c in text)[:80] or "?"


def n_g(row: Row) -> str:
    """`512 × 2 × 3`: images per scale, scales, seeds."""
    return f"{row.images} × {len(row.scales)} × {len(row.records)}"


def percent_cell(estimate: Estimate | None) -> str:
    return percent(None if estimate is None else estimate.value)


def score_cell(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f}"


def bracketed(estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None:
        return percent_cell(estimate)
    lower, upper = (percent(bound) for bound in estimate.interval)
    return f"{percent(estimate.value)} \\[{lower}, {upper}\\]"


def seed_range(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{percent(estimate.least)}–{percent(estimate.most)}"


def seconds(row: Row) -> str:
    """`178 CPU`: mean of a run, and on what."""
    found = [record["cost"]["seconds"] for record in row.records]
    return f"{sum(found) / len(found):,.0f}" + f" {escaped(device(row))}".rstrip()


def device(row: Row) -> str:
    """`CPU`, `CUDA`, ...; empty where the records do not say."""
    found = {str((r["identity"].get("compute") or {}).get("device", "")) for r in row.records}
    return " ".join(sorted(name.upper() for name in found if name))


def newest(row: Row) -> str:
    """Date of the newest run."""
    return escaped(max(record["provenance"]["finished"] for record in row.records)[:10])
