"""`membench train`: a target of a card, with a progress bar and the memorised share as it grows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from membench.allocator import keep_freed_memory
from membench.data.imageset import Dataset, load_dataset
from membench.diffusion.train import WEIGHTS, Probe, Report, train
from membench.errors import MembenchError
from membench.files import locked, writing
from membench.metrics.image import ratio_hits
from membench.registry import Registry
from membench.report.figures import draw_training
from membench.run import resolve_device
from membench.similarity.search import nearest
from membench.specs import DataCard, TargetRecipe, Training, explain
from membench.targets import trained_folder


def memorised_share(dataset: Dataset) -> Probe:
    """How close images are to members and to the held-out twin.

    `l2_ratio`: the share with d1 / d2 < 1/3; `rmse`: the median distance to the nearest, as RMSE
    of pixels in [0, 1].
    """
    references = {"members": dataset.members.images, "heldout": dataset.heldout_twin.images}

    def probe(step: int, images: np.ndarray) -> dict[str, float]:
        found = {}
        for name, reference in references.items():
            distance = nearest(images, reference, 2).distance
            found[f"l2_ratio_{name}"] = float(ratio_hits(distance).mean())
            found[f"rmse_{name}"] = float(np.median(distance[:, 0])) / prod(images.shape[1:]) ** 0.5
        return found

    return probe


def _adjusted(
    recipe: TargetRecipe, precision: str | None, snapshots: tuple[int, ...] | None
) -> TargetRecipe:
    asked = {"precision": precision, "snapshots": snapshots}
    changes = {key: value for key, value in asked.items() if value is not None}
    try:
        training = Training.model_validate(recipe.training.model_dump() | changes)
    except ValidationError as error:
        raise MembenchError(f"--{explain(error)}") from None
    return recipe.model_copy(update={"training": training})


def train_recipe(
    registry: Registry,
    card: DataCard,
    name: str,
    results: Path,
    recipe: TargetRecipe,
    *,
    device: str,
    resume: bool,
    report: Report,
    say: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Train a target by a recipe; returns its folder and the content of its `training.json`.

    report: called after each step with the step and its loss; what it raises ends the training
    with a checkpoint. say: takes a line on the memorised share at each evaluation. Waits for
    another process that trains the same target.
    """
    keep_freed_memory()
    main = _is_first()
    dataset = load_dataset(card, registry.data_folder(card.name))
    card = dataset.card  # with what a prepared data set's manifest says
    members_sha256 = card.splits.members.images_sha256
    assert members_sha256 is not None, "load_dataset completes the card"
    folder = trained_folder(card, name, results)
    share = memorised_share(dataset)

    def probe(step: int, images: np.ndarray) -> dict[str, float]:
        found = share(step, images)
        say(
            f"step {step}: d1/d2 < 1/3 in {found['l2_ratio_members']:.1%} of {len(images)} "
            f"samples (held-out {found['l2_ratio_heldout']:.1%})"
        )
        return found

    with writing(folder), locked(folder / ".lock") if main else nullcontext():
        log = train(
            recipe,
            card.images,
            dataset.members,
            dataset.heldout_twin,
            members_sha256,
            folder,
            probe=probe,
            resume=resume,
            device=device,
            report=report,
        )
        if main:
            picture = draw_training(log["curve"], f"{card.name} / {name}")
            (folder / "training.svg").write_text(picture, encoding="utf-8")
    return folder, log


def _is_first() -> bool:
    """Whether this process is the first, or only, one of a training."""
    return os.environ.get("RANK", "0") == "0"


def train_target(
    registry: Registry,
    card: DataCard,
    name: str,
    results: Path,
    *,
    device: str,
    resume: bool,
    precision: str | None = None,
    snapshots: tuple[int, ...] | None = None,
) -> Path:
    """`membench train`: train one target of a card, with a bar, and return its folder.

    precision, snapshots: in place of the recipe's (`membench.specs.Training`). Under
    `accelerate launch` every process calls this; only the first one writes and speaks.
    """
    recipe = _adjusted(card.recipe(name), precision, snapshots)
    console = Console(quiet=not _is_first())
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=300
    ) as progress:
        title, steps = f"{card.name}/{name}", recipe.training.last_step
        task = progress.add_task(title, total=steps, loss=float("nan"))
        recent: list[float] = []

        def report(step: int, loss: float) -> None:
            recent.append(loss)
            del recent[:-100]
            progress.update(task, completed=step, loss=sum(recent) / len(recent))

        folder, log = train_recipe(
            registry,
            card,
            name,
            results,
            recipe,
            device=resolve_device(device),
            resume=resume,
            report=report,
            say=lambda line: console.print(line, highlight=False, soft_wrap=True),
        )
    console.print(
        f"{folder / WEIGHTS}: {log['parameters']:,} parameters, "
        f"SHA-256 {log['weights_sha256']}, {log['seconds']:.0f} s of training",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if recipe.weights is not None:
        console.print(
            f"note: `membench run` attacks the shipped weights of {name}, not these; a card of "
            "your own without `weights` uses what you trained",
            highlight=False,
            markup=False,
        )
    return folder
