"""Figures of boards and trainings: SVG, the same bytes for the same data and matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from membench.hashing import content_hash
from membench.report.records import Estimate, Row, Section
from membench.report.table import BANDS, MAIN_BAND, symbol

MEMBER, HELDOUT, LINE = "#0b62a4", "#8a8f96", "#c9ced4"
COLOURS = ("#4d4d4d", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_CURVE_POINTS = 60
_SIDES = {"members": "members", "heldout": "held-out (false matches)"}
_DOTS = (("members", MEMBER, MEMBER, -0.12), ("heldout", HELDOUT, "white", 0.12))


def method_points(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """AMS of members and of the held-out twin in the main band, per target and method."""
    return [
        {
            "title": section_name(section),
            "rows": [
                {
                    "label": row.label,
                    "members": _plain(row.band("calibrated", MAIN_BAND, "members")),
                    "heldout": _plain(row.band("calibrated", MAIN_BAND, "heldout")),
                }
                for row in section.rows
            ],
        }
        for section in sections
    ]


def curve_points(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """AMS against its threshold, averaged over seeds and scales where they share a grid."""
    panels = []
    for section in sections:
        curves = [{"label": row.label} | curve for row in section.rows if (curve := _curve(row))]
        bands = section.rows[0].scores()[0]["bands"]["calibrated"]
        marks = [bands[b].get("upper") or bands[b].get("lower") for b in BANDS]
        if curves:
            panels.append({
                "title": section_name(section),
                "curves": curves,
                "bands": [threshold for threshold in marks if threshold is not None],
                "symbol": symbol(section.rows[0].scores()[0]),
            })  # fmt: skip
    return panels


def section_name(section: Section) -> str:
    mitigation = section.identity.get("mitigation")
    return section.target + (f" with {_named(mitigation)}" if mitigation else "")


def _named(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)


def _plain(estimate: Estimate | None) -> list[float] | None:
    if estimate is None:
        return None
    return [round(v, 6) for v in (estimate.value, *(estimate.interval or ()))]


def _curve(row: Row) -> dict[str, Any] | None:
    curves = [row_scores.get("curve") for scale in row.scales for row_scores in row.scores(scale)]
    found = [curve for curve in curves if curve]
    if len(found) != len(curves) or any(c["threshold"] != found[0]["threshold"] for c in found):
        return None
    thresholds = found[0]["threshold"]
    step = max(1, -(-len(thresholds) // _CURVE_POINTS))
    keep = sorted({*range(0, len(thresholds), step), len(thresholds) - 1})
    mean = {
        side: [round(sum(c[side]["ams"][i] for c in found) / len(found), 6) for i in keep]
        for side in ("members", "heldout")
    }
    return {"threshold": [round(thresholds[i], 6) for i in keep]} | mean


def mark(points: list[dict[str, Any]]) -> str:
    """The line by which a figure says what it was drawn from, by whatever matplotlib."""
    return f"<!-- membench-data-sha256:{content_hash(points)} -->\n"


def draw_methods(panels: list[dict[str, Any]]) -> str:
    """Dots with 95 % intervals: members filled, the held-out twin hollow."""
    plt = new_pyplot()
    tallest = max(len(panel["rows"]) for panel in panels)
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, sharex=True,
        figsize=(7.2, 0.7 + len(panels) * (0.55 + 0.36 * tallest)), layout="constrained",
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        rows = panel["rows"]
        for y, row in enumerate(rows):
            for side, colour, face, shift in _DOTS:
                if row[side] is None:
                    continue
                value, *interval = (100 * v for v in row[side])
                if interval:
                    axis.plot(interval, [y + shift] * 2, color=colour, lw=1.8)
                axis.plot([value], [y + shift], "o", ms=6.5, color=colour, mfc=face, mew=1.6)
        axis.set_yticks(range(len(rows)), [short(row["label"]) for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(short(panel["title"]), loc="left", fontweight="bold")
        axis.grid(axis="x", color=LINE, lw=0.6)
        axis.tick_params(length=0)
    axes[-1, 0].set_xlim(left=min(0.0, axes[-1, 0].get_xlim()[0]))
    axes[-1, 0].set_xlabel("AMS at the calibrated mid band, % of generated images (95 % interval)")
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=colour, mfc=face, mew=1.6, label=_SIDES[side])
        for side, colour, face, _ in _DOTS
    ]
    axes[0, 0].legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False
    )
    return svg(figure, panels)


def draw_curves(panels: list[dict[str, Any]]) -> str:
    """AMS against the threshold: members solid, held-out dashed, calibrated bands dotted."""
    plt = new_pyplot()
    figure, axes = plt.subplots(
        1, len(panels), squeeze=False, sharey=True, figsize=(3.6 * len(panels) + 1.6, 3.6),
        layout="constrained",
    )  # fmt: skip
    colours: dict[str, str] = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in panel["curves"]:
            colour = colours.setdefault(curve["label"], COLOURS[len(colours) % len(COLOURS)])
            for side, style in (("members", "-"), ("heldout", "--")):
                ams = [100 * v for v in curve[side]]
                axis.plot(curve["threshold"], ams, style, color=colour, lw=1.4)
        for threshold in panel["bands"]:
            axis.axvline(threshold, color=HELDOUT, lw=0.8, ls=":")
        axis.set_title(short(panel["title"]), loc="left", fontweight="bold")
        axis.set_xlabel(f"threshold of {panel['symbol']}")
        axis.grid(color=LINE, lw=0.6)
        axis.set_ylim(-2, 102)
    axes[0, 0].set_ylabel("AMS, % of generated images")
    lines = [plt.Line2D([], [], color=c, label=short(name)) for name, c in colours.items()]
    styles = [
        plt.Line2D([], [], color="black", ls=style, label=_SIDES[side])
        for side, style in (("members", "-"), ("heldout", "--"))
    ]
    bands = plt.Line2D([], [], color=HELDOUT, ls=":", label="calibrated bands")
    figure.legend(handles=[*lines, *styles, bands], loc="outside right upper", frameon=False)
    return svg(figure, panels)


def draw_training(curve: Sequence[dict[str, float]], title: str) -> str:
    """Losses, distance to the nearest image, and memorised share over a training.

    curve: one point per evaluation, as `membench.training.memorised_share` and the trainer give it.
    """
    plt = new_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
    steps = [point["step"] for point in curve]
    if all("noise_loss_members" in point for point in curve):
        for side, colour in (("members", MEMBER), ("heldout", HELDOUT)):
            losses = [point[f"noise_loss_{side}"] for point in curve]
            axes[0].plot(steps, losses, ".-", color=colour)
        axes[0].set_title(f"{short(title)}: noise loss", loc="left")
    else:  # trained before the noise loss of both sides was kept
        axes[0].plot(steps, [point["loss"] for point in curve], ".-", color=MEMBER)
        axes[0].set_title(f"{short(title)}: training loss", loc="left")
    for axis, key, factor, text in (
        (axes[1], "rmse", 1, "RMSE to the nearest image, median"),
        (axes[2], "l2_ratio", 100, "d1/d2 < 1/3, % of samples"),
    ):
        for side, colour in (("members", MEMBER), ("heldout", HELDOUT)):
            values = [factor * point[f"{key}_{side}"] for point in curve]
            axis.plot(steps, values, ".-", color=colour, label=_SIDES[side].partition(" (")[0])
        axis.set_title(text, loc="left")
    axes[2].legend(frameon=False, loc="upper left")
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(color=LINE, lw=0.6)
    return svg(figure, [])


def short(text: str) -> str:
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= 40 else clean[:39] + "…"


def new_pyplot() -> Any:
    """pyplot in the house style, whatever the user's configuration."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update({
        "svg.hashsalt": "membench", "svg.fonttype": "path", "text.parse_math": False,
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.edgecolor": LINE, "axes.axisbelow": True,
    })  # fmt: skip
    return plt


def svg(figure: Any, points: list[dict[str, Any]]) -> str:
    """The figure as SVG without dates or names, closed, with the mark of its data."""
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    plt.close(figure)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n" + mark(points)
