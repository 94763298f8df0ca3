"""Saved benchmarks as a table and a figure of ratios.

    pytest tests/benchmarks --benchmark-only --benchmark-json=saved.json
    python tests/benchmarks/report.py saved.json [MORE.json ...] [--name NAME] [--out FOLDER]

Writes NAME.md and NAME.png into FOLDER (tests/benchmarks/results). Several files are one report,
and must be of one machine with one set of packages. Benchmarks without ratios (`turns.py`) are
named on stderr and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import described, lines

HERE = Path(__file__).parent / "results"
FASTER, SLOWER, INK, QUIET = "#0b62a4", "#d55e00", "#1b1f24", "#6a737d"


@dataclass(frozen=True)
class Ratio:
    """One peer of one benchmark: ratios of the rounds (above 1: ours is faster), median seconds."""

    what: str
    peer: str
    median: float
    lower: float
    upper: float
    ours_seconds: float
    peer_seconds: float
    rounds: int
    threads: int
    clock: str
    load: float


def ratios(saved: Mapping[str, Any]) -> tuple[list[Ratio], list[str]]:
    """Every ratio of a saved file, and the names of its benchmarks that have none."""
    found, without = [], []
    for benchmark in saved["benchmarks"]:
        extra = benchmark["extra_info"]
        if "ratios" not in extra:
            without.append(benchmark["name"])
            continue
        seconds, ways = extra["seconds"], {"ours": extra["ratios"], **extra.get("more", {})}
        found += [
            Ratio(
                extra["what"] if way == "ours" else f"{extra['what']}, {way}",
                peer,
                **quartiles,
                ours_seconds=statistics.median(seconds[way]),
                peer_seconds=statistics.median(seconds[peer]),
                rounds=len(seconds[peer]),
                threads=extra["threads"],
                clock=extra["clock"],
                load=extra["load"],
            )
            for way, against in ways.items()
            for peer, quartiles in against.items()
        ]
    return found, without


def run_line(saved: Mapping[str, Any]) -> str:
    """When a file was measured, of which commit, and how busy the machine was."""
    commit = saved["commit_info"]
    dirty = " with changes" if commit.get("dirty") else ""
    return (
        f"{saved['datetime'][:10]}, commit {commit['id'][:12]}{dirty}, "
        f"load {saved['machine_info']['load_at_start']:.1f} at the start"
    )


def table(files: Sequence[Mapping[str, Any]], rows: Sequence[Ratio], figure: str) -> str:
    """The report as Markdown."""
    text = [
        "# Speed beside its peers",
        "",
        "Ratios of the peer's seconds to ours, above 1 where ours is faster: medians of the "
        "rounds, in brackets the quartiles. In each round all take turns.",
        "",
        *lines(files[0]["machine_info"]),
        *(f"- measured {run_line(saved)}" for saved in files),
        "",
        f"![Ratios of the table below]({figure})",
        "",
        "| what | against | ratio | ours, s | theirs, s | rounds | threads | clock | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows:
        text.append(
            f"| {'' if row.what == before else row.what} | {row.peer} "
            f"| **{row.median:.2f}** [{row.lower:.2f}, {row.upper:.2f}] "
            f"| {row.ours_seconds:.3g} | {row.peer_seconds:.3g} "
            f"| {row.rounds} | {row.threads} | {row.clock} | {row.load:.1f} |"
        )
        before = row.what
    return "\n".join(text) + "\n"


def draw(rows: Sequence[Ratio], path: Path) -> None:
    """Horizontal bars from 1.0, the line where both are as fast, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    places, y, before = [], 0.0, None
    for row in rows:
        y += 1.9 if row.what != before else 1.0  # room for a heading
        places.append(y)
        before = row.what
    figure = Figure(figsize=(9, 0.8 + 0.32 * y), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    before = None
    for row, place in zip(rows, places, strict=True):
        colour = FASTER if row.median >= 1 else SLOWER
        axes.barh(place, row.median - 1, left=1, height=0.62, color=colour)
        axes.plot([row.lower, row.upper], [place, place], color=INK, linewidth=1.2)
        axes.annotate(
            f"{row.median:.2f}",
            (max(row.upper, row.median, 1), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
        if row.what != before:
            axes.annotate(
                row.what,
                (0, place - 0.85),
                xycoords=("axes fraction", "data"),
                va="center",
                color=INK,
                fontsize=9,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        before = row.what
    axes.set_yticks(places, [row.peer for row in rows], fontsize=9, color=INK)
    axes.set_ylim(y + 0.7, 0.6)
    axes.set_xscale("log")
    axes.set_xlim(
        min(0.8, *(row.lower * 0.9 for row in rows)), max(2.0, *(row.upper * 1.2 for row in rows))
    )
    ticks = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlabel("times as fast as the peer (log scale)", color=QUIET, fontsize=9)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})


def report(files: Sequence[Mapping[str, Any]], out: Path, name: str) -> list[str]:
    """Write the table and the figure; the names of benchmarks that were left out."""
    machines = [described(saved["machine_info"]) for saved in files]
    if any(other != machines[0] for other in machines):
        differ = sorted({k for m in machines for k in m if m[k] != machines[0][k]})
        raise SystemExit(f"the files are not of one machine: {', '.join(differ)} differ")
    rows, without = [], []
    for saved in files:
        found, missing = ratios(saved)
        rows += found
        without += missing
    if not rows:
        raise SystemExit("no benchmark in these files has ratios (see turns.py)")
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / f"{name}.png")
    (out / f"{name}.md").write_text(table(files, rows, f"{name}.png"), encoding="utf-8")
    return without


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="SAVED.json")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--name", default="speed")
    asked = parser.parse_args()
    files = [json.loads(path.read_text(encoding="utf-8")) for path in asked.files]
    for name in report(files, asked.out, asked.name):
        print(f"left out, it has no ratios: {name}", file=sys.stderr)
    print(asked.out / f"{asked.name}.md")


if __name__ == "__main__":
    main()
