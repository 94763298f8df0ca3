"""The pages of the site: the overview, and one for each data set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from membench.hashing import content_hash
from membench.report import variations
from membench.report.cells import count_of, device, n_g
from membench.report.html import Cell, Column, Markup, el, join, table
from membench.report.ranking import Ranked, Ranking
from membench.report.records import Estimate, Record, Row
from membench.report.site_charts import (
    figure,
    guidance_chart,
    images_chart,
    threshold_chart,
)
from membench.report.summary import standings
from membench.report.table import BANDS, MAIN_BAND, percent, symbol

Body = list[object]


def slug(name: str) -> str:
    """A file name for any text; different texts get different ones."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip(".-")[:60]
    return plain if plain == name else f"{plain}-{content_hash(name)[:8]}"


def estimate_cell(estimate: Estimate | None, *, strong: bool = False) -> Cell:
    """Percent with its interval below; sorts by the value."""
    if estimate is None:
        return Cell("–", "")
    shown: list[object] = [percent(estimate.value)]
    if estimate.interval is not None:
        low, high = (percent(end) for end in estimate.interval)
        shown.append(el("span", f"{low} – {high}", class_="ci"))
    return Cell(join(shown), f"{estimate.value:.8g}", "strong" if strong else "")


def number_cell(value: float | None, digits: int = 0) -> Cell:
    return Cell("–", "") if value is None else Cell(f"{value:,.{digits}f}", f"{value:.8g}")


def rank_cell(ranking: Ranking, label: str) -> Cell:
    return Cell(ranking.shown(label), ranking.rank(label) or "")


def target_name(ranked: Ranked) -> str:
    mitigation = ranked.section.mitigation
    return ranked.section.target + (f" with {mitigation}" if mitigation else "")


# --- Overview ---------------------------------------------------------------------------------


def overview(boards: Mapping[str, Sequence[Ranked]], others: Sequence[str]) -> Body:
    runs = [r for found in boards.values() for ranked in found for row in ranked.rows
            for r in row.records]  # fmt: skip
    places, total = standings(boards)
    body: Body = [
        el("h1", "What comes back out of diffusion models"),
        el("p", "How much of its training set can a diffusion model be made to give back, by which "
           "attack, and how sure is that? Every number stands beside what chance gives.",
           class_="lead"),
        el("ul",
           _card(f"{len(runs)}", "verified runs"),
           _card(f"{len(places)}", "extraction methods"),
           _card(f"{total}", "attacked models"),
           _card(f"{len(boards) + len(others)}", "data sets"), class_="cards stats"),
    ]  # fmt: skip
    if places:
        body += [
            el("h2", "Methods over all models"),
            el("p", "Ranked by the mean of a method's ranks; in each, a rank is 1 + how many "
               "methods are higher by more than chance, so methods that cannot be told apart share "
               "it. A method that was not run everywhere has no place."),
            _methods(boards),
            el("h2", "Models and their worst case"),
            el("p", f"The method that extracted most, by excess AMS in the {MAIN_BAND} band: "
               "members minus held-out images. Its interval does not allow for its having been "
               "picked as the highest."),
            _worst(boards),
        ]  # fmt: skip
    cards = [
        el("li", el("b", el("a", name, href=f"data/{slug(name)}.html")),
           el("div", count_of(sum(len(row.records) for r in boards[name] for row in r.rows), "run")
              if name in boards else "what chance gives; no runs yet", class_="quiet"),
           class_="card")
        for name in [*sorted(boards), *sorted(set(others) - boards.keys())]
    ]  # fmt: skip
    return [*body, el("h2", "Data sets"), el("ul", *cards, class_="cards")]


def _card(big: str, text: str) -> Markup:
    return el("li", el("b", big, class_="big"), el("span", text, class_="quiet"), class_="card")


def _methods(boards: Mapping[str, Sequence[Ranked]]) -> Markup:
    found, total = standings(boards)
    whole = [s.mean_rank for s in found if len(s.ranks) == total]
    rows = []
    for s in found:
        place: object = Cell("–", "")
        if len(s.ranks) == total:
            rank = 1 + sum(other < s.mean_rank for other in whole)
            place = Cell(f"{rank}{'=' if whole.count(s.mean_rank) > 1 else ''}", rank)
        rows.append([
            s.method, place, Cell(f"{len(s.ranks)} of {total}", len(s.ranks)),
            number_cell(s.mean_rank, 2), Cell(f"{s.first} of {len(s.ranks)}", s.first),
            number_cell(None if s.excess is None else 100 * s.excess, 1), number_cell(s.calls),
        ])  # fmt: skip
    columns = [Column("method", text=True), Column("place", up=True), Column("models"),
               Column("mean rank", up=True), Column("first"), Column("mean excess AMS, %"),
               Column("network calls a run", up=True)]  # fmt: skip
    return table(columns, rows, caption="Methods over all models")


def _worst(boards: Mapping[str, Sequence[Ranked]]) -> Markup:
    rows = []
    for dataset, found in sorted(boards.items()):
        for ranked in found:
            best = ranked.main.best
            if best is None:
                continue
            row = next(row for row in ranked.rows if row.label == best)
            ties = [n for n in ranked.main.excess
                    if n != best and best not in ranked.main.above[n]]  # fmt: skip
            rows.append([
                el("a", target_name(ranked), href=f"data/{slug(dataset)}.html"), dataset, best,
                estimate_cell(ranked.main.excess[best], strong=True),
                estimate_cell(row.band("calibrated", MAIN_BAND, "heldout")),
                estimate_cell(row.band("calibrated", MAIN_BAND, "members", "ums")),
                number_cell(len(ranked.rows)),
                Cell(", ".join(ties) or "none", kind="wrap-text"),
            ])  # fmt: skip
    columns = [Column("model", text=True), Column("data set", text=True),
               Column("worst case", text=True), Column("excess AMS, %"), Column("held-out, %"),
               Column("UMS, %"), Column("methods tried"),
               Column("cannot be told from it", text=True)]  # fmt: skip
    return table(columns, rows, caption="Models and their worst case")


# --- A data set -------------------------------------------------------------------------------


def dataset_page(
    name: str,
    found: Sequence[Ranked],
    *,
    calibration: Record | None,
    divergences: Sequence[Record],
    published: Sequence[Mapping[str, str]],
) -> Body:
    body: Body = [el("h1", name)]
    if found:
        body += _board(name, found)
    else:
        body.append(el("p", "No run of an extraction method has been published on this data set "
                            "yet; this is what chance gives.", class_="lead"))  # fmt: skip
    for ranked in found:
        body += _target(ranked)
    if divergences:
        body += _divergence(divergences)
    if calibration is not None:
        columns = [Column(h, text=not i) for i, h in enumerate(variations.headers(calibration))]
        body += [el("h2", "What chance gives, and what moves it"),
                 el("p", variations.sentence(calibration)),
                 table(columns, variations.rows(calibration), caption="What chance gives",
                       sortable=False)]  # fmt: skip
    if published:
        keys = ("method", "band", "ams_percent", "ums_percent", "source")
        columns = [Column("method", text=True), Column("band", text=True), Column("AMS, %"),
                   Column("UMS, %"), Column("source", text=True)]  # fmt: skip
        rows = [[Cell(r[k], kind="wrap-text" if k == "source" else "") for k in keys]
                for r in published]  # fmt: skip
        body += [el("h2", "Published"),
                 el("p", "As printed in the papers: other models and no held-out column, so in no "
                         "ranking."),
                 table(columns, rows, caption="Published figures")]  # fmt: skip
    return body


def _board(name: str, found: Sequence[Ranked]) -> Body:
    """Every row of every band in one table that sorts and filters."""
    of = symbol(found[0].rows[0].scores()[0])
    columns = [Column("method", text=True), Column("model", text=True),
               Column("rank", up=True), Column("excess AMS, %"), Column("AMS, %"),
               Column("held-out, %", up=True), Column("UMS, %"), Column("held-out UMS, %", up=True),
               Column(f"best 1 %: {of}"), Column("held-out"), Column("band", text=True),
               Column("N_G"), Column("network calls", up=True), Column("seconds", up=True),
               Column("peak MB", up=True), Column("newest", text=True),
               Column("records", text=True)]  # fmt: skip
    rows, keys = [], []
    for ranked in found:
        for band in (MAIN_BAND, *(b for b in BANDS if b != MAIN_BAND)):
            for row in ranked.rows:
                rows.append(_board_row(ranked, row, band))
                keys.append(
                    {
                        "band": band,
                        "target": target_name(ranked),
                        "method": str(row.records[0]["identity"]["method"]["name"]),
                    }
                )
    choices = [_select("Band", "band", BANDS, MAIN_BAND)]
    for label, key in (("Model", "target"), ("Method", "method")):
        values = sorted({str(k[key]) for k in keys})
        choices.append(_select(label, key, values, None))
    search = el("label", "Search", el("input", type="search", data_filter="*",
                                      autocomplete="off"))  # fmt: skip
    status = el("p", class_="status", role="status")
    tools = el("div", search, *choices, status, class_="tools", hidden=True)
    return [
        el("p", "Excess is members minus equally many held-out images: that is extraction. UMS "
           "counts different training images, of one scale and seed, at the same number of images "
           "for all. Methods share a rank where the comparison cannot tell them apart."),
        el("section", tools, table(columns, rows, caption=f"Board of {name}", keys=keys),
           class_="filterable", aria_label="Board"),
    ]  # fmt: skip


def _select(label: str, key: str, values: Sequence[str], chosen: str | None) -> Markup:
    options = [el("option", "all", value="")]
    options += [el("option", v, value=v, selected=v == chosen) for v in values]
    return el("label", label, el("select", *options, data_filter=key))


def _board_row(ranked: Ranked, row: Row, band: str) -> list[object]:
    costs = [record["cost"] for record in row.records]
    calls = sum(c["unet_calls"] + c.get("classifier_calls", 0) for c in costs) / len(costs)
    seconds = sum(c["seconds"] for c in costs) / len(costs)
    top = [row.plain("top_percent", side, "1") for side in ("members", "heldout")]
    links: list[object] = []
    for record in row.records:
        links += [" " if links else "", record_link(record, "../")]
    newest = max(str(record["provenance"]["finished"]) for record in row.records)[:10]
    peak = max(c.get("peak_memory_bytes", 0) for c in costs)
    return [
        row.label, target_name(ranked), rank_cell(ranked.by_band[band], row.label),
        estimate_cell(row.band("calibrated", band, "excess"), strong=True),
        estimate_cell(row.band("calibrated", band, "members")),
        estimate_cell(row.band("calibrated", band, "heldout")),
        estimate_cell(row.band("calibrated", band, "members", "ums")),
        estimate_cell(row.band("calibrated", band, "heldout", "ums")),
        *(number_cell(t.value if t else None, 3) for t in top),
        band, Cell(n_g(row), row.images * len(row.scales) * len(row.records)),
        number_cell(calls), Cell(f"{seconds:,.0f} {device(row)}".strip(), f"{seconds:.8g}"),
        number_cell(peak / 1e6), newest, join(links),
    ]  # fmt: skip


def record_link(record: Record, up: str) -> Markup:
    return el(
        "a", f"seed {record['identity']['seed']}", href=f"{up}record/{record['id'][:16]}.html"
    )


def _target(ranked: Ranked) -> Body:
    charts = [
        (threshold_chart(ranked), "Mean over seeds and scales: the gap between members and "
         "held-out is extraction, at any band. Marks: the calibrated bands."),
        (images_chart(ranked), "Exact rarefaction of what was drawn, mean over seeds and scales: "
         "more images find fewer new members each."),
        (guidance_chart(ranked.rows), "Members minus held-out, with 95 % intervals; scale 0 is "
         "plain sampling."),
    ]  # fmt: skip
    labels = sorted(row.label for row in ranked.rows)
    colours = {label: place for place, label in enumerate(labels)}
    shown = [
        figure(chart | {"colours": colours}, note) for chart, note in charts if chart is not None
    ]
    if not shown:
        return []
    return [el("h2", target_name(ranked)), el("div", *shown, class_="charts")]


def _divergence(divergences: Sequence[Record]) -> Body:
    rows = []
    for record in divergences:
        identity = record["identity"]
        for found in record["results"]["epsilons"]:
            sides = found["memorization_divergence"]
            rows.append([
                identity["target"]["name"], identity["divergence"]["estimator"],
                number_cell(found["epsilon"], 2), number_cell(identity["divergence"]["images"]),
                *(Cell(f"{sides[s]['value']:.1f} ± {sides[s]['standard_error']:.1f}",
                       f"{sides[s]['value']:.8g}") for s in ("members", "heldout", "gap")),
            ])  # fmt: skip
    columns = [Column("model", text=True), Column("estimator", text=True), Column("e"),
               Column("images"), Column("members"), Column("held-out"), Column("gap")]  # fmt: skip
    return [
        el("h2", "Divergence of the whole model"),
        el("p", "KL(q_e || p_theta) in nats, ± one standard error: the gap between held-out images "
           "and members is the evidence. Compare gaps of one estimator."),
        table(columns, rows, caption="Memorization divergence"),
    ]  # fmt: skip
