"""Peak memory of each stage of a run, and what of it grows with the number of images.

    OMP_NUM_THREADS=1 python tests/benchmarks/stage_memory.py [--counts 256,1024,4096]

SIDE-C against `oracle:0.5` on a data set of 64 x 64 x 3 made here: 256 members, 128 synthetic
images, N_G images at one guidance scale, two steps each. Every stage runs in a process of its own,
which finds in the results folder what earlier stages left. What is measured is the highest resident
memory after the cell is prepared (imports, data set, target), pages of files included. It is what
stages hold: malloc gives freed memory back here (`GIVES_BACK`), while a run lets it keep a hundred
MiB or so for its speed (`membench.allocator`). Only N_G changes, so a stage that holds all images
would grow by 12 KiB an image; stages that N_G does not enter are one artifact for all, and are
measured once.

Writes memory.md and memory.csv into FOLDER (tests/benchmarks/results).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import numpy as np

from membench import run as engine
from membench.contract import silent
from membench.hashing import array_hash
from membench.registry import Registry
from membench.run import Cell
from membench.store import with_inputs

HERE = Path(__file__).parent / "results"
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}
SHAPE, MIB = (64, 64, 3), 2**20
SPLITS = {"members": 256, "auxiliary": 64, "heldout": 512}
RECORD = "record"


def write_dataset(folder: Path) -> None:
    """The data set `wide` as a plugin: smooth random images, under the card of `fashion_mini`."""
    rng = np.random.default_rng(0)
    text = Path(Registry().datasets["fashion_mini"].origin).read_text()
    (folder / "wide").mkdir(parents=True)
    for name, count in SPLITS.items():
        coarse = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        arrays = {
            "images": coarse.repeat(8, axis=1).repeat(8, axis=2),
            "labels": (np.arange(count) % 10).astype(np.int16),
            "index": np.arange(count, dtype=np.int32),
        }
        section = f"[splits.{name}]\ncount = {count}\n"
        for kind, array in arrays.items():
            np.save(folder / "wide" / f"{name}.{kind}.npy", array)
            section += f'{kind}_sha256 = "{array_hash(array)}"\n'
        before, _, rest = text.partition(f"[splits.{name}]")
        text = before + section + "\n" + rest.partition("\n\n")[2]
    for old, new in {
        '"fashion_mini"': '"wide"',
        "height = 16\nwidth = 16\nchannels = 1": "height = 64\nwidth = 64\nchannels = 3",
        "synthetic_images = 2048": "synthetic_images = 128",
        "steps = 1200": "steps = 4",
        "evaluate_every = 100\n": "evaluate_every = 4\n",
        "warmup_steps = 50": "warmup_steps = 0",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "wide.toml").write_text(text)


def cell_of(folder: Path, method: str, count: int) -> Cell:
    """The run of `count` images, described and not computed."""
    clusters = {"n_clusters": "8", "min_cohesion": "0"}
    return engine.prepare(
        Registry([folder / "plugins"]),
        folder / "results",
        silent,
        method=method,
        settings=clusters if method == "side_c" else None,
        dataset="wide",
        target="oracle:0.5",
        guidance_scales=(0.1,),
        images=count,
        steps=2,
        device="cpu",
    )


def resident(which: str) -> int:
    """Bytes of resident memory of this process: VmRSS, now, or VmHWM, at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def run_stage(folder: Path, method: str, count: int, key: str) -> dict[str, int]:
    """Makes one artifact, or the record; bytes before and at most, and those it wrote."""
    engine.keep_freed_memory = lambda: None  # type: ignore[attr-defined]
    cell = cell_of(folder, method, count)
    stages = {artifact.key: artifact for artifact in with_inputs(cell.artifacts)}
    before = resident("VmRSS")
    if key == RECORD:
        engine.run(cell)
        written = sum(path.stat().st_size for path in cell.folder.glob("*.json"))
    else:
        made = cell.lab.store.ensure(stages[key])
        written = sum(path.stat().st_size for path in made.iterdir() if path.is_file())
    return {"before": before, "peak": resident("VmHWM"), "written": written}


def measure(counts: Sequence[int], method: str = "side_c") -> list[dict[str, Any]]:
    """A row for each stage and N_G: MiB before, at the peak above it, and written."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "plugins")
        for count in counts:
            cell = cell_of(folder, method, count)
            made = [a for a in with_inputs(cell.artifacts) if not cell.lab.store.has(a)]
            for title, key in [*((a.title, a.key) for a in made), (RECORD, RECORD)]:
                call = [sys.executable, __file__, "--stage", name, method, str(count), key]
                done = subprocess.run(
                    call, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVES_BACK
                )
                found = json.loads(done.stdout)
                rows.append({
                    "stage": title,
                    "images": count,
                    "before_mib": round(found["before"] / MIB, 1),
                    "peak_above_mib": round((found["peak"] - found["before"]) / MIB, 1),
                    "written_mib": round(found["written"] / MIB, 2),
                })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each stage: its peak above the prepared cell at each N_G, and what it wrote."""
    counts = sorted({row["images"] for row in rows})
    head = [f"N_G = {count:,}" for count in counts]
    lines = [
        "| stage, MiB above the prepared cell | " + " | ".join(head) + " | MiB on disk |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = {row["images"]: row for row in rows if row["stage"] == stage}
        peaks = [f"{of_stage[c]['peak_above_mib']:.0f}" if c in of_stage else "" for c in counts]
        written = " / ".join(f"{row['written_mib']:.1f}" for row in of_stage.values())
        lines.append(f"| {stage} | " + " | ".join(peaks) + f" | {written} |")
    return "\n".join(lines) + "\n"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table with what it is of, and the machine."""
    before = statistics.median(row["before_mib"] for row in rows)
    text = [
        "# Peak memory of each stage of a run",
        "",
        "SIDE-C against `oracle:0.5` at one guidance scale, images of 64 x 64 x 3 (12 KiB each), "
        "batches of 64, 256 members, 128 synthetic images; each stage in a process of its own, "
        f"which holds {before:.0f} MiB when its cell is prepared. Stages that N_G does not enter "
        "are made once. Freed memory is given back at once here; a run lets malloc keep some. "
        "Matches grow until a search has the 512 MiB that it may take.",
        "",
        *machine.lines(machine.here()),
        f"- measured: {datetime.now(UTC):%Y-%m-%d}",
        "",
        table(rows),
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", default="256,1024,4096")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        folder, method, count, key = asked.stage
        print(json.dumps(run_stage(Path(folder), method, int(count), key)))
        return
    rows = measure([int(count) for count in asked.counts.split(",")])
    asked.out.mkdir(parents=True, exist_ok=True)
    with open(asked.out / "memory.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (asked.out / "memory.md").write_text(report(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
