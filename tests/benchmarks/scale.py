"""How the cost of exact matching grows, against its model, at a hundredth of ImageNet's size.

    OMP_NUM_THREADS=1 MEMBENCH_TEST_DATA=FOLDER python tests/benchmarks/scale.py

10,000 queries against 12,812 references, and fewer or more of each, 50 neighbours:

- `sscd`: random unit vectors, float32, 512 values (as flat a spectrum as there is);
- `pixels`: 64 x 64 x 3 of uint8. Queries and references grow on CIFAR-10's images, enlarged from
  32 x 32; dimensions grow on LFW's, reduced to 16, 32, 64 and 96. Both from
  FOLDER/cifar10_jpg32.zip and FOLDER/lfw7701_jpg150.zip, else smooth noise.

CPU seconds of `nearest`, the median of three runs (one where a run takes over five seconds), beside
`membench.similarity.cost` with this processor's measured speeds. The model knows no implementation:
of pixels it takes the number of directions that it finds cheapest, with the survivors that a sample
leaves (references whose projection is no farther than the k-th neighbour is).

Writes scale.csv, scale.png and scale.md into --out (tests/benchmarks/results).
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import statistics
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import machine
import numpy as np
from PIL import Image
from sklearn.utils.extmath import randomized_svd

from membench.similarity import nearest
from membench.similarity.cost import H100, Hardware, Search, memory, steps, this_cpu, total

HERE = Path(__file__).parent / "results"
K, QUERIES, REFERENCES, DESCRIPTOR, SIDE = 50, 10_000, 12_812, 512, 64
FULL = (1_000_000, 1_281_167)
DIRECTIONS = (64, 128, 256, 512)
PEOPLE = (1_600, 6_000)  # queries and references of LFW
SAMPLE, TRIED = 2_048, 64
LONG = 5.0  # seconds of a run that is not repeated
Left = dict[int, dict[int, float]]
"""Survivors of a query by number of references, then directions."""
INK, QUIET, MODEL, MEASURED = "#1b1f24", "#6a737d", "#8a8f96", "#0b62a4"


@dataclass(frozen=True)
class Point:
    """One search: what was varied, its size, and seconds measured and by the model."""

    data: str
    varied: str
    queries: int
    references: int
    dimensions: int
    directions: int | None
    survivors: float
    measured: float
    predicted: float


# -- data -----------------------------------------------------------------------------------------


def unit_vectors(n: int, d: int, seed: int) -> np.ndarray:
    """float32 [n, d] of length 1."""
    rows = np.random.default_rng(seed).standard_normal((n, d), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pictures(archive: str, start: str, n: int, side: int) -> np.ndarray:
    """n images of an archive in the test data, uint8 [n, side, side, 3], or smooth noise."""
    path = Path(os.environ.get("MEMBENCH_TEST_DATA", "/nowhere")) / archive
    out = np.empty((n, side, side, 3), np.uint8)
    if not path.is_file():
        coarse = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), np.uint8)
        for row, small in zip(out, coarse, strict=True):
            row[:] = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        return out
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.startswith(start))
        order = np.random.default_rng(0).permutation(len(names))[:n]
        for row, i in zip(out, order, strict=True):
            with Image.open(io.BytesIO(file.read(names[i]))) as image:
                row[:] = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return out


# -- measuring and predicting ---------------------------------------------------------------------


def survivors(queries: np.ndarray, references: np.ndarray) -> dict[int, float]:
    """References a query that m directions leave, of a sample of queries, for every m."""
    rows, asked = (x.reshape(len(x), -1).astype(np.float32) for x in (references, queries[:TRIED]))
    centre = rows.mean(axis=0)
    rows -= centre
    asked -= centre
    most = min(DIRECTIONS[-1], rows.shape[1], SAMPLE // 2)
    step = -(-len(rows) // SAMPLE)
    _, _, basis = randomized_svd(rows[::step], most, n_iter=1, random_state=0)
    kth = np.sqrt(np.partition(_squared(asked, rows), K - 1, axis=1)[:, K - 1])
    seen, sought = rows @ basis.T, asked @ basis.T
    left = {}
    for m in (m for m in DIRECTIONS if m <= most):
        near = np.sqrt(_squared(sought[:, :m], seen[:, :m])) <= kth[:, None] * (1 + 1e-6)
        left[m] = float(near.sum(axis=1).mean())
    return left


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    return np.maximum(found, 0)


def cheapest(
    shape: tuple[int, int, int],
    itemsize: int,
    left: dict[int, float],
    cpu: Hardware,
    precision: str,
) -> tuple[Search, float]:
    """The search that the model finds cheapest, with or without directions, and its seconds."""
    plain = Search(*shape, itemsize, K)
    sketched = [Search(*shape, itemsize, K, m, max(s, 1.0)) for m, s in left.items()]
    return min(
        ((search, total(steps(search, cpu, precision)).seconds) for search in (plain, *sketched)),
        key=lambda item: item[1],
    )


def seconds(queries: np.ndarray, references: np.ndarray) -> float:
    """CPU seconds of `nearest`, the median of three runs unless they are long."""
    taken: list[float] = []
    while len(taken) < 3 and (not taken or taken[0] < LONG):
        start = time.process_time()
        nearest(queries, references, K)
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def point(
    data: str,
    varied: str,
    queries: np.ndarray,
    references: np.ndarray,
    cpu: Hardware,
    precision: str,
) -> Point:
    shape = len(queries), len(references), int(np.prod(queries.shape[1:]))
    left = {} if data == "sscd" else survivors(queries, references)
    search, predicted = cheapest(shape, queries.itemsize, left, cpu, precision)
    found = Point(
        data,
        varied,
        *shape,
        search.directions,
        round(search.refined / search.queries, 1),
        round(seconds(queries, references), 3),
        round(predicted, 3),
    )
    print(found, flush=True)
    return found


def measure(cpu: Hardware, precision: str, scale: float) -> tuple[list[Point], Left]:
    """All points, and what a sketch of pixels leaves at each number of references.

    `scale` shrinks every number of rows, for a trial.
    """
    q, n, asked, people = (max(200, int(scale * x)) for x in (QUERIES, REFERENCES, *PEOPLE))
    nearest(unit_vectors(64, 32, 0), unit_vectors(256, 32, 1), K)  # imports
    found: list[Point] = []

    def add(data: str, varied: str, queries: np.ndarray, references: np.ndarray) -> None:
        shape = len(queries), len(references), int(np.prod(queries.shape[1:]))
        for p in found:  # the same search is on two axes
            if (p.data, p.queries, p.references, p.dimensions) == (data, *shape):
                found.append(replace(p, varied=varied))
                return
        kind = precision if data == "pixels" else "float32"
        found.append(point(data, varied, queries, references, cpu, kind))

    a, b = unit_vectors(2 * q, DESCRIPTOR, 0), unit_vectors(2 * n, DESCRIPTOR, 1)
    for part in (4, 2, 1, 0.5):
        add("sscd", "queries", a[: int(q / part)], b[:n])
        add("sscd", "references", a[:q], b[: int(n / part)])
    for d in (128, 256, 512, 1024):
        add("sscd", "dimensions", unit_vectors(q, d, 0), unit_vectors(n, d, 1))

    a = pictures("cifar10_jpg32.zip", "test/", q, SIDE)
    b = pictures("cifar10_jpg32.zip", "train/", n, SIDE)
    for part in (8, 4, 2, 1):
        add("pixels", "queries", a[: q // part], b)
    for part in (8, 4, 2, 1):
        add("pixels", "references", a[: q // 4], b[: n // part])
    left = {n // part: survivors(a, b[: n // part]) for part in (8, 4, 2, 1)}
    for side in (16, 32, 64, 96):
        faces = pictures("lfw7701_jpg150.zip", "", asked + people, side)
        add("pixels", "dimensions", faces[:asked], faces[asked:])
    return found, left


# -- showing --------------------------------------------------------------------------------------


def draw(points: Sequence[Point], path: Path) -> None:
    """Seconds against what was varied, log-log: the model's line and the measured points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 6), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3, sharey="row")
    for row, data in zip(axes, ("sscd", "pixels"), strict=True):
        for place, varied in zip(row, ("queries", "references", "dimensions"), strict=True):
            own = [p for p in points if (p.data, p.varied) == (data, varied)]
            own.sort(key=lambda p: getattr(p, varied))
            x = [getattr(p, varied) for p in own]
            place.plot(x, [p.predicted for p in own], color=MODEL, linewidth=2, label="model")
            place.plot(x, [p.measured for p in own], "o", color=MEASURED, label="measured")
            place.set_xscale("log")
            place.set_yscale("log")
            place.set_xticks(x, [f"{value:,}" for value in x], fontsize=8)
            place.xaxis.set_minor_formatter(NullFormatter())
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            place.yaxis.set_minor_formatter(NullFormatter())
            place.set_xlabel(varied, color=INK, fontsize=9)
            others = [name for name in ("queries", "references", "dimensions") if name != varied]
            fixed = ", ".join(f"{getattr(own[0], name):,} {name}" for name in others)
            place.set_title(fixed, fontsize=8, color=QUIET)
            place.grid(color="#e6e8eb", linewidth=0.6)
            place.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{data}, CPU seconds", color=INK, fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def text(points: Sequence[Point], left: Left, cpu: Hardware, precision: str, load: float) -> str:
    """Machine, points and the full size as Markdown."""
    lines = [
        "# Exact matching at scale",
        "",
        "CPU seconds of one thread beside the cost model (`membench/similarity/cost.py`), "
        f"{K} neighbours.",
        "",
        *machine.lines(machine.here()),
        f"- measured: {datetime.now(UTC):%Y-%m-%d}, load {load:.1f} at the start; "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in cpu.products.items())
        + f", {cpu.bandwidth / 1e9:.0f} GB/s, {cpu.results / 1e9:.1f} G results/s compared; "
        f"pixels predicted in {precision}",
        "",
        "![Seconds against queries, references and dimensions](scale.png)",
        "",
        "| data | varied | queries | references | dimensions | directions | survivors "
        "| measured, s | model, s | ratio |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {p.data} | {p.varied} | {p.queries:,} | {p.references:,} | {p.dimensions:,} "
        f"| {p.directions or ''} | {p.survivors:,.0f} | {p.measured:.2f} | {p.predicted:.2f} "
        f"| {p.measured / p.predicted:.2f} |"
        for p in points
    ]
    m = _largest(points, "pixels").directions
    power = 1.0 if m is None else growth({n: by_m[m] for n, by_m in left.items()})
    lines += [
        "",
        f"{FULL[0]:,} queries against {FULL[1]:,} references by the model. Survivors beside the "
        f"{K} neighbours grow as N^{power:.2f}, as they do up to {REFERENCES:,}. An H100's seconds "
        "are those of its data sheet's peaks; a product coarser than the values needs a bound of "
        "its error.",
        "",
        "| data | on | product | directions | survivors | FLOPs | GB moved | GB held | seconds |",
        "|---" * 9 + "|",
    ]
    for data in ("sscd", "pixels"):
        for hardware in (H100, cpu):
            for kind in hardware.products:
                lines.append(_full(points, data, hardware, kind, power))
    return "\n".join(lines) + "\n"


def growth(left: Mapping[int, float]) -> float:
    """p of survivors - k ~ N^p in [0, 1], fitted to survivors by number of references."""
    size, more = list(left), [max(s - K, 1e-3) for s in left.values()]
    return float(np.polyfit(np.log(size), np.log(more), 1)[0].clip(0, 1))


def _full(
    points: Sequence[Point], data: str, hardware: Hardware, precision: str, power: float
) -> str:
    """The whole of ImageNet: with the directions that were best at a hundredth, if there were."""
    base = _largest(points, data)
    grown = None
    if base.directions is not None:
        grown = K + (base.survivors - K) * (FULL[1] / base.references) ** power
    itemsize = 2 if data == "sscd" else 1
    search = Search(*FULL, base.dimensions, itemsize, K, base.directions, grown)
    whole = total(steps(search, hardware, precision))
    held = memory(search, hardware, precision)
    return (
        f"| {data} | {hardware.name} | {precision} | {base.directions or ''} "
        f"| {search.refined / search.queries:,.0f} | {whole.flops:.1e} "
        f"| {whole.bytes / 1e9:,.0f} | {held / 1e9:,.1f} | {_short(whole.seconds)} |"
    )


def _short(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def _largest(points: Sequence[Point], data: str) -> Point:
    """The search of most queries where they are varied, at a hundredth of ImageNet or so."""
    of_data = [p for p in points if p.data == data and p.varied == "queries"]
    return max(of_data, key=lambda p: p.queries)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--precision", default="float32", help="of the product on pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="of every number of rows")
    asked = parser.parse_args()
    load, cpu = os.getloadavg()[0], this_cpu()
    points, left = measure(cpu, asked.precision, asked.scale)
    asked.out.mkdir(parents=True, exist_ok=True)
    with open(asked.out / "scale.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(vars(points[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(vars, points))
    draw(points, asked.out / "scale.png")
    (asked.out / "scale.md").write_text(text(points, left, cpu, asked.precision, load))


if __name__ == "__main__":
    main()
