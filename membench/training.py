"""`membench train`: a target of a card, with a progress bar and the memorised share as it grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from membench.data.imageset import Dataset, load_dataset
from membench.diffusion.train import WEIGHTS, Probe, train
from membench.files import locked, writing
from membench.metrics.image import ratio_hits
from membench.registry import Registry
from membench.run import resolve_device
from membench.similarity.search import nearest
from membench.specs import DataCard


def memorised_share(dataset: Dataset) -> Probe:
    """The l2 ratio (share with d1 / d2 < 1/3) of images against members and held-out twin."""

    def probe(images: np.ndarray) -> dict[str, float]:
        return {
            f"l2_ratio_{name}": float(
                ratio_hits(nearest(images, reference.images, 2).distance).mean()
            )
            for name, reference in (
                ("members", dataset.members),
                ("heldout", dataset.heldout_twin),
            )
        }

    return probe


def train_target(
    registry: Registry,
    card: DataCard,
    name: str,
    results: Path,
    *,
    device: str,
    resume: bool,
) -> Path:
    """Train one target of a card and return its folder."""
    recipe = card.targets[name]
    dataset = load_dataset(card, registry.data_folder(card.name))
    folder = results / "targets" / card.name / name
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    share = memorised_share(dataset)
    steps = recipe.training.last_step
    with (
        writing(folder),
        locked(folder / ".lock"),
        Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=300
        ) as progress,
    ):
        task = progress.add_task(f"{card.name}/{name}", total=steps, loss=float("nan"))
        smooth: list[float] = []
        latest = 0

        def report(step: int, loss: float) -> None:
            nonlocal latest
            latest = step
            smooth.append(loss)
            del smooth[:-100]
            progress.update(task, completed=step, loss=sum(smooth) / len(smooth))

        def probe(images: np.ndarray) -> dict[str, float]:
            found = share(images)
            console.print(
                f"step {latest}: loss {sum(smooth) / len(smooth):.4f}, "
                f"d1/d2 < 1/3 in {found['l2_ratio_members']:.1%} of {len(images)} samples "
                f"(held-out {found['l2_ratio_heldout']:.1%})",
                highlight=False,
            )
            return found

        log = train(
            recipe,
            card.images,
            dataset.members.images,
            card.splits.members.images_sha256,
            folder,
            probe=probe,
            resume=resume,
            device=resolve_device(device),
            report=report,
        )
    console.print(
        f"{folder / WEIGHTS}: {log['parameters']:,} parameters, "
        f"SHA-256 {log['weights_sha256']}, {log['seconds']:.0f} s of training",
        highlight=False,
        soft_wrap=True,
    )
    return folder
