"""What `membench targets` does: show a model, turn pickled weights into safe ones, export ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from membench.data.imageset import load_dataset
from membench.errors import MembenchError
from membench.files import replace_atomically, writing
from membench.hashing import file_hash
from membench.registry import Registry, unknown
from membench.specs import DataCard
from membench.specs_pretrained import Pretrained
from membench.targets import places_of, weights_of


def show(registry: Registry, text: str, results: Path, dataset: str | None) -> dict[str, Any]:
    """Everything about a pretrained model (a place, or DATASET/TARGET of a card), JSON-able.

    dataset: the one it shall fit; without it, `fits` lists all data sets of its shape.
    """
    from membench.diffusion.pretrained import parse_place, read_pretrained, summary

    name, _, target = text.partition("/")
    if name in registry.datasets and not Path(text).exists():
        card = registry.card(name)
        if target not in card.targets:
            raise unknown(f"target of {name}", target, card.targets)
        found = card.targets[target]
        if not isinstance(found, Pretrained):
            return _show_recipe(registry, card, target, results)
        spec, folders, dataset = found, places_of(card, target, registry, results), dataset or name
    else:
        spec, folders = parse_place(text)
    model = read_pretrained(spec, folders)
    found_facts = summary(model) | {"condition": spec.condition}
    if dataset is not None:
        return found_facts | {"fits": {dataset: _fit(model.misfit(registry.card(dataset).images))}}
    cards = [card for card in registry.all_cards() if isinstance(card, DataCard)]
    fits = [card.name for card in cards if model.misfit(card.images) is None]
    return found_facts | {"fits": fits or "no data set that membench knows"}


def _fit(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def _network(registry: Registry, card: DataCard, name: str, results: Path) -> tuple[Any, Path]:
    """The trained U-Net of a recipe and its file of weights."""
    from membench.diffusion.targets import load_unet_target

    recipe = card.recipe(name)
    labels = None
    if recipe.condition != "none":
        data = load_dataset(card, registry.data_folder(card.name))
        card, labels = data.card, data.members.labels
    weights = weights_of(card, name, registry, results)
    return load_unet_target(recipe, card.images, weights, labels=labels).network, weights


def _show_recipe(registry: Registry, card: DataCard, name: str, results: Path) -> dict[str, Any]:
    from membench.diffusion.unet import count_parameters

    recipe, images = card.recipe(name), card.images
    network, weights = _network(registry, card, name, results)
    return {
        "name": name,
        "title": recipe.title,
        "layout": "a recipe of membench",
        "architecture": "UNet2DModel",
        "parameters": count_parameters(network),
        "images": f"{images.height} x {images.width} pixels, {images.channels} channel(s)",
        "condition": recipe.condition,
        "prediction_type": "epsilon",
        "train_timesteps": recipe.train_timesteps,
        "schedule": {"beta_schedule": recipe.beta_schedule},
        "weights": str(weights),
        "weights_bytes": weights.stat().st_size,
        "weights_sha256": file_hash(weights),
        "fits": [card.name],
    }


def convert(source: Path, sha256: str | None, out: Path) -> str:
    """Write the tensors of a pickled checkpoint as safetensors; returns the new file's SHA-256.

    sha256: of `source`, compared before anything is unpickled; only tensors are (`weights_only`).
    """
    from safetensors.torch import save_file

    from membench.diffusion.weights import SAFE, read_weights

    if out.suffix != SAFE:
        raise MembenchError(f"{out}: expected a name that ends in {SAFE}")
    if out.exists():
        raise MembenchError(f"{out}: there already; delete it, or choose another --out")
    if sha256 is None:
        if not source.is_file():
            raise MembenchError(f"{source}: no such weights file")
        raise MembenchError(
            f"{source}: give --sha256; the file's is {file_hash(source)}, which should be what its "
            "publisher says"
        )
    tensors, _ = read_weights(source, sha256, allow_pickle=True)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with writing(out.parent, "--out"):
        replace_atomically(out, lambda partial: save_file(whole, partial))
    return file_hash(out)


def export(registry: Registry, text: str, results: Path, out: Path) -> Path:
    """Write a target that membench trained as a diffusers `DDPMPipeline` folder; returns it."""
    from diffusers import DDPMPipeline, DDPMScheduler

    name, _, target = text.partition("/")
    card = registry.card(name)
    if target not in card.targets:
        raise unknown(f"target of {name}", target, card.targets)
    recipe = card.recipe(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MembenchError(f"{out}: not an empty folder; choose another --out")
    network, _ = _network(registry, card, target, results)
    scheduler = DDPMScheduler(
        num_train_timesteps=recipe.train_timesteps, beta_schedule=recipe.beta_schedule
    )
    with writing(out, "--out"):
        DDPMPipeline(network, scheduler).save_pretrained(out)
    return out
