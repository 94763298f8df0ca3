"""What all experiments share: cells, their plan, the folder they write, and published figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.errors import MembenchError
from membench.extraction import write_csv
from membench.files import replace_atomically, write_json, writing
from membench.lab import Progress
from membench.registry import Registry, package_folder
from membench.report.records import Row
from membench.run import Cell, prepare, run
from membench.similarity.measures import LEVELS
from membench.store import Stage


@dataclass(frozen=True)
class Setting:
    """Which cells an experiment is made of, before the one thing that it varies."""

    registry: Registry
    results: Path
    progress: Progress
    method: str
    dataset: str
    target: str | None = None
    images: int | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    attack_seed: int = 0
    device: str = "auto"

    def cells(
        self,
        guidance_scales: tuple[float, ...] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> list[Cell]:
        """One cell for each seed; nothing is computed yet."""
        return [
            prepare(
                self.registry, self.results, self.progress, method=self.method,
                dataset=self.dataset, target=self.target, settings=settings,
                guidance_scales=guidance_scales, images=self.images, steps=self.steps, seed=seed,
                attack_seed=self.attack_seed, device=self.device,
            )
            for seed in self.seeds
        ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What an experiment found: a table, a figure (SVG), sentences, and where they come from."""

    name: str
    rows: list[dict[str, Any]]
    figure: str
    facts: dict[str, Any]
    reading: list[str]

    def write(self, folder: Path) -> list[Path]:
        """NAME.csv, NAME.svg and NAME.json in a folder; returns their paths."""
        with writing(folder):
            table, figure, facts = (folder / f"{self.name}.{end}" for end in ("csv", "svg", "json"))
            write_csv(table, self.rows)
            replace_atomically(figure, lambda to: to.write_text(self.figure, encoding="utf-8"))
            write_json(facts, self.facts | {"reading": self.reading})
        return [table, figure, facts]


def plan(cells: Iterable[Cell]) -> list[Stage]:
    """The stages of all cells, each once: what is cached and what will be computed."""
    found: dict[str, Stage] = {}
    for cell in cells:
        for stage in cell.plan():
            found.setdefault(stage.key, stage)
    return list(found.values())


def run_all(cells: Sequence[Cell]) -> Row:
    """Run cells that differ by seed alone; what is in the store is taken from there."""
    return Row(cells[0].method.name, tuple(run(cell) for cell in cells))


def facts(cells: Sequence[Cell], records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a result was made of, for NAME.json."""
    spec = cells[0].spec
    return {
        "dataset": spec.dataset,
        "target": spec.target,
        "method": spec.method,
        "images_per_scale": spec.images_per_scale,
        "seeds": sorted({cell.spec.seed for cell in cells}),
        "similarity": cells[0].similarity.name,
        "sampling": spec.sampling.identity(),
        "records": sorted(record["id"] for record in records),
    }


def title(cells: Sequence[Cell]) -> str:
    """`side_c on fashion_mini / ddpm, 256 images a scale, 3 seeds`: the head of a figure."""
    spec = cells[0].spec
    seeds = len({cell.spec.seed for cell in cells})
    more = "" if seeds == 1 else f", {seeds} seeds"
    images = f"{spec.images_per_scale:,} images a scale{more}"
    return f"{spec.method} on {spec.dataset} / {spec.target}, {images}"


def parse_band(text: str, modes: Sequence[str]) -> tuple[str, str]:
    """`mid` or `cumulative:low` as mode and level; the card's headline mode if it is not named."""
    mode, _, level = text.rpartition(":")
    mode = mode or modes[0]
    if level not in LEVELS or mode not in modes:
        raise MembenchError(
            f"--band {text}: expected low, mid or high, as in mid or {modes[-1]}:mid; "
            f"modes of this data set: {', '.join(modes)}"
        )
    return mode, level


def published(name: str, dataset: str) -> list[dict[str, str]]:
    """Printed figures of one data set from `datasets/published/NAME.csv`; none if there are none.

    They were measured elsewhere, with other images, similarity and bands: shown beside, not ranked.
    """
    path = package_folder("membench_datasets") / "published" / f"{name}.csv"
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            return [row for row in csv.DictReader(stream) if row["dataset"] == dataset]
    except FileNotFoundError:
        raise MembenchError(f"{path}: missing; install membench again") from None


def known_published(name: str, dataset: str | None, own: str) -> list[dict[str, str]]:
    """Figures of the data set that a user asked to see beside, or of its own, if there are any."""
    found = published(name, dataset or own)
    if dataset and not found:
        raise MembenchError(f"--published {dataset}: nothing is printed for it in {name}.csv")
    return found
