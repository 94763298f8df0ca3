"""UMS at fewer images than were drawn, from the incidence that a record keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.metrics.intervals import CRITICAL, Interval
from membench.metrics.richness import rarefied, unconditional_variance
from membench.similarity.measures import LEVELS

Record = Mapping[str, Any]


def rarefied_ums(
    record: Record, level: str, side: str, size: int, scale: str | None = None
) -> tuple[float, Interval] | None:
    """UMS of `size` of a run's images, exact (Hurlbert 1971), and its 95 % interval.

    level: of the headline bands; side: members, heldout or excess; scale: the mean over scales if
    None. The interval is of new images: the variance of Colwell et al. 2012, members' and
    held-out's half-widths added in squares for the excess, those of scales averaged (images of one
    seed are not independent between scales). None where the record keeps no incidence.
    """
    names = ("members", "heldout") if side == "excess" else (side,)
    scales = sorted(record["scores"]["scales"], key=float) if scale is None else [scale]
    parts = []
    for name in scales:
        found = [_at(record, level, one, name, size) for one in names]
        if any(part is None for part in found):
            return None
        values, halves = zip(*(part for part in found if part is not None), strict=True)
        value = values[0] - values[1] if side == "excess" else values[0]
        parts.append((value, math.hypot(*halves)))
    value = math.fsum(v for v, _ in parts) / len(parts)
    half = math.fsum(h for _, h in parts) / len(parts)
    lowest = -math.inf if side == "excess" else 0.0
    return value, (max(lowest, value - half), value + half)


def _at(record: Record, level: str, side: str, scale: str, size: int) -> tuple[float, float] | None:
    counts = counts_of(record, level, side, scale)
    if counts is None:
        return None
    images = record["identity"]["images_per_scale"]
    value = rarefied(counts, images, size) / size
    # z^2 / 2 as in `intervals.unique_difference`: the interval keeps a width at no matches at all
    variance = unconditional_variance(counts, images, size) + CRITICAL**2 / 2
    return value, CRITICAL * math.sqrt(variance) / size


def counts_of(record: Record, level: str, side: str, scale: str) -> NDArray[np.int64] | None:
    """k_j of every reference that is matched at all, in no order; None where it is not kept."""
    found = ((record.get("incidence") or {}).get(level) or {}).get(side) or {}
    if scale not in found:
        return None
    return np.repeat(found[scale]["times"], found[scale]["references"]).astype(np.int64)


def rarefaction_curve(
    record: Record, level: str, side: str, points: int = 24
) -> list[tuple[int, float]] | None:
    """(n, UMS at n images) from 1 to the run's N_G, mean over scales; None without incidence."""
    if level not in LEVELS:
        return None
    images = record["identity"]["images_per_scale"]
    sizes = sorted({1, *np.linspace(1, images, points).round().astype(int).tolist()})
    scales = sorted(record["scores"]["scales"], key=float)
    counts = [counts_of(record, level, side, scale) for scale in scales]
    kept = [part for part in counts if part is not None]
    if len(kept) < len(scales):
        return None
    return [(n, sum(rarefied(part, images, n) for part in kept) / len(kept) / n) for n in sizes]
