"""What bfloat16 and compilation do to images and to scores, as a Markdown table.

    OMP_NUM_THREADS=1 python tests/benchmarks/arithmetic_effect.py [RESULTS] [METHOD ...]

The card's runs of `fashion_mini / ddpm` (512 images a scale, seed 0), by `random` and `side_c`, in
each arithmetic from the same noise, labels and classifier. Of all 8-bit pixels: how many differ
from float32's, by more than one level, and by how much at most; of all images: how many became
others (an RMSE above 0.1 of the range); AMS at 1 % false matches, as a mean over scales, with its
95 % interval. What RESULTS holds already is taken from there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from membench.contract import silent
from membench.registry import Registry
from membench.run import Cell, prepare, run

ARITHMETICS: dict[str, dict[str, Any]] = {
    "float32": {},
    "compile": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, compile": {"precision": "bfloat16", "compile": True},
}


def images(cell: Cell) -> np.ndarray:
    """Of all scales, int16 [N, H, W, C]."""
    files = sorted(cell.folder.glob("images-*.npy"))
    return np.concatenate([np.load(file).astype(np.int16) for file in files])


def main(results: Path, methods: list[str]) -> None:
    print("| method | arithmetic | pixels changed, % | by more than 1 of 255, % | most "
          "| other images, % | AMS, % |\n|---|---|---|---|---|---|---|")  # fmt: skip
    registry = Registry()
    for method in methods:
        exact = None
        for name, options in ARITHMETICS.items():
            cell = prepare(
                registry, results, silent, method=method, dataset="fashion_mini", target="ddpm",
                device="cpu", **options,
            )  # fmt: skip
            band = run(cell)["scores"]["average"]["bands"]["calibrated"]["mid"]["members"]
            low, high = (100 * end for end in band["ams_interval"])
            found = images(cell)
            exact = found if exact is None else exact
            gap = np.abs(found - exact)
            rmse = ((gap / 255).reshape(len(gap), -1) ** 2).mean(axis=1) ** 0.5
            print(
                f"| `{method}` | {name} | {100 * (gap > 0).mean():.2f} | "
                f"{100 * (gap > 1).mean():.2f} | {gap.max()} | "
                f"{100 * (rmse > 0.1).mean():.1f} | "
                f"{100 * band['ams']:.1f} [{low:.1f}, {high:.1f}] |",
                flush=True,
            )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0] if arguments else "results"), arguments[1:] or ["random", "side_c"])
