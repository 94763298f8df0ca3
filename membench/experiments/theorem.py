"""The check of Theorem 1 (Chen et al. 2025): do informative labels make a model memorise more?

The same U-Net, trained by the same recipe on the same members: unconditionally, with true labels
and with random labels. For each, how near its density is to its members (and to the held-out twin),
and how many of its plain samples copy a member. A conditional model is judged as p(x | y) against
the images of label y, averaged over labels with their shares in the set; its marginal
p(x) = sum_y P(y) p(x | y) against the whole set, as the unconditional one is.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from membench import diverge, overlap
from membench.files import replace_atomically, write_json, writing
from membench.lab import Progress
from membench.metrics.divergence import paired_gap
from membench.overlap import SIDES
from membench.registry import Registry
from membench.report.figures import COLOURS, HELDOUT, LINE, MEMBER, new_pyplot, svg
from membench.run import prepare, run

NAME = "theorem"
DATASET = "fashion_mini"
TARGETS = {
    "unconditional": "ddpm_early",
    "true labels": "ddpm_labels",
    "random labels": "ddpm_random_labels",
}
EPSILONS = (0.05, 0.1)
IMAGES, MARGINAL_SHARE = 64, 4
BAND = ("calibrated", "mid")
SURE = 2.0
"""Standard errors beyond which two numbers are called different."""


@dataclass(frozen=True)
class _Found:
    """One estimate of one target: its record and its values by image."""

    model: str
    measure: str
    record: dict[str, Any]
    values: overlap.Values

    def each(self, side: str, e: int) -> np.ndarray:
        """log q_e - log p of every image, [n]."""
        log_p = self.values[f"{side}_log_p_{e}"].mean(2)
        return np.asarray((self.values[f"{side}_log_q_{e}"] - log_p).mean(1))


def theorem(
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    out: Path | None = None,
    images: int = IMAGES,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    targets: dict[str, str] | None = None,
    dataset: str = DATASET,
    estimators: Sequence[str] = ("elbo", "pf_ode"),
) -> Path:
    """Write theorem.csv, theorem.svg and theorem.json to `out`; returns that folder.

    images: members, and as many held-out twins, whose density is estimated (a quarter of them for
    marginals, which cost a model call for each label); seeds: of the samples that AMS and UMS
    count. All that is computed is kept in `results`, so a killed run goes on.
    targets: the unconditional one first; by default those of `fashion_mini` trained for it.
    """
    models = targets or TARGETS
    card = registry.card(dataset)
    rows: list[dict[str, Any]] = []
    found: list[_Found] = []
    for model, target in models.items():
        conditional = target in card.targets and card.recipe(target).condition != "none"
        for estimator in estimators:
            jobs = [("p(x | y)" if conditional else "p(x)", images, False)]
            if estimator == "elbo" and conditional:
                jobs.append(("p(x)", max(2, images // MARGINAL_SHARE), True))
            for density, count, marginal in jobs:
                cell = diverge.prepare(
                    registry, results, progress, dataset=dataset, target=target,
                    estimator=estimator, epsilons=EPSILONS, images=count, probes=1,
                    marginal=marginal, device=device,
                )  # fmt: skip
                record = diverge.run(cell)
                values = overlap.load_arrays(cell.folder / diverge.VALUES)
                found.append(_Found(model, f"{estimator} of {density}", record, values))
                rows += _divergence_rows(found[-1], target)
        rows += _extraction_rows(registry, results, progress, dataset, model, target, seeds, device)
    reading = _reading(rows, found)
    folder = out or results / "experiments" / f"{NAME}-{dataset}"
    with writing(folder):
        replace_atomically(folder / f"{NAME}.csv", _writes_csv(rows))
        figure = _draw(rows, list(models))
        replace_atomically(folder / f"{NAME}.svg", lambda to: to.write_text(figure, "utf-8"))
        write_json(
            folder / f"{NAME}.json",
            {
                "experiment": NAME,
                "dataset": dataset,
                "targets": models,
                "seeds": list(seeds),
                "records": [item.record["id"] for item in found],
                "reading": reading,
                "rows": rows,
            },
        )
    return folder


def _divergence_rows(found: _Found, target: str) -> list[dict[str, Any]]:
    rows = []
    for row in found.record["results"]["epsilons"]:
        line = {"model": found.model, "target": target, "measure": found.measure}
        line |= {"epsilon": row["epsilon"]}
        for side in (*SIDES, "gap"):
            part = row["memorization_divergence"][side]
            line |= {side: part["value"], f"{side}_error": part["standard_error"]}
        line |= {"n": found.record["identity"]["divergence"]["images"]}
        rows.append(line)
    return rows


def _extraction_rows(
    registry: Registry,
    results: Path,
    progress: Progress,
    dataset: str,
    model: str,
    target: str,
    seeds: Sequence[int],
    device: str,
) -> list[dict[str, Any]]:
    """AMS and UMS of plain samples, mean over seeds; "gap" is members - held-out here.

    The error of AMS is binomial over all images; that of UMS is from its interval.
    """
    scores = []
    for seed in seeds:
        cell = prepare(
            registry, results, progress, method="random", dataset=dataset, target=target,
            seed=seed, device=device,
        )  # fmt: skip
        scores.append(run(cell)["scores"]["average"])
    count = sum(score["n_images"] for score in scores)
    rows = []
    for metric in ("ams", "ums"):
        line: dict[str, Any] = {
            "model": model, "target": target, "measure": metric.upper(), "epsilon": None,
        }  # fmt: skip
        bands = [score["bands"][BAND[0]][BAND[1]] for score in scores]
        for side, name in (("members", "members"), ("heldout", "heldout"), ("excess", "gap")):
            parts = [band[side] for band in bands]
            line[name] = sum(part[metric] for part in parts) / len(parts)
            widths = [part[f"{metric}_interval"] for part in parts]
            halves = [(width[1] - width[0]) / (2 * 1.96) for width in widths if width]
            line[f"{name}_error"] = (
                math.sqrt(sum(half**2 for half in halves)) / len(parts) if halves else None
            )
        rows.append(line | {"n": count})
    return rows


def _reading(rows: Sequence[dict[str, Any]], found: Sequence[_Found]) -> list[str]:
    """What the numbers say about the theorem, model by model against the unconditional one."""
    first = found[0].model
    plain = {item.measure.split(" of ")[0]: item for item in found if item.model == first}
    lines = []
    for item in found:
        if item.model == first:
            continue
        base = plain[item.measure.split(" of ")[0]]
        for e, epsilon in enumerate(EPSILONS):
            # the same images with the same noise were given to both models
            both = np.isin(base.values["rows"], item.values["rows"])
            change = paired_gap(base.each("members", e)[both], item.each("members", e))
            mine, theirs = (_row(rows, x, epsilon) for x in (item, base))
            wider = mine["gap"] - theirs["gap"]
            error = math.hypot(mine["gap_error"], theirs["gap_error"])
            lines.append(
                f"{item.model}, {item.measure}, e = {epsilon:g}: divergence of members "
                f"{change['value']:+.1f} ± {change['standard_error']:.1f} nats against the "
                f"unconditional model (negative: nearer to its members; "
                f"{_word(change['value'], change['standard_error'], 'lower')}), "
                f"gap {wider:+.1f} ± {error:.1f} ({_word(-wider, error, 'wider')})"
            )
    for metric in ("AMS", "UMS"):
        counted = [row for row in rows if row["measure"] == metric]
        lines.append(
            f"{metric} at the {' '.join(BAND)} band, members (held-out): "
            + "; ".join(
                f"{row['model']} {100 * row['members']:.2f} % ({100 * row['heldout']:.2f} %)"
                for row in counted
            )
        )
    return lines


def _row(rows: Sequence[dict[str, Any]], item: _Found, epsilon: float) -> dict[str, Any]:
    key = (item.model, item.measure, epsilon)
    return next(row for row in rows if (row["model"], row["measure"], row["epsilon"]) == key)


def _word(change: float, error: float, wanted: str) -> str:
    if abs(change) < SURE * error:
        return "not distinguishable"
    return f"{wanted}, as predicted" if change < 0 else f"not {wanted}: against the prediction"


def _writes_csv(rows: Sequence[dict[str, Any]]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )

    return write


def _draw(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> str:
    """SVG: divergence of members and twins, their gap, and AMS, for each model."""
    plt = new_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.1), layout="constrained")
    places = range(len(models))
    smallest = [row for row in rows if row["epsilon"] == min(EPSILONS)]
    own = {m: [row for row in smallest if row["model"] == m] for m in models}
    kinds = sorted({row["measure"].split(" of ")[0] for row in smallest})
    for k, kind in enumerate(kinds):
        chosen = [next(r for r in own[m] if r["measure"].startswith(kind)) for m in models]
        shift = 0.16 * (k - (len(kinds) - 1) / 2)
        x, style = [place + shift for place in places], "os"[k % 2]
        for side, colour in (("members", MEMBER), ("heldout", HELDOUT)):
            errors = [2 * row[f"{side}_error"] for row in chosen]
            label = f"{side.replace('heldout', 'held-out')}, {kind}"
            axes[0].errorbar(
                x, [row[side] for row in chosen], errors, fmt=style, ms=5, color=colour, label=label
            )
        errors = [2 * row["gap_error"] for row in chosen]
        axes[1].errorbar(
            x, [row["gap"] for row in chosen], errors, fmt=style, ms=5,
            color=COLOURS[k + 1], label=kind,
        )  # fmt: skip
    for side, colour in (("members", MEMBER), ("heldout", HELDOUT)):
        chosen = [
            next(r for r in rows if r["model"] == m and r["measure"] == "AMS") for m in models
        ]
        errors = [200 * (row[f"{side}_error"] or 0) for row in chosen]
        values = [100 * row[side] for row in chosen]
        label = side.replace("heldout", "held-out")
        axes[2].errorbar(places, values, errors, fmt="o", ms=5, color=colour, label=label)
    titles = (
        f"KL(q_e || p), nats, e = {min(EPSILONS):g}",
        "held-out − members (± 2 errors)",
        "AMS of plain samples, %",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xticks(places, models)
        axis.set_xlim(-0.5, len(models) - 0.5)
        axis.grid(axis="y", color=LINE, lw=0.6)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0), high + 0.3 * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    return svg(figure, [dict(row) for row in rows])
