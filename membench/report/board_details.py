"""The lower half of a target's part of a board: fixed bands, other scores, scales, attack, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from membench.report.cells import bracketed, device, percent_cell, score_cell
from membench.report.markdown import escaped, table
from membench.report.records import SIDES, Record, Row, Section
from membench.report.table import BANDS, MAIN_BAND, band_range, percent, symbol
from membench.similarity.measures import NL2


def papers_part(rows: Sequence[Row], mode: str) -> list[str]:
    bands = [b for b in BANDS if b in rows[0].scores()[0]["bands"][mode]]
    bounds = {b: band_range(rows[0].scores()[0]["bands"][mode][b]) for b in bands}
    headers = ["method"]
    for b in bands:
        headers += [f"AMS {b}, {bounds[b]}", "excess", f"UMS {b}"]
    body = []
    for row in rows:
        cells = [escaped(row.label)]
        for b in bands:
            cells += [
                " / ".join(percent_cell(row.band(mode, b, side)) for side in SIDES[:2]),
                bracketed(row.band(mode, b, "excess")),
                " / ".join(percent_cell(row.band(mode, b, side, "ums")) for side in SIDES[:2]),
            ]
        body.append(cells)
    note = "Fixed thresholds, to compare with published tables: members / held-out."
    return [f"### The papers' bands ({escaped(mode)})", note, table(headers, body)]


def other_part(rows: Sequence[Row]) -> list[str]:
    parts = ["### Other scores"]
    of = symbol(rows[0].scores()[0])
    nearer = "lower" if of == NL2.symbol else "higher"
    headers = ["method", "d1/d2 < 1/3, %", "held-out", "excess",
               f"95th percentile of similarity ({of})", "held-out"]  # fmt: skip
    body = [
        [
            escaped(row.label),
            *(bracketed(row.plain("l2_ratio", side)) for side in SIDES),
            *(score_cell(row.plain("percentile_95", side)) for side in SIDES[:2]),
        ]
        for row in rows
    ]
    parts += [table(headers, body)]
    shares = sorted(rows[0].scores()[0].get("top_percent", {}).get("members", {}), key=float)
    if shares:
        body = [
            [
                escaped(row.label),
                *(
                    " / ".join(score_cell(row.plain("top_percent", side, x)) for side in SIDES[:2])
                    for x in shares
                ),
            ]
            for row in rows
        ]
        parts += [
            f"Mean {of} of the best x % of images, members / held-out ({nearer} is closer):",
            table(["method", *(f"{float(x):g} %" for x in shares)], body),
        ]
    return parts


def scales_part(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        for scale in row.scales:
            cells = [escaped(row.label), escaped(f"{float(scale):g}")]
            for side, metric in (("members", "ams"), ("heldout", "ams"), ("excess", "ams"),
                                 ("members", "ums"), ("excess", "ums")):  # fmt: skip
                found = row.band("calibrated", MAIN_BAND, side, metric, scale)
                cells.append(bracketed(found))
            body.append(cells)
    headers = ["method", "guidance scale", "AMS", "held-out", "excess AMS", "UMS", "excess UMS"]
    return [f"### By guidance scale, calibrated {MAIN_BAND} band", table(headers, body)]


def attack_part(rows: Sequence[Row]) -> list[str]:
    """How often the time-dependent classifier is right, by noise level."""
    found = {}
    for row in rows:
        reports = [(r.get("attack") or {}).get("classifier") or {} for r in row.records]
        accuracies: list[dict[str, float]] = [r.get("accuracy_by_timestep") or {} for r in reports]
        shared = set.intersection(*(set(accuracy) for accuracy in accuracies))
        if shared:
            found[row.label] = {t: sum(a[t] for a in accuracies) / len(accuracies) for t in shared}
    parts = []
    if found:
        times = sorted({t for accuracy in found.values() for t in accuracy}, key=int)
        body = [
            [escaped(name), *(percent(accuracy.get(t), 0) for t in times)]
            for name, accuracy in found.items()
        ]
        parts += [
            "### The attacks' classifiers",
            "Accuracy in percent on held-back synthetic images at timestep t of 1,000 (the higher, "
            "the noisier): a weak attack may be a weak classifier.",
            table(["method", *(f"t = {t}" for t in times)], body),
        ]
    return parts + _teachers_part(rows) + _guidance_part(rows)


def _teachers_part(rows: Sequence[Row]) -> list[str]:
    """The classifiers of clean images: OL-TI's own, and those that labelled the synthetic set."""
    lines = []
    for row in rows:
        report = (row.records[0].get("attack") or {}).get("classifier") or {}
        found = {"its own classifier": report.get("accuracy")} | {
            name: teacher.get("accuracy")
            for name, teacher in (report.get("labels") or {}).items()
            if isinstance(teacher, Mapping)
        }
        lines += [
            f"- {escaped(row.label)}: {escaped(name)}, {percent(accuracy, 0)} %"
            for name, accuracy in found.items()
            if accuracy is not None
        ]
    if not lines:
        return []
    return ["Accuracy on held-back clean images of the split they learnt from:", "\n".join(lines)]


def _guidance_part(rows: Sequence[Row]) -> list[str]:
    """How hard each method pushes: ||guidance|| / ||eps||, by timestep."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        for scale in row.scales:
            logs = [
                (r.get("attack") or {}).get("guidance_ratio", {}).get(scale) for r in row.records
            ]
            kept = [log for log in logs if log]
            if kept and all(log.keys() == kept[0].keys() for log in kept):
                mean = {t: sum(log[t] for log in kept) / len(kept) for t in kept[0]}
                found[row.label, scale] = mean
    if not found:
        return []
    times = sorted({t for ratios in found.values() for t in ratios}, key=int)
    chosen = [times[round(q * (len(times) - 1))] for q in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)]
    body = [
        [escaped(name), scale, *(percent(ratios.get(t), 2) for t in chosen)]
        for (name, scale), ratios in found.items()
    ]
    return [
        "### How strong the guidance was",
        "Norm of the guidance in percent of the norm of eps, mean over images, at timestep t.",
        table(["method", "scale", *(f"t = {t}" for t in chosen)], body),
    ]


def divergence_part(section: Section, divergences: Sequence[Record]) -> list[str]:
    """How near the target's density is to its members and to held-out images, where measured."""
    body = []
    for record in divergences:
        identity = record["identity"]
        if identity["target"] != section.identity["target"] or section.mitigation is not None:
            continue
        for found in record["results"]["epsilons"]:
            sides = found["memorization_divergence"]
            body.append([
                escaped(identity["divergence"]["estimator"]),
                f"{found['epsilon']:g}",
                f"{identity['divergence']['images']:,}",
                *(f"{sides[s]['value']:.1f} ± {sides[s]['standard_error']:.1f}"
                  for s in ("members", "heldout", "gap")),
                escaped(record["id"][:12]),
            ])  # fmt: skip
    if not body:
        return []
    return [
        "### Divergence of the whole model",
        "Memorization divergence KL(q\\_e || p\\_theta) in nats, ± one standard error: the gap "
        "between held-out images and members is the evidence. `elbo` is an upper bound, `knn` "
        "needs samples only; compare gaps of one estimator.",
        table(["estimator", "e", "images", "members", "held-out", "gap", "record"], sorted(body)),
    ]


def cost_part(rows: Sequence[Row]) -> list[str]:
    headers = ["method", "U-Net calls", "classifier calls", "seconds", "on", "peak memory, MB"]
    body = []
    for row in rows:
        costs = [record["cost"] for record in row.records]
        peak = max(cost.get("peak_memory_bytes", 0) for cost in costs)
        body.append([
            escaped(row.label),
            *(f"{sum(c.get(key, 0) for c in costs) / len(costs):,.0f}"
              for key in ("unet_calls", "classifier_calls", "seconds")),
            escaped(device(row)) or "–",
            f"{peak / 1e6:,.0f}",
        ])  # fmt: skip
    note = (
        "Mean of a run; one call is one image through a network. Shared stages (synthetic set, "
        "classifiers) are charged in full to each method that uses them. Peak memory is the "
        "highest of any run."
    )
    return ["### Cost", note, table(headers, body)]
