"""What the charts of the site show: plain numbers by series, in percent, for its script to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from membench.report.figures import curve_points
from membench.report.html import Markup, data_block, el
from membench.report.ranking import Ranked
from membench.report.rarefied import rarefaction_curve
from membench.report.records import Record, Row
from membench.report.table import BANDS, MAIN_BAND, symbol
from membench.similarity.measures import MEASURES

SIDES = (("members", "members"), ("heldout", "held-out"))
Chart = dict[str, Any]


def figure(chart: Chart, note: str) -> Markup:
    """A chart's place on a page; without a script its title and its note are left."""
    return el(
        "figure",
        el("h3", chart["title"]),
        el("figcaption", note),
        el("div", class_="plot"),
        data_block(chart),
        class_="chart",
    )


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(100 * value, 4) for value in values]


def _series(name: str, side: str, x: Sequence[float], y: Sequence[float | None]) -> Chart:
    return {"name": name, "side": side, "x": list(x), "y": _percent(y)}


def threshold_chart(ranked: Ranked) -> Chart | None:
    """AMS against the threshold, members beside held-out, of every method."""
    panels = curve_points([ranked.section])
    if not panels:
        return None
    (panel,) = panels
    series = [
        _series(curve["label"], side, curve["threshold"], curve[key])
        for curve in panel["curves"]
        for key, side in SIDES
    ]
    of = symbol(ranked.rows[0].scores()[0])
    return {
        "title": "AMS against the threshold",
        "x": f"threshold of {of}",
        "series": series,
        "marks": [
            {"at": at, "name": name, "row": row}
            for row, (name, at) in enumerate(zip(BANDS, panel["bands"], strict=False))
        ],
        "top": 100,
        "reverse": any(m.symbol == of and m.sign == -1 for m in MEASURES.values()),
    }


def images_chart(ranked: Ranked, band: str = MAIN_BAND) -> Chart | None:
    """UMS against the number of images, exact rarefaction, mean over seeds and scales."""
    series = []
    for row in ranked.rows:
        for key, side in SIDES:
            curves = [rarefaction_curve(record, band, key) for record in row.records]
            kept = [dict(curve) for curve in curves if curve is not None]
            if len(kept) < len(curves) or not kept:
                continue
            sizes = sorted(kept[0])
            mean = [sum(curve[n] for curve in kept) / len(kept) for n in sizes]
            series.append(_series(row.label, side, sizes, mean))
    if not series:
        return None
    return {
        "title": f"UMS against the number of images, {band} band",
        "x": "images drawn (one seed and scale)",
        "x_digits": 0,
        "series": series,
    }


def guidance_chart(rows: Sequence[Row], band: str = MAIN_BAND) -> Chart | None:
    """Excess AMS against the guidance scale, with its intervals."""
    series = []
    for row in rows:
        found = [row.band("calibrated", band, "excess", "ams", scale) for scale in row.scales]
        if any(e is None for e in found):
            continue
        kept = [e for e in found if e is not None]
        line = _series(row.label, "excess", [float(s) for s in row.scales], [e.value for e in kept])
        line["low"] = _percent([e.lower for e in kept])
        line["high"] = _percent([e.upper for e in kept])
        series.append(line)
    if not series or len({x for line in series for x in line["x"]}) < 2:
        return None
    return {
        "title": f"Excess AMS against the guidance scale, {band} band",
        "x": "guidance scale",
        "series": series,
        "dots": True,
    }


def record_charts(record: Record) -> list[tuple[Chart, str]]:
    """A run's own curves, each with what it says."""
    average = record["scores"]["average"]
    of = symbol(average)
    found: list[tuple[Chart, str]] = []
    curve = average.get("curve")
    if curve:
        series = [
            _series("AMS", side, curve["threshold"], curve[key]["ams"]) for key, side in SIDES
        ]
        null = (record.get("null") or {}).get("curve")
        if null and null["threshold"] == curve["threshold"]:
            series.append(_series("real images", "members", null["threshold"], null["rate"]))
        bands = average["bands"]["calibrated"]
        marks = [(b, bands[b].get("upper") or bands[b].get("lower")) for b in BANDS]
        found.append((
            {
                "title": "AMS against the threshold", "x": f"threshold of {of}", "series": series,
                "marks": [{"at": at, "name": b, "row": row}
                          for row, (b, at) in enumerate(marks) if at is not None],
                "top": 100,
                "reverse": any(m.symbol == of and m.sign == -1 for m in MEASURES.values()),
            },
            "How far members stand above held-out images is extraction. Real images: what those "
            "that nobody trained on reach against the members.",
        ))  # fmt: skip
    accuracy = ((record.get("attack") or {}).get("classifier") or {}).get("accuracy_by_timestep")
    if accuracy:
        found.append((
            _by_time("The classifier's accuracy by noise level", {"accuracy": accuracy}),
            "On held-back synthetic images at timestep t; a weak attack may be a weak classifier.",
        ))  # fmt: skip
    ratios: Mapping[str, Any] = (record.get("attack") or {}).get("guidance_ratio") or {}
    shown = {f"scale {scale}": ratio for scale, ratio in ratios.items() if ratio}
    if shown:
        found.append((
            _by_time("Strength of the guidance by noise level", shown),
            "Norm of the guidance in percent of the norm of eps, mean over images.",
        ))  # fmt: skip
    return found


def _by_time(title: str, lines: Mapping[str, Mapping[str, float]]) -> Chart:
    series = []
    for name, values in lines.items():
        times = sorted(values, key=int)
        series.append(_series(name, "", [int(t) for t in times], [values[t] for t in times]))
    return {"title": title, "x": "timestep t", "x_digits": 0, "series": series, "dots": True}
