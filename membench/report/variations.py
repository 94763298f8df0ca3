"""A calibration for people: what real images score, and what moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from membench.report.figures import COLOURS, LINE, new_pyplot, svg
from membench.report.markdown import escaped, table
from membench.report.table import BANDS, percent
from membench.similarity.measures import MEASURES, Measure

Record = Mapping[str, Any]
LEVELS = {"low": "5 %", "mid": "1 %", "high": "0.2 %"}


def headers(record: Record) -> list[str]:
    """Columns of the table of variations: rates of the fixed bands, then thresholds."""
    first = record["results"][0]
    (mode,) = list(first["null"]["bands"])[:1]
    symbol = _measure(first).symbol
    bands = [_bounds(first["null"]["bands"][mode][band]) for band in BANDS]
    rates = [f"{100 * first['calibration']['thresholds'][band]['rate']:g} %" for band in BANDS]
    return [
        "what is scored",
        *(f"{symbol} {bound}, %" for bound in bands),
        *(f"{symbol} at {rate}" for rate in rates),
        "images",
        "members",
    ]


def rows(record: Record) -> list[list[str]]:
    """One line a variation: false-match rates [95 %] and thresholds [95 %]."""
    found = []
    for result in record["results"]:
        calibration = result["calibration"]
        (mode,) = list(result["null"]["bands"])[:1]
        bands = result["null"]["bands"][mode]
        found.append([
            result["name"],
            *(_rate(bands[band]) for band in BANDS),
            *(_threshold(calibration["thresholds"][band]) for band in BANDS),
            f"{calibration['n_heldout']:,}",
            f"{calibration['n_members']:,}",
        ])  # fmt: skip
    return found


def sentence(record: Record) -> str:
    """What the first line means for whoever reads published figures."""
    first = record["results"][0]
    (mode,) = list(first["null"]["bands"])[:1]
    bands = first["null"]["bands"][mode]
    rates = " / ".join(percent(bands[band]["rate"]) for band in BANDS)
    dropped = first["near_duplicates"]
    return (
        f"{rates} % of {first['calibration']['n_heldout']:,} real images that nobody trained on "
        f"fall into the papers' low, mid and high band ({mode}) of "
        f"{first['calibration']['n_members']:,} members: an AMS of that size is what chance gives. "
        f"Left out before: {dropped['heldout_of_members']} near-duplicates of members"
        + (
            f" and {dropped['shared_labels']} images that share a member's label"
            if dropped["shared_labels"]
            else ""
        )
        + f"; {dropped['members']} members have a near-duplicate among the members."
    )


def report(record: Record) -> RenderableType:
    """The table that ends `membench calibrate`; intervals are in the record and on the board."""
    identity = record["identity"]
    found = Table(
        title=f"Real held-out images of {identity['dataset']['name']} against its members",
        title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
    )  # fmt: skip
    names = headers(record)
    kept = [number for number, name in enumerate(names) if name not in ("images", "members")]
    for number in kept:
        found.add_column(names[number], justify="right" if number else "left", no_wrap=not number)
    group = ""
    for result, row in zip(record["results"], rows(record), strict=True):
        if result["group"] != group:
            found.add_section()
            group = result["group"]
        plain = [cell.partition(" [")[0] for cell in row]  # intervals: the record has them
        found.add_row(*(escape(plain[number]) for number in kept))
    return Group(found, Text(), Text(sentence(record), style="bold"))


def markdown(record: Record) -> list[str]:
    """The same as Markdown, for the head of a board."""
    described = record["identity"]["similarity"]
    choice = described.get("descriptor")
    how = (
        "normalised L2 of pixels"
        if choice is None
        else f"SSCD by {escaped(choice['name'])}, "
        f"{escaped(choice.get('preset') or choice.get('input_size') or 'its own preset')}"
    )
    cells = [[escaped(cell) for cell in row] for row in rows(record)]
    return [
        "## What chance gives, and what moves it",
        f"{sentence(record)} Similarity: {how}. Rates in percent with 95 % intervals; "
        "thresholds are the scores that 5, 1 and 0.2 % of the images reach.",
        table([escaped(header) for header in headers(record)], cells),
    ]


def draw_calibration(record: Record) -> str:
    """SVG: false-match rate against the threshold, a panel for each kind of variation."""
    results: Sequence[Record] = record["results"]
    first = results[0]
    measure = _measure(first)
    groups = sorted({result["group"] for result in results if result["group"]}) or [""]
    plt = new_pyplot()
    figure, axes = plt.subplots(
        1, len(groups), squeeze=False, sharey=True, figsize=(2.9 * len(groups) + 0.8, 3.4),
        layout="constrained",
    )  # fmt: skip
    points = []
    for axis, group in zip(axes[0], groups, strict=True):
        shown = [first, *(r for r in results if group and r["group"] == group)]
        for number, result in enumerate(shown):
            curve = result["null"]["curve"]
            rates = [100 * rate for rate in curve["rate"]]
            axis.plot(
                curve["threshold"], rates, lw=1.8 if not number else 1.2,
                color=COLOURS[number % len(COLOURS)], label=result["name"],
            )  # fmt: skip
            points.append({"name": result["name"], "rate": curve["rate"]})
        for threshold in measure.thresholds.values():
            axis.axvline(threshold, color=LINE, lw=1, ls=":")
        axis.set_title(group or "as the card says", loc="left", fontweight="bold")
        axis.set_xlabel(f"threshold of {measure.symbol}")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 5, 10, 50, 100], ["0", "1", "5", "10", "50", "100"])
        axis.set_ylim(0, 105)
        axis.grid(color=LINE, lw=0.5)
        axis.legend(frameon=False, fontsize=7, loc="best")
        if measure.sign == -1:
            axis.invert_xaxis()
    axes[0, 0].set_ylabel("real held-out images that match, %")
    return svg(figure, points)


def _measure(result: Record) -> Measure:
    return MEASURES[result["calibration"]["measure"]]


def _bounds(band: Record) -> str:
    lower, upper = band["lower"], band["upper"]
    if lower is not None and upper is not None:
        return f"{lower:g}–{upper:g}"
    return f"≤ {upper:g}" if lower is None else f"≥ {lower:g}"


def _rate(band: Record) -> str:
    low, high = (percent(end, 2 if band["rate"] < 0.01 else 1) for end in band["interval"])
    return f"{percent(band['rate'], 2 if band['rate'] < 0.01 else 1)} [{low}, {high}]"


def _threshold(found: Record) -> str:
    if found["value"] is None:
        return "–"
    low, high = ("–" if end is None else f"{end:.3f}" for end in found["interval"])
    return f"{found['value']:.3f} [{low}, {high}]"
