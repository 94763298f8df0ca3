"""Targets by name: of a card, in closed form, or a place where somebody's model lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from membench.data.imageset import Dataset
from membench.diffusion.targets import OracleTarget, Target, load_unet_target, parse_oracle
from membench.diffusion.train import WEIGHTS, snapshot, snapshot_steps
from membench.errors import MembenchError
from membench.hub import names_place
from membench.registry import Registry, unknown
from membench.specs import DataCard, TargetRecipe
from membench.specs_pretrained import Pretrained


def resolve_target(
    name: str, card: DataCard, dataset: Dataset, registry: Registry, results: Path, device: str
) -> Target:
    """A target by name: `oracle:RATE`, one of the card's, or a place of a pretrained one.

    Weights of a card's target are the shipped ones if the card names them, else those that
    `membench train` left in the results folder; `NAME@STEP` is a snapshot of that training. A place
    is a diffusers folder, a hub id, or a TOML file (`membench.diffusion.pretrained.parse_place`).
    """
    rate = parse_oracle(name)
    if rate is not None:
        return OracleTarget(dataset, rate, device=device)
    labels = dataset.members.labels
    plain, at, step = name.partition("@")
    if at and plain in card.targets:
        recipe = card.recipe(plain).model_copy(update={"weights_sha256": None})
        weights = snapshot_of(card, plain, step, results)
        return load_unet_target(recipe, card.images, weights, device, name, labels)
    found = card.targets.get(name)
    if isinstance(found, Pretrained) or (found is None and names_place(name)):
        from membench.diffusion.pretrained import as_target, parse_place, read_pretrained

        own = None if found is None else name
        spec, folders = parse_place(name) if found is None else (found, None)
        model = read_pretrained(spec, folders or places_of(card, name, registry, results))
        return as_target(model, spec.condition, card.images, labels, name=own, device=device)
    if found is None:
        known = [*card.targets, "oracle:RATE", "NAME@STEP", "a folder"]
        raise unknown(f"target of {card.name}", name, known)
    weights = weights_of(card, name, registry, results)
    return load_unet_target(found, card.images, weights, device=device, name=name, labels=labels)


def weights_of(card: DataCard, name: str, registry: Registry, results: Path) -> Path:
    """Where the weights of a recipe lie: shipped, or left by `membench train`."""
    recipe = card.recipe(name)
    if recipe.weights is not None:
        return registry.card_folder(card.name) / recipe.weights
    weights = trained_folder(card, name, results) / WEIGHTS
    if not weights.is_file():
        raise MembenchError(
            f"target {name!r} of {card.name} has no weights yet ({weights} is missing); "
            f"train it: membench train {card.name} --target {name}"
        )
    return weights


def snapshot_of(card: DataCard, name: str, step: str, results: Path) -> Path:
    """The weights that `membench train --snapshots` kept at one step."""
    trained = trained_folder(card, name, results)
    weights = snapshot(trained, step)
    if not (step.isdigit() and weights.is_file()):
        kept = ", ".join(snapshot_steps(trained)) or "none"
        raise MembenchError(
            f"target {name}@{step} of {card.name}: no such snapshot, there are: {kept}; keep one: "
            f"membench train {card.name} --target {name} --snapshots STEP"
        )
    return weights


def places_of(card: DataCard, name: str, registry: Registry, results: Path) -> list[Path]:
    """Where a card's pretrained target may lie: beside the card's data, or among the results."""
    return [registry.card_folder(card.name), trained_folder(card, name, results)]


def trained_folder(card: DataCard, name: str, results: Path) -> Path:
    """Where `membench train` leaves a target of a card."""
    return results / "targets" / card.name / name


def to_train(card: DataCard, name: str, results: Path) -> str | None:
    """The recipe that must be trained first for a target's weights to be there; None: nothing.

    name: a recipe's, or `NAME@STEP` of a snapshot that the recipe says to keep.
    """
    plain, at, step = name.partition("@")
    recipe = card.targets.get(plain)
    if not isinstance(recipe, TargetRecipe):
        return None
    folder = trained_folder(card, plain, results)
    if (folder / WEIGHTS).is_file():
        return None
    if not at:
        return plain if recipe.weights is None else None
    kept = step in map(str, recipe.training.snapshots)
    return plain if kept and not snapshot(folder, step).is_file() else None


def origin_of(target: Target) -> dict[str, Any]:
    """Where a pretrained target came from, for the provenance; nothing of other targets."""
    source = getattr(target, "source", None)
    return {} if source is None else {"target": source}
