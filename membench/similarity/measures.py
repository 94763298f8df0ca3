"""How near a pair is, from L2 distances: normalised L2 of pixels, or SSCD's cosine.

Both are functions of the distances from one image to its nearest references, so that one exact
search and one file of matches serve both. Lower normalised L2 is nearer; higher SSCD is nearer.
Where only the order matters, code uses `far`: the score turned so that lower is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError

LEVELS = ("low", "mid", "high")
Mode = Literal["calibrated", "cumulative", "literal", "shifted"]
MODES: tuple[Mode, ...] = ("calibrated", "cumulative", "literal", "shifted")
Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

ALPHA = 0.5
"""Weight of the mean neighbour distance in `nl2` (Carlini et al. 2023)."""


def nl2(distance: NDArray[Any]) -> Scores:
    """Normalised L2 of every listed pair, [Q, n] from ascending distances [Q, n]; lower is nearer.

        nL2_j = d_j / (alpha * mean(d_1 .. d_n)),   alpha = 0.5,   range of nL2_1: [0, 2]

    Where the mean is 0, all n neighbours are exact copies, and their score is 0.
    The mean is summed neighbour by neighbour, so that every machine gets the same bits.
    Source: Carlini et al. 2023 (Extracting Training Data from Diffusion Models), as in AMG, eq. 8.
    Raises MembenchError for NaN or an empty array.
    """
    unit = nl2_unit(distance)[:, None]
    d = distance.astype(np.float64)
    return np.divide(d, unit, out=np.zeros_like(d), where=unit > 0)


def nl2_unit(distance: NDArray[Any]) -> Scores:
    """The distance that is nL2 = 1 for each image: alpha * mean(d_1 .. d_n), [Q] from [Q, n]."""
    if distance.ndim != 2 or distance.size == 0 or not np.isfinite(distance).all():
        raise MembenchError("normalised L2 needs finite distances of shape [Q, n]")
    mean = np.zeros(len(distance))
    for column in distance.astype(np.float64).T:
        mean += column
    return ALPHA * (mean / distance.shape[1])


def sscd(distance: NDArray[Any]) -> Scores:
    """gamma = <f(x), f(y)> = 1 - d^2 / 2 of unit descriptors at distances d; higher is nearer.

    Any shape; the float32 distances of a matches file move gamma by less than 2.4e-7.
    Source: Pizzi et al. 2022 (A Self-Supervised Descriptor for Image Copy Detection).
    """
    if not np.isfinite(distance).all():
        raise MembenchError("SSCD needs finite distances")
    return np.asarray(np.clip(1 - distance.astype(np.float64) ** 2 / 2, -1, 1))


@dataclass(frozen=True)
class Band:
    """Scores that count as a match: lower <= s <= upper; an edge that is `open` does not count."""

    lower: float | None
    upper: float | None
    open_below: bool = False
    open_above: bool = False

    def contains(self, score: Scores) -> Mask:
        inside = np.ones(score.shape, np.bool_)
        if self.upper is not None:
            inside &= score < self.upper if self.open_above else score <= self.upper
        if self.lower is not None:
            inside &= score > self.lower if self.open_below else score >= self.lower
        return inside

    def __str__(self) -> str:
        """`[0.4, 0.5)`, `<= 1.4`, `>= 0.6`."""
        if self.lower is None:
            return f"{'<' if self.open_above else '<='} {self.upper:g}"
        if self.upper is None:
            return f"{'>' if self.open_below else '>='} {self.lower:g}"
        left, right = "(" if self.open_below else "[", ")" if self.open_above else "]"
        return f"{left}{self.lower:g}, {self.upper:g}{right}"


@dataclass(frozen=True)
class Measure:
    """A similarity: its scores, which end is near, and the papers' thresholds.

    name: in cards and records; symbol: in tables; sign: 1 if lower is nearer, -1 if higher is;
    thresholds: the papers' low, mid and high; edge: the last score of the widest printed band;
    curve: the thresholds of curves, from the strictest on.
    """

    name: str
    symbol: str
    sign: int
    thresholds: Mapping[str, float]
    edge: float
    default_mode: Mode
    curve: tuple[float, ...]
    score: Callable[[NDArray[Any]], Scores]

    def far(self, score: Any) -> Any:
        """Scores turned so that lower is nearer; its own inverse."""
        return score if self.sign == 1 else -score

    def up_to(self, threshold: float) -> Band:
        """The band of everything at least as near as `threshold`."""
        return Band(None, threshold) if self.sign == 1 else Band(threshold, None)

    def bands(
        self, mode: Mode, calibrated: Mapping[str, float | None] | None = None
    ) -> dict[str, Band | None]:
        """The low, mid and high band in a mode; None where no threshold could be calibrated.

        cumulative: everything at least as near as the threshold (default for nL2, where it
        reproduces independent figures).
        literal: as printed. nL2 [1.5, 10], [1.4, 1.5], [1.35, 1.4], of which low holds nearly all;
        SSCD [0.4, 0.5), [0.5, 0.6), [0.6, 1.0] (its default).
        shifted: disjoint and adding up to the cumulative ones; nL2 (1.4, 1.5], (1.35, 1.4],
        <= 1.35. For SSCD the same as literal.
        calibrated: cumulative, with thresholds at given false-match rates (`metrics.calibration`).
        Raises MembenchError for an unknown mode, or if calibrated thresholds are missing.
        """
        if mode not in MODES:
            raise MembenchError(f"band mode must be one of {', '.join(MODES)}, not {mode!r}")
        if mode == "calibrated":
            if calibrated is None:
                raise MembenchError("band mode 'calibrated' needs a calibration")
            tops = {level: calibrated[level] for level in LEVELS}
            return {k: None if t is None else self.up_to(t) for k, t in tops.items()}
        low, mid, high = (self.thresholds[level] for level in LEVELS)
        edges: list[Band | None]
        if mode == "cumulative":
            edges = [self.up_to(t) for t in (low, mid, high)]
        elif self.sign == -1:
            edges = [Band(low, mid, open_above=True), Band(mid, high, open_above=True)]
            edges.append(Band(high, self.edge))
        elif mode == "literal":
            edges = [Band(low, self.edge), Band(mid, low), Band(high, mid)]
        else:
            edges = [Band(mid, low, True), Band(high, mid, True), Band(None, high)]
        return dict(zip(LEVELS, edges, strict=True))

    def distances(self, score: float, listed: NDArray[Any]) -> Scores:
        """The distance at which each image has this score, [Q], from its listed distances [Q, n].

        nL2: score * alpha * mean(d_1 .. d_n); SSCD: sqrt(2 - 2 score), the same for all.
        """
        if self.sign == 1:
            return score * nl2_unit(listed)
        return np.full(len(listed), np.sqrt(max(0.0, 2 - 2 * score)))


NL2 = Measure(
    name="nl2",
    symbol="nL2",
    sign=1,
    thresholds={"low": 1.5, "mid": 1.4, "high": 1.35},
    edge=10.0,
    default_mode="cumulative",
    curve=tuple((np.arange(200) / 100).tolist()),
    score=nl2,
)
SSCD = Measure(
    name="sscd",
    symbol="SSCD",
    sign=-1,
    thresholds={"low": 0.4, "mid": 0.5, "high": 0.6},
    edge=1.0,
    default_mode="literal",
    curve=tuple((np.arange(100, -1, -1) / 100).tolist()),
    score=sscd,
)
MEASURES = {measure.name: measure for measure in (NL2, SSCD)}
