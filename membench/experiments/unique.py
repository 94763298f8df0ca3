"""Unique matches against the number of images N_G (SIDE, "the importance of N_G")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from membench.errors import MembenchError
from membench.experiments.common import Result, Setting, facts, run_all
from membench.experiments.figures import draw_unique
from membench.metrics import richness
from membench.metrics.calibration import Calibration
from membench.metrics.extracted import in_band
from membench.metrics.intervals import CRITICAL
from membench.run import Cell

NAME = "unique"
POINTS = 40
"""Numbers of images at which curves are computed."""
BEYOND = 2
"""Extrapolation goes to this many times the images."""


def cells(setting: Setting, scale: float | None) -> list[Cell]:
    """A cell of one seed at one guidance scale."""
    found = setting.cells(None if scale is None else (scale,))
    if len(found) > 1:
        raise MembenchError("--seeds: the experiment takes one seed and its first N_G images")
    if len(found[0].images) > 1:
        scales = ", ".join(f"{s:g}" for s in found[0].images)
        raise MembenchError(f"--guidance-scale: choose one of {scales}, or another")
    return found


@dataclass(frozen=True)
class _Side:
    """The matches of all images with one reference, and the images in their order."""

    found: sparse.csr_array

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.asarray(self.found.sum(axis=0)).ravel().astype(np.int64)

    def measured(self, size: int) -> int:
        """Unique matches of the first `size` images."""
        return int(np.count_nonzero(np.asarray(self.found[:size].sum(axis=0)).ravel()))


def unique(prepared: Sequence[Cell], mode: str, level: str) -> Result:
    """UMS measured on the first n images, rarefied exactly, by the papers' formula, and beyond.

    The images come in random order, so that the first n are a random subset: the measured points
    lie in the band of the exact variance in 95 % of cases. Beyond N_G everything is extrapolation
    and marked so; the same from the first half of the images is beside what was then measured.
    """
    (cell,) = prepared
    row = run_all(prepared)
    record = row.records[0]
    matches = cell.lab.store.get(next(iter(cell.matches.values())))
    values = Calibration.from_dict(record["calibration"]).values
    band = matches.measure.bands(mode, values)[level]  # type: ignore[arg-type]
    if band is None:
        reason = record["scores"]["average"]["bands"][mode][level]["reason"]
        raise MembenchError(f"no {mode} {level} band: {reason}")
    sides = {}
    for name in ("members", "heldout"):
        image, reference, _ = in_band(matches, band, name, cell.similarity.match)
        rows = matches.side(name).rows
        sides[name] = _Side(richness.incidence(image, reference, len(matches), rows))
    n = len(matches)
    lines = [_inside(sides, size, n) for size in sizes(n)]
    lines += [_beyond(sides["members"], size, n) for size in sizes(BEYOND * n) if size >= n]
    members = sides["members"]
    multiple = np.asarray(members.found.sum(axis=1)).ravel()
    chao = richness.chao1(members.counts, n)
    made_of = facts(prepared, row.records) | {
        "experiment": NAME,
        "band": f"{mode}:{level}",
        "scale": next(iter(cell.images)),
        "n_members": matches.members.n,
        "unique": members.measured(n),
        "singletons": int((members.counts == 1).sum()),
        "doubletons": int((members.counts == 2).sum()),
        "images_with_a_match": int((multiple > 0).sum()),
        "images_with_several": int((multiple > 1).sum()),
        "chao1": chao.value,
        "chao1_interval": list(chao.interval),
        "from_half": _from_half(members, n),
    }
    title = f"{cell.spec.method} on {cell.spec.dataset} / {cell.spec.target}, {mode} {level}"
    figure = draw_unique(lines, made_of, title)
    return Result(NAME, lines, figure, made_of, _reading(lines, made_of))


def sizes(n: int) -> list[int]:
    """About `POINTS` evenly spaced numbers of images up to n; n and n / 2 among them."""
    return sorted({max(1, round(n * i / POINTS)) for i in range(1, POINTS + 1)} | {n // 2 or 1})


def _inside(sides: dict[str, _Side], size: int, n: int) -> dict[str, Any]:
    members, heldout = sides["members"], sides["heldout"]
    rarefied = richness.rarefied(members.counts, n, size)
    half = CRITICAL * math.sqrt(richness.rarefied_variance(members.found, size))
    return {
        "images": size,
        "kind": "measured",
        "measured": members.measured(size),
        "rarefied": rarefied,
        "rarefied_low": max(0.0, rarefied - half),
        "rarefied_high": rarefied + half,
        "unconditional_sd": richness.unconditional_variance(members.counts, n, size) ** 0.5,
        "with_replacement": richness.with_replacement(members.counts, n, size),
        "measured_heldout": heldout.measured(size),
        "rarefied_heldout": richness.rarefied(heldout.counts, n, size),
        "chao": None,
        "good_toulmin": None,
        "good_toulmin_low": None,
        "good_toulmin_high": None,
    }


def _beyond(members: _Side, size: int, n: int) -> dict[str, Any]:
    toulmin = richness.good_toulmin(members.counts, n, size)
    empty = dict.fromkeys(_inside({"members": members, "heldout": members}, 1, n))
    return empty | {
        "images": size,
        "kind": "extrapolated",
        "with_replacement": richness.with_replacement(members.counts, n, size),
        "chao": richness.extrapolated(members.counts, n, size),
        "good_toulmin": toulmin.value,
        "good_toulmin_low": toulmin.interval[0],
        "good_toulmin_high": toulmin.interval[1],
    }


def _from_half(members: _Side, n: int) -> dict[str, Any] | None:
    """What the first half of the images predicts for all, beside what all show."""
    half = n // 2
    if half < 2:
        return None
    counts = np.asarray(members.found[:half].sum(axis=0)).ravel().astype(np.int64)
    toulmin = richness.good_toulmin(counts, half, 2 * half)
    return {
        "images": half,
        "predicts": 2 * half,
        "measured": members.measured(2 * half),
        "good_toulmin": toulmin.value,
        "good_toulmin_interval": list(toulmin.interval),
        "chao": richness.extrapolated(counts, half, 2 * half),
    }


def _reading(lines: list[dict[str, Any]], made_of: dict[str, Any]) -> list[str]:
    inside = [line for line in lines if line["kind"] == "measured"]
    # at N_G itself the band has no width and the point is on the curve
    free = [line for line in inside if line["rarefied_high"] - line["rarefied_low"] > 1e-9]
    within = sum(
        line["rarefied_low"] - 1e-9 <= line["measured"] <= line["rarefied_high"] + 1e-9
        for line in free
    )
    end = inside[-1]
    n, found = end["images"], end["measured"]
    low, high = made_of["chao1_interval"]
    text = [
        f"{found:,} of {made_of['n_members']:,} training images in {n:,} images (UMS "
        f"{100 * found / n:.1f} %, held-out {100 * end['measured_heldout'] / n:.1f} %)",
        f"measured within the exact band at {within} of {len(free)} sizes",
        f"the papers' formula gives {end['with_replacement']:.1f} at N_G, "
        f"{100 * (end['with_replacement'] / found - 1 if found else 0):+.1f} %",
        f"extrapolated (Chao): at least {made_of['chao1']:.0f} [{low:.0f}, {high:.0f}] in the end",
    ]
    half = made_of["from_half"]
    if half is not None:
        low, high = half["good_toulmin_interval"]
        text.append(
            f"from the first {half['images']:,} images: Good-Toulmin {half['good_toulmin']:.0f} "
            f"[{low:.0f}, {high:.0f}], Chao {half['chao']:.0f}; measured {half['measured']:,}"
        )
    return text
