"""What scores must obey whatever the run: checked whenever they are written or read."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from itertools import pairwise
from typing import Any

from membench.errors import MembenchError
from membench.similarity.measures import LEVELS

REFERENCES = ("members", "heldout", "members_twin")


def equal_side(sides: Container[str]) -> str:
    """The side that the held-out one is subtracted from: it has as many images."""
    return "members_twin" if "members_twin" in sides else "members"


def check_invariants(scores: dict[str, Any]) -> None:
    """Raises MembenchError, naming the field, if scores contradict themselves.

    No NaN; 0 <= AMS <= 1; unique <= min(N, pairs); every value in its interval; excess = members -
    held-out; cumulative and calibrated bands nested; curves monotone.
    """
    for path, value in _numbers(scores, "scores"):
        if not math.isfinite(value):
            raise MembenchError(f"{path} is {value}")
    for mode, bands in scores["bands"].items():
        for level, band in bands.items():
            _check_band(band, scores, f"bands.{mode}.{level}")
        if mode in ("cumulative", "calibrated"):
            for wider, narrower in pairwise(LEVELS):
                for name in _sides(scores):
                    for key in ("ams", "ums", "pairs"):
                        outer, inner = bands[wider][name][key], bands[narrower][name][key]
                        if outer is not None and inner is not None and inner > outer:
                            raise MembenchError(
                                f"bands.{mode}: {key} of {name} is higher in {narrower} "
                                f"({inner}) than in {wider} ({outer})"
                            )
    for name in _sides(scores):
        for key, points in scores["curve"][name].items():
            curve = [point for point in points if point is not None]
            if points[: len(curve)] != curve:
                raise MembenchError(f"curve.{name}.{key} has a gap")
            if curve != sorted(curve) or (key == "ams" and not 0 <= curve[0] <= curve[-1] <= 1):
                raise MembenchError(f"curve.{name}.{key} is not monotone or not a rate")


def _sides(scores: dict[str, Any]) -> list[str]:
    return [name for name in REFERENCES if f"n_{name}" in scores]


def _check_band(band: dict[str, Any], scores: dict[str, Any], path: str) -> None:
    for name in _sides(scores):
        side = band[name]
        ams, unique = side["ams"], side["unique"]
        if ams is not None and not 0 <= ams <= 1:
            raise MembenchError(f"{path}.{name}.ams is {ams}, not a rate")
        if unique is not None and not 0 <= unique <= min(scores[f"n_{name}"], side["pairs"]):
            raise MembenchError(f"{path}.{name}.unique is {unique}: more than references or pairs")
        if unique is not None and not math.isclose(unique, side["ums"] * scores["n_images"]):
            raise MembenchError(f"{path}.{name}.ums is not unique / n_images")
    for part in (*_sides(scores), "excess"):
        for key in ("ams", "ums"):
            value, interval = band[part][key], band[part][f"{key}_interval"]
            if value is None:
                continue
            if not interval[0] - 1e-12 <= value <= interval[1] + 1e-12:
                raise MembenchError(f"{path}.{part}.{key} = {value} is outside {interval}")
            if part == "excess":
                excess = band[equal_side(band)][key] - band["heldout"][key]
                if not math.isclose(value, excess, abs_tol=1e-12):
                    raise MembenchError(f"{path}.excess.{key} is not members - heldout")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{path}[{i}]")
    elif isinstance(value, int | float):
        yield path, value
