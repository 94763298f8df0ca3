"""The tables that end a run, and the sentence that says what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from membench.similarity.measures import MEASURES, NL2

Record = Mapping[str, Any]

BANDS = ("low", "mid", "high")
MAIN_BAND = "mid"


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> `12.3`; `–` for what was not measured."""
    return "–" if value is None else f"{100 * value + 0.0:.{digits}f}"


def with_interval(value: float | None, interval: Iterable[float] | None, digits: int = 1) -> str:
    """0.123, (0.1, 0.15) -> `12.3 [10.0, 15.0]`."""
    if value is None or interval is None:
        return percent(value, digits)
    lower, upper = interval
    return f"{percent(value, digits)} [{percent(lower, digits)}, {percent(upper, digits)}]"


def modes(scores: Record) -> list[str]:
    """Band modes of a score: the calibrated one first, whatever the papers' is called."""
    return sorted(scores["bands"], key=lambda mode: (mode != "calibrated", mode))


def mode_title(mode: str, record: Record) -> str:
    """`Calibrated bands (5, 1, 0.2 % false matches)` or the papers' with their mode."""
    rates = [f"{100 * rate:g}" for rate in false_match_rates(record).values()]
    if mode == "calibrated":
        return f"Calibrated bands ({', '.join(rates)} % false matches)"
    return f"The papers' bands ({mode})"


def band_range(band: Record) -> str:
    """`≤ 0.912`, `≥ 0.574`, `1.350 to 1.400`, or `–` where no threshold could be calibrated."""
    lower, upper = band.get("lower"), band.get("upper")
    if upper is None:
        return "–" if lower is None else f"≥ {lower:.3f}"
    return f"≤ {upper:.3f}" if lower is None else f"{lower:.3f} to {upper:.3f}"


def symbol(scores: Record) -> str:
    """What scores are scores of: `nL2` or `SSCD`."""
    return MEASURES[scores.get("measure", NL2.name)].symbol


def false_match_rates(record: Record) -> dict[str, float]:
    """The false-match rate that each calibrated band was made for."""
    thresholds = (record.get("calibration") or {}).get("thresholds") or {}
    return {name: float(thresholds[name]["rate"]) for name in BANDS if name in thresholds}


def title(record: Record) -> str:
    """`side_c on fashion_mini / ddpm, seed 0`."""
    identity = record["identity"]
    return (
        f"{identity['method']['name']} on {identity['dataset']['name']} / "
        f"{identity['target']['name']}, seed {identity['seed']}"
    )


def reading(record: Record) -> str:
    """The result in words: what share matched, against how many by chance, and what is left."""
    average, scales = record["scores"]["average"], record["scores"]["scales"]
    band = average["bands"]["calibrated"][MAIN_BAND]
    members, heldout, excess = band["members"], band["heldout"], band["excess"]
    limited = ""
    if record.get("limited"):
        limited = " Limited run: it differs from what the card asks for and enters no board."
    if members["ams"] is None:
        return f"No AMS in the {MAIN_BAND} band: {band.get('reason') or 'no threshold'}.{limited}"
    rate = false_match_rates(record).get(MAIN_BAND)
    where = f"In the {MAIN_BAND} band" if rate is None else f"At {100 * rate:g} % false matches"
    of_scales = "" if len(scales) == 1 else f", mean of {len(scales)} guidance scales"
    interval = excess.get("ams_interval")
    bounds = "" if interval is None else f" [{percent(interval[0])}, {percent(interval[1])}]"
    text = (
        f"{where} ({symbol(average)} {band_range(band)}){of_scales}, "
        f"{percent(members['ams'])} % of images matched a member "
        f"(held-out {percent(heldout['ams'])} %): excess {percent(excess['ams'])} %{bounds}"
    )
    if members.get("unique") is not None:
        each = "" if len(scales) == 1 else " at each scale, on average"
        text += f"; {members['unique']:,.0f} of {average['n_members']:,} training images extracted"
        text += each
    text += "."
    if interval is not None and interval[0] <= 0:
        text += " The interval reaches zero: this run shows no extraction."
    return text + limited


def score_table(record: Record, mode: str) -> Table:
    """AMS and UMS per scale and band, each with its held-out twin; fits 80 columns."""
    scores = record["scores"]
    table = new_table(f"{mode_title(mode, record)}, % of images")
    table.add_column("scale", justify="right")
    table.add_column(f"band, {symbol(scores['average'])}")
    table.add_column("AMS [95 %]", justify="right")
    table.add_column("false", justify="right", style="dim")
    table.add_column("excess [95 %]", justify="right", style="bold")
    table.add_column("UMS", justify="right")
    table.add_column("false", justify="right", style="dim")
    parts = [(name, scores["scales"][name]) for name in sorted(scores["scales"], key=float)]
    if len(parts) > 1:
        parts.append(("mean", scores["average"]))
    for label, score in parts:
        for name in BANDS:
            band = score["bands"][mode][name]
            members, heldout, excess = band["members"], band["heldout"], band["excess"]
            table.add_row(
                label if name == BANDS[0] else "",
                f"{name:<4} {band_range(band)}",
                with_interval(members["ams"], members.get("ams_interval")),
                percent(heldout["ams"]),
                with_interval(excess["ams"], excess.get("ams_interval")),
                percent(members["ums"]),
                percent(heldout["ums"]),
                end_section=name == BANDS[-1],
            )
    return table


def new_table(title: str, *, footer: bool = False) -> Table:
    """A table in the house style."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, padding=(0, 1, 0, 0), show_footer=footer,
    )  # fmt: skip


def cost_table(record: Record) -> Table:
    """Model calls (in images) and seconds of every stage."""
    cost = record["cost"]
    table = new_table("Cost", footer=True)
    table.add_column("stage", footer="all")
    table.add_column("U-Net calls", f"{cost['unet_calls']:,}", justify="right")
    table.add_column("classifier calls", f"{cost['classifier_calls']:,}", justify="right")
    table.add_column("seconds", f"{cost['seconds']:,.1f}", justify="right")
    table.add_column("", f"peak memory {cost['peak_memory_bytes'] / 1e9:.2f} GB", style="dim")
    for stage in cost["stages"]:
        table.add_row(
            escape(stage["stage"]),
            f"{stage['unet_calls']:,}",
            f"{stage['classifier_calls']:,}",
            f"{stage['seconds']:,.1f}",
            "cached" if stage["cached"] else "",
        )
    return table


def plan(stages: Iterable[Record]) -> RenderableType:
    """What a run would do, for `--dry-run`: stages in their order, and what is there already."""
    table = new_table("Plan", footer=True)
    found = list(stages)
    todo = [stage for stage in found if not stage["cached"]]
    table.add_column("stage", footer="to do")
    for name, key in (("U-Net calls", "unet_calls"), ("classifier calls", "classifier_calls")):
        table.add_column(name, f"{sum(stage[key] for stage in todo):,}", justify="right")
    table.add_column("", f"{len(todo)} of {len(found)} stages", style="dim")
    for stage in found:
        calls = (f"{stage[key]:,}" for key in ("unet_calls", "classifier_calls"))
        table.add_row(escape(stage["stage"]), *calls, "cached" if stage["cached"] else "to do")
    return table


def attack_lines(record: Record) -> list[str]:
    """What tells a bad attack from a bad classifier: accuracy and strength by noise level."""
    attack = record.get("attack") or {}
    classifier = attack.get("classifier") or {}
    lines = []
    accuracy = classifier.get("accuracy_by_timestep")
    if accuracy:
        times = sorted(accuracy, key=int)
        shown = ", ".join(f"{percent(accuracy[t], 0)} (t = {t})" for t in times)
        lines.append(f"classifier right on held-back images, %: {shown}")
    elif "accuracy" in classifier:
        lines.append(
            f"classifier right on held-back clean images: {percent(classifier['accuracy'])} %"
        )
    strengths = attack.get("guidance_ratio") or {}
    for scale, ratios in sorted(strengths.items(), key=lambda item: float(item[0])):
        if ratios:
            times = sorted(ratios, key=int)
            chosen = [times[round(q * (len(times) - 1))] for q in (0.1, 0.3, 0.5, 0.7, 0.9)]
            shown = ", ".join(f"{percent(ratios[t], 2)} (t = {t})" for t in chosen)
            lines.append(f"||guidance|| / ||eps|| at scale {scale}, %: {shown}")
    return lines


def knn_lines(record: Record) -> list[str]:
    """Memorization divergence of scored images, members beside held-out, if it was estimated."""
    found = record.get("knn")
    if not found:
        return []
    parts = []
    for row in found["epsilons"]:
        sides = row["memorization_divergence"]
        shown = (
            f"{sides[side]['value']:.1f} ± {sides[side]['standard_error']:.1f}"
            for side in ("members", "heldout", "gap")
        )
        parts.append("{} / {} / {} (e = {:g})".format(*shown, row["epsilon"]))
    return ["knn divergence, nats, members / held-out / gap: " + ", ".join(parts)]


def report(record: Record) -> RenderableType:
    """Everything that ends a run: tables, costs and the reading; for `Console.print`."""
    average = record["scores"]["average"]
    parts: list[RenderableType] = [Text(title(record), style="bold")]
    parts += [score_table(record, mode) for mode in modes(average)]
    lines = "false: the same images against held-out ones; excess: AMS - false, that is extraction."
    ratio = average.get("l2_ratio") or {}
    if ratio.get("members") is not None:
        members = with_interval(ratio["members"], ratio.get("members_interval"))
        lines += f"\nd1/d2 < 1/3: {members} % of images, false {percent(ratio['heldout'])} %"
    lines = "\n".join([lines, *attack_lines(record), *knn_lines(record)])
    parts += [Text(lines, style="dim")]
    if record["cost"]["stages"]:
        parts.append(cost_table(record))
    parts.append(Text(reading(record), style="bold"))
    return Group(*(part for item in parts for part in (item, Text())))
