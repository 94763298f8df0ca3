"""Where a run departs from its card: such records are marked and never enter a board."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from membench.specs import DataCard

ELSEWHERE = "images from elsewhere: membench did not draw them"
"""Why records of `membench score` enter no board."""


def departures(identity: Mapping[str, Any], card: DataCard, *, guided: bool) -> list[str]:
    """Every departure, in words, from a record's identity; none for a run that may enter a board.

    guided: whether the method guides at all; without guidance there is one scale, 0.
    """
    asked = card.extraction
    found = []
    if identity["images_per_scale"] != asked.images_per_scale:
        found.append(
            f"{identity['images_per_scale']} images per scale, not {asked.images_per_scale}"
        )
    scales = tuple(float(scale) for scale in identity["guidance_scales"])
    if guided and scales != asked.guidance_scales:
        found.append(f"guidance scales {scales}, not {asked.guidance_scales}")
    if identity["sampling"] != asked.sampling.identity():
        found.append("other sampler settings")
    if identity["label"] is not None:
        found.append(f"label {identity['label']} for every image")
    if identity["similarity"] != card.similarity.identity():
        found.append("another similarity than the card's")
    if identity["attack_seed"] != 0:
        found.append(f"attack seed {identity['attack_seed']}, not 0")
    return found
