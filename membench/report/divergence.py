"""Model-level metrics for people: the table that ends `membench diverge`, and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from membench.report.figures import HELDOUT, LINE, MEMBER, new_pyplot, short, svg

_EXPLAINED = {
    "memorization_divergence": "KL(q_e || p), nats: lower is nearer to the set",
    "pointwise_memorization": "mean_i KL(p || Normal(x_i, e I)), nats; e is a variance here",
}
_SURE = 2.0


def report(record: Mapping[str, Any]) -> RenderableType:
    """Members, held-out twin and gap at every e, each with its standard error."""
    identity, results = record["identity"], record["results"]
    spec, target = identity["divergence"], identity["target"]["name"]
    parts: list[RenderableType] = []
    for metric, text in _EXPLAINED.items():
        rows = [row for row in results["epsilons"] if metric in row]
        if not rows:
            continue
        table = Table(title=f"{metric} of {target} by {spec['estimator']}", box=box.SIMPLE)
        table.caption = text
        for header in ("e", "members", "held-out", "gap", "gap / error"):
            table.add_column(header, justify="right")
        for row in rows:
            found = row[metric]
            z = found["gap"]["z"]
            table.add_row(
                f"{row['epsilon']:g}",
                *(plus_minus(found[side]) for side in ("members", "heldout", "gap")),
                "–" if z is None else f"{z:+.1f}",
            )
        parts.append(table)
    semantic = results["semantic_memorization"]
    parts.append(
        Text(
            f"semantic_memorization in {semantic['descriptor']} (mean over the set): members "
            f"{plus_minus(semantic['members'], 4)}, held-out {plus_minus(semantic['heldout'], 4)}, "
            f"gap {plus_minus(semantic['gap'], 4)}"
        )
    )
    parts.extend(Text(line) for line in notes(record))
    return Group(*parts)


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, and the verdict of the gap."""
    identity, results = record["identity"], record["results"]
    spec = identity["divergence"]
    lines = [
        f"{spec['images']} images, {spec['draws']} draw(s) of noise each; ± is one standard error"
    ]
    if spec["estimator"] != "knn":
        lines.append(f"the density is the model's, blurred by {identity['sigma_0']:.3g}")
    solver = [row["solver"] for row in results["epsilons"] if "solver" in row]
    if solver:
        largest = max(abs(side["mean"]) for sides in solver for side in sides.values())
        of_gap = max(abs(s["members"]["mean"] - s["heldout"]["mean"]) for s in solver)
        lines.append(
            f"solver: {spec['steps']} steps; half of them move a mean by at most {largest:.2g}, "
            f"a gap by at most {of_gap:.2g} ({solver[0]['members']['n']} images each)"
        )
    if spec["estimator"] == "knn":
        lines.append("knn is biased in many dimensions: read differences only")
    gaps = [row["memorization_divergence"]["gap"]["z"] for row in results["epsilons"]]
    sure = sum(z is not None and z > _SURE for z in gaps)
    lines.append(f"the gap is above {_SURE:g} standard errors at {sure} of {len(gaps)} widths e")
    return lines


def plus_minus(found: Mapping[str, Any], digits: int = 2) -> str:
    """`12.30 ± 0.41`."""
    return f"{found['value']:.{digits}f} ± {found['standard_error']:.{digits}f}"


def draw_divergence(record: Mapping[str, Any]) -> str:
    """SVG: memorization divergence against e, members and held-out twin, and their gap."""
    identity, rows = record["identity"], record["results"]["epsilons"]
    points = [{"epsilon": row["epsilon"]} | row["memorization_divergence"] for row in rows]
    points.sort(key=lambda point: point["epsilon"])
    widths = [point["epsilon"] for point in points]
    plt = new_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
    for side, colour, label in (
        ("members", MEMBER, "members"),
        ("heldout", HELDOUT, "held-out"),
    ):
        values, errors = _numbers(points, side)
        axes[0].errorbar(widths, values, errors, fmt="o-", ms=4, color=colour, label=label)
    values, errors = _numbers(points, "gap")
    axes[1].errorbar(widths, values, errors, fmt="o-", ms=4, color=MEMBER)
    axes[1].axhline(0, color=HELDOUT, lw=0.8)
    name = f"{identity['target']['name']} by {identity['divergence']['estimator']}"
    axes[0].set_title(f"{short(name)}: KL(q_e || p), nats", loc="left")
    axes[1].set_title("held-out − members (± 2 errors)", loc="left")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(widths, [f"{width:g}" for width in widths])
        axis.minorticks_off()
        axis.set_xlabel("e, width of the kernels")
        axis.grid(color=LINE, lw=0.6)
    return svg(figure, points)


def _numbers(points: list[dict[str, Any]], side: str) -> tuple[list[float], list[float]]:
    values = [point[side]["value"] for point in points]
    return values, [2 * point[side]["standard_error"] for point in points]
