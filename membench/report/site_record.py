"""The page of a record: its scores and curves, its cost, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from membench.report.html import Cell, Column, Markup, block, el, facts, table
from membench.report.records import Estimate, Record
from membench.report.site_charts import figure, record_charts
from membench.report.site_pages import Body, estimate_cell, number_cell, slug
from membench.report.table import BANDS, modes, reading, title


def record_page(record: Record, sheet: str | None) -> Body:
    """sheet: the contact sheet as a data address, where it may be shown."""
    identity, short = record["identity"], record["id"][:16]
    body: Body = [
        el("p", el("a", identity["dataset"]["name"],
                   href=f"../data/{slug(str(identity['dataset']['name']))}.html")),
        el("h1", title(record)),
        el("p", reading(record), class_="lead"),
        el("p", el("a", "The record as JSON", href=f"{short}.json")),
        el("h2", "Scores"),
        _scores(record),
        el("div", *(figure(chart, note) for chart, note in record_charts(record)),
           class_="charts"),
    ]  # fmt: skip
    if sheet is not None:
        alt = "The closest generated images, each beside the training image nearest to it"
        body += [
            el("h2", "The closest images"),
            el("p", "Left: generated; right: the training image nearest to it. The best cases, not "
               "typical ones. Shown because the data set's card permits it."),
            el("figure", el("img", src=sheet, alt=alt), class_="sheet"),
        ]  # fmt: skip
    return [*body, *_cost(record), *_provenance(record)]


def _scores(record: Record) -> Markup:
    columns = [Column("scale", text=True), Column("bands", text=True), Column("band", text=True),
               Column("AMS, %"), Column("held-out, %"), Column("excess AMS, %"), Column("UMS, %"),
               Column("held-out UMS, %"), Column("excess UMS, %")]  # fmt: skip
    scales = record["scores"]["scales"]
    parts = [(name, scales[name]) for name in sorted(scales, key=float)]
    parts.append(("mean", record["scores"]["average"]))
    rows = []
    for name, scores in parts[-1:] if len(parts) == 2 else parts:
        for mode in modes(scores):
            bands = scores["bands"][mode]
            for level in sorted(bands, key=lambda b: BANDS.index(b) if b in BANDS else len(BANDS)):
                band = bands[level]
                rows.append([
                    name, mode, level,
                    *(_of_band(band[side], metric, strong=(metric, side) == ("ams", "excess"))
                      for metric in ("ams", "ums") for side in ("members", "heldout", "excess")),
                ])  # fmt: skip
    return table(columns, rows, caption="Scores")


def _of_band(side: Mapping[str, Any], metric: str, strong: bool) -> Cell:
    value, interval = side[metric], side.get(f"{metric}_interval")
    if value is None:
        return Cell("–", "")
    low, high = interval if interval else (None, None)
    return estimate_cell(Estimate(value, low, high, value, value), strong=strong)


def _cost(record: Record) -> Body:
    cost = record["cost"]
    columns = [Column("stage", text=True), Column("U-Net calls"), Column("classifier calls"),
               Column("seconds"), Column("", text=True)]  # fmt: skip
    rows = [
        [s["stage"], number_cell(s["unet_calls"]), number_cell(s["classifier_calls"]),
         number_cell(s["seconds"], 1), "cached" if s["cached"] else ""]
        for s in cost["stages"]
    ]  # fmt: skip
    text = (
        f"{cost['unet_calls']:,} U-Net calls and {cost.get('classifier_calls', 0):,} classifier "
        f"calls in {cost['seconds']:,.0f} s; peak memory "
        f"{cost['peak_memory_bytes'] / 1e6:,.0f} MB. Shared stages are charged in full."
    )
    return [el("h2", "Cost"), el("p", text), table(columns, rows, caption="Cost", sortable=False)]


def _provenance(record: Record) -> Body:
    found = dict(record["provenance"])
    git = found.pop("git", None) or {}
    if git:
        dirty = " (with changes that were not committed)" if git.get("dirty") else ""
        found["git"] = f"{git.get('commit', '?')}{dirty}"
    pairs = [("record", el("code", record["id"])),
             ("results", el("code", record["results_sha256"]))]  # fmt: skip
    pairs += [(k.replace("_", " "), el("code", str(v)) if "sha256" in k else str(v))  # type: ignore[misc]
              for k, v in found.items()]  # fmt: skip
    files = [(name, el("code", sha)) for name, sha in record["files"].items()]
    return [
        el("h2", "Provenance"), facts(pairs),
        el("details", el("summary", "Files and their SHA-256"), facts(files)),
        el("details", el("summary", "Identity: everything that could change a number"),
           block(json.dumps(record["identity"], indent=1, sort_keys=True))),
        el("details", el("summary", "Attack: classifiers and guidance"),
           block(json.dumps(record["attack"], indent=1, sort_keys=True))),
    ]  # fmt: skip
