"""Figures of the experiments, in the style of the boards' (`membench.report.figures`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from membench.metrics.regression import LinearFit
from membench.report.figures import HELDOUT, LINE, MEMBER, new_pyplot, svg
from membench.similarity.measures import LEVELS, Measure

_LEVEL_COLOURS = dict(zip(LEVELS, ("#56b4e9", MEMBER, "#cc79a7"), strict=True))
_TOP_COLOURS = ("#cc79a7", MEMBER, "#009e73")
_PUBLISHED = "#d55e00"
_EXTRAPOLATED = "#009e73"


def rounded(value: Any) -> Any:
    """Numbers as they are drawn: six digits are more than a figure shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def compact(figure: Any, points: list[Any]) -> str:
    """A figure as SVG in half the bytes: coordinates to a hundredth of a point, no indentation."""

    def shorter(found: re.Match[str]) -> str:
        digits = 1 if found[0].startswith("translate") else 2
        return re.sub(r"-?\d+\.\d{3,}", lambda x: f"{float(x[0]):.{digits}f}", found[0])

    *lines, mark = svg(figure, points).splitlines()
    kept = (line for line in map(str.strip, lines) if not line.startswith("<!--"))
    text = "\n".join([*kept, mark, ""]).replace("DejaVuSans-", "g")
    return re.sub(r'(?<= d=")[^"]+|(?<= [xy]=")[^"]+|translate\([^)]*\)', shorter, text)


def draw_guidance(
    rows: Sequence[Mapping[str, Any]],
    mode: str,
    level: str,
    measure: Measure,
    top: Sequence[str],
    title: str,
    printed: Sequence[Mapping[str, str]],
) -> str:
    """AMS, UMS and top-percent means against the guidance scale; below them a published sweep."""
    plt = new_pyplot()
    mine = [row for row in rows if (row["mode"], row["band"]) == (mode, level)]
    scales = [row["guidance_scale"] for row in mine]
    figure, axes = plt.subplots(
        2 if printed else 1, 3, squeeze=False, figsize=(10.5, 6.2 if printed else 3.4),
        layout="constrained",
    )  # fmt: skip
    for axis, metric in zip(axes[0], ("ams", "ums"), strict=False):
        for side, colour, style in (("members", MEMBER, "-"), ("heldout", HELDOUT, "--")):
            known = [row for row in mine if row[f"{metric}_{side}"] is not None]
            at = [row["guidance_scale"] for row in known]
            y, low, high = (
                [100 * row[f"{metric}_{side}{end}"] for row in known]
                for end in ("", "_low", "_high")
            )
            axis.fill_between(at, low, high, color=colour, alpha=0.18, lw=0)
            axis.plot(at, y, style, marker="o", ms=3.5, color=colour, label=_side(side))
        axis.set_title(f"{metric.upper()}, {mode} {level}, %", loc="left")
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    for x, colour in zip(top, _TOP_COLOURS, strict=True):
        for side, style in (("members", "-"), ("heldout", "--")):
            values = [row[f"top_{x}_{side}"] for row in mine]
            label = f"nearest {x} %" if side == "members" else None
            axes[0, 2].plot(scales, values, style, marker="o", ms=3, color=colour, label=label)
    axes[0, 2].set_title(f"mean {measure.symbol} of the nearest; dashed: held-out", loc="left")
    low, high = axes[0, 2].get_ylim()
    axes[0, 2].set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    axes[0, 2].legend(frameon=False, loc="upper left")
    for axis in axes[0]:
        _scale_axis(axis, scales)
    if printed:
        _draw_published(axes[1], printed)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return compact(figure, rounded([*mine, *printed]))


def _side(name: str) -> str:
    return "members" if name == "members" else "held-out (false matches)"


def _scale_axis(axis: Any, scales: Sequence[float]) -> None:
    """Linear, or logarithmic with a place for 0 where the scales span more than two decades."""
    positive = [s for s in scales if s > 0]
    if positive and max(positive) / min(positive) > 60:
        axis.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axis.set_xlim(-0.2 * min(positive), 1.3 * max(scales))
        ticks = [s for s in scales if s == 0 or f"{s:e}"[0] in "13"]
        axis.set_xticks(ticks, [f"{s:g}" for s in ticks])
        axis.minorticks_off()
    axis.locator_params(axis="y", nbins=5)
    axis.set_xlabel("guidance scale")
    axis.grid(color=LINE, lw=0.6)
    axis.tick_params(length=0)


def _draw_published(axes: Sequence[Any], printed: Sequence[Mapping[str, str]]) -> None:
    scales = [float(row["guidance_scale"]) for row in printed]
    names = (("ams_mid_percent", "AMS mid, %"), ("ums_mid_percent", "UMS mid, %"))
    for axis, (key, title) in zip(axes, names, strict=False):
        axis.plot(scales, [float(row[key]) for row in printed], color=_PUBLISHED)
        axis.set_title(f"published, {printed[0]['dataset']}: {title}", loc="left")
        axis.set_ylim(bottom=0)
    for key, colour in zip(("top_1", "top_5", "top_10"), _TOP_COLOURS, strict=True):
        label = f"nearest {key.removeprefix('top_')} %"
        values = [float(row[key]) for row in printed]
        axes[2].plot(scales, values, color=colour, label=label)
    axes[2].set_title(f"published, {printed[0]['dataset']}: mean SSCD", loc="left")
    for axis in axes:
        _scale_axis(axis, [])


def draw_unique(rows: Sequence[Mapping[str, Any]], made_of: Mapping[str, Any], title: str) -> str:
    """Unique matches and UMS against the number of images; extrapolation dashed."""
    plt = new_pyplot()
    inside = [row for row in rows if row["kind"] == "measured"]
    beyond = [row for row in rows if row["kind"] == "extrapolated"]
    bands = ((inside, "rarefied", MEMBER), (beyond, "good_toulmin", _EXTRAPOLATED))
    lines = (
        (inside, "rarefied", "-", MEMBER, "exact rarefaction, 95 % of subsets"),
        (inside, "measured", ".", "#4d4d4d", "measured, first n"),
        ([*inside, *beyond], "with_replacement", ":", _PUBLISHED, "the papers' formula"),
        (beyond, "good_toulmin", "--", _EXTRAPOLATED, "extrapolated: Good-Toulmin, 95 %"),
        (beyond, "chao", "--", MEMBER, "extrapolated: Chao"),
        (inside, "rarefied_heldout", "-", HELDOUT, "held-out (false matches)"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for axis, share in zip(axes, (False, True), strict=True):
        for part, key, colour in bands:
            low, high = (_per_image(part, f"{key}_{end}", share) for end in ("low", "high"))
            axis.fill_between(_images(part), low, high, color=colour, alpha=0.18, lw=0)
        for part, key, style, colour, label in lines:
            axis.plot(_images(part), _per_image(part, key, share), style, color=colour, label=label)
        axis.axvline(inside[-1]["images"], color=LINE, lw=1)
        axis.set_xlabel("images N_G")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(color=LINE, lw=0.6)
        axis.tick_params(length=0)
    axes[0].set_title(f"unique matches, of {made_of['n_members']:,} training images", loc="left")
    axes[1].set_title("UMS, % of images", loc="left")
    axes[1].legend(frameon=False, loc="upper right")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return compact(figure, rounded([*rows, made_of]))


def _images(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["images"] for row in rows]


def _per_image(rows: Sequence[Mapping[str, Any]], key: str, share: bool) -> list[float]:
    """Numbers of unique matches, or % of the images if `share`."""
    return [row[key] * (100 / row["images"] if share else 1) for row in rows]


def draw_classes(
    rows: Sequence[Mapping[str, Any]],
    fits: Mapping[str, LinearFit],
    mode: str,
    title: str,
    parameter: str,
) -> str:
    """AMS and UMS against the number of classes, with the line of each band and its 95 % band."""
    plt = new_pyplot()
    mine = [row for row in rows if row["mode"] == mode]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    for axis, metric in zip(axes, ("ams", "ums"), strict=True):
        for level in LEVELS:
            fit = fits.get(f"{metric}_{level}")
            part = [row for row in mine if row["band"] == level]
            colour = _LEVEL_COLOURS[level]
            if fit is None:
                continue
            for row in part:
                ends = [100 * row[f"{metric}_members_{end}"] for end in ("low", "high")]
                axis.plot([row["classes"]] * 2, ends, color=colour, lw=1, alpha=0.6)
            x = [row["classes"] for row in part]
            axis.plot(x, [100 * row[f"{metric}_members"] for row in part], "o", ms=4, color=colour)
            line = [min(x), max(x)]
            label = f"{level}: {_signed(100 * fit.coefficient)} % a class, R² {fit.r_squared:.2f}"
            y = [100 * (fit.intercept + fit.coefficient * value) for value in line]
            axis.plot(line, y, color=colour, label=label)
        axis.set_title(f"{metric.upper()}, {mode} bands, %", loc="left")
        axis.set_xlabel(f"classes of the classifier ({parameter})")
        axis.set_ylim(bottom=0)
        top = axis.get_ylim()[1]
        axis.set_ylim(0, top * 1.28)  # room for the legend
        axis.grid(color=LINE, lw=0.6)
        axis.tick_params(length=0)
        axis.legend(frameon=False, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    data: list[Any] = [*mine, {name: vars(fit) for name, fit in fits.items()}]
    return compact(figure, rounded(data))


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
