"""`membench new method | descriptor | sweep NAME`: files that work as they are."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from membench.errors import MembenchError
from membench.files import writing

METHOD = '''"""{title}: describe it in one line."""

import numpy as np

from membench.plugins import Lab, Surrogate, extraction


def by_brightness(images: np.ndarray, n_labels: int) -> np.ndarray:
    """Labels 0 .. n_labels - 1: quantiles of the mean brightness. images: uint8 [N, H, W, C]."""
    brightness = images.mean(axis=(1, 2, 3))
    edges = np.quantile(brightness, np.linspace(0, 1, n_labels + 1)[1:-1])
    return np.searchsorted(edges, brightness)


@extraction(title="{title}", paper="unpublished")
def {name}(lab: Lab, *, n_labels: int = 10) -> Surrogate | None:
    """Guide the target by labels of your own, learnt from images it made itself.

    Keyword arguments are the method's parameters: `membench run ... --set n_labels=20`.
    """
    synthetic = lab.synthetic()
    labels = lab.label_by(synthetic, by_brightness, version=1, n_labels=n_labels)
    return lab.time_dependent(synthetic, labels)
'''


DESCRIPTOR = '''"""{title}: describe it in one line."""

import numpy as np

from membench.plugins import Describe, Setup, descriptor

GRID = 8


@descriptor(title="{title}", paper="unpublished", dimensions=3 * GRID * GRID)
def {name}(setup: Setup) -> Describe:
    """Colours averaged on an 8 x 8 grid, against mid-grey.

    Load a network here if there is one (`membench.similarity.runtimes.torchscript`); the engine
    resizes the images, runs them in batches and brings every descriptor to length one.
    """

    def describe(images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float [B, D]."""
        rows = np.array_split(images.astype(np.float32) - 127.5, GRID, axis=1)
        cells = [cell for row in rows for cell in np.array_split(row, GRID, axis=2)]
        return np.concatenate([cell.mean(axis=(1, 2)) for cell in cells], axis=1)

    return describe
'''


SWEEP = """# {title}: a sweep of membench; see it with `membench sweep {name}.toml --dry-run`.
# Paths are relative to this file. What is left out is the data set's default.

datasets = ["fashion_mini"] # or {{ name = "cifar10", targets = ["ddpm"] }}
targets = ["ddpm"]          # of every data set above; without it, each card's default;
                            # one that has no weights yet is trained first
methods = [
    "random",
    "ol_ti",
    "side_o",
    "side_a",
    {{ name = "side_c", parameters = {{ n_clusters = 100 }} }}, # also images, steps, ...
]
mitigations = ["none"]
seeds = [0]
# guidance_scales = [0.1, 0.3]
# images = 512      # per scale
# steps = 50
# batch_size = 64
# precision = "bfloat16" # float32; other than the card's enters no board
# compile = true    # networks, before images are drawn
# attack_seed = 0   # of synthetic set, classifiers and clusters
# device = "auto"   # cpu, cuda
# plugins = ["."]   # folders with your own methods, descriptors and cards
# data = "data"     # folder of prepared data sets
# descriptor_weights = "sscd.pt"

# [similarity]      # as the options of `membench run`
# flips = true
# descriptor = "sscd_onnx"

executor = "local"  # inline: in one process; local: one a GPU, else one a core; slurm
shards = 2          # tasks that share the images of one scale; any number gives the same bits
retries = 2         # of tasks that were killed, ran out of memory or of time, or lost their node
# concurrency = 8   # tasks at a time

[resources.default] # of one task of any stage
cpus = 1
# memory = 8        # GiB
# minutes = 60      # then it stops at a batch boundary and goes on in another attempt
# partition = "gpu"
# account = "project"
# constraint = "a100"
# tasks_per_job = 20 # of the shortest stages on Slurm; `minutes` is then of the job
# extra = {{ qos = "long" }} # more options of sbatch

# Stages: train, plan, check, images, classifier, labels, descriptors, matches, facts, record,
# board.
# [resources.images]
# gpus = 1
# concurrency = 4
"""


def write_method(name: str, folder: Path) -> Path:
    """Write the template as FOLDER/NAME.py; refuses to replace a file."""
    return _write("method", name, folder, METHOD)


def write_descriptor(name: str, folder: Path) -> Path:
    """Write the template as FOLDER/NAME.py; refuses to replace a file."""
    return _write("descriptor", name, folder, DESCRIPTOR)


def write_sweep(name: str, folder: Path) -> Path:
    """Write the template as FOLDER/NAME.toml; refuses to replace a file."""
    return _write("sweep", name, folder, SWEEP, ".toml")


def _write(kind: str, name: str, folder: Path, template: str, suffix: str = ".py") -> Path:
    example = {"method": "my_attack", "descriptor": "my_descriptor", "sweep": "my_sweep"}[kind]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise MembenchError(
            f"{name!r}: a {kind}'s name is a Python name in small letters, as in {example}"
        )
    path = folder / f"{name}{suffix}"
    with writing(folder):
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(template.format(name=name, title=name.replace("_", " ").capitalize()))
        except FileExistsError:
            raise MembenchError(f"{path}: is there already; choose another name") from None
    return path
