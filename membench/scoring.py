"""From saved matches to scores: what `run` writes and `verify` repeats. Needs no torch."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.metrics.calibration import Calibration, calibrate
from membench.metrics.intervals import clopper_pearson
from membench.metrics.scores import BandCounts, average, count_band, score
from membench.similarity.matches import Matches
from membench.similarity.measures import LEVELS
from membench.specs import Similarity


def calibrate_from(null: Matches, keep: NDArray[np.bool_], similarity: Similarity) -> Calibration:
    """Thresholds from the nearest members of real held-out images.

    keep: bool [H], which of them make the null (`Facts.null_rows`).
    """
    return calibrate(
        null.scores()[keep, 0],
        null.n_members,
        measure=null.measure,
        rates=similarity.false_match_rates.model_dump(),
        n_dropped=int((~keep).sum()),
    )


def null_facts(null: Matches, keep: NDArray[np.bool_], similarity: Similarity) -> dict[str, Any]:
    """How often real held-out images, whom nobody trained on, match a member all the same.

    The images are those that calibrate. {"bands": {mode: {level: {"lower", "upper", "rate",
    "interval"}}}} for every fixed mode of the similarity, and {"curve": {"threshold", "rate"}}: the
    false-match rate at every threshold of the scores' own curve.
    """
    measure = null.measure
    best = null.scores()[keep, 0]
    found: dict[str, Any] = {}
    for mode in similarity.band_modes:
        if mode == "calibrated":
            continue
        found[mode] = {}
        for level, band in measure.bands(mode).items():
            assert band is not None, "only calibrated bands can be missing"
            hits = int(band.contains(best).sum())
            found[mode][level] = {
                "lower": band.lower,
                "upper": band.upper,
                "rate": hits / len(best),
                "interval": list(clopper_pearson(hits, len(best))),
            }
    far = np.sort(measure.far(best))
    below = np.searchsorted(far, [measure.far(t) for t in measure.curve], side="right")
    curve = {"threshold": list(measure.curve), "rate": (below / len(best)).tolist()}
    return {"bands": found, "curve": curve}


def score_all(
    matches: Mapping[float, Matches], calibration: Calibration, similarity: Similarity
) -> dict[str, Any]:
    """Scores at every scale and their average: a pure function of matches and calibration."""
    options: dict[str, Any] = {"match": similarity.match, "modes": similarity.band_modes}
    return {
        "scales": {f"{s:g}": score(found, calibration, **options) for s, found in matches.items()},
        "average": average(list(matches.values()), calibration, **options),
    }


def per_image(
    matches: Mapping[float, Matches], calibration: Calibration, similarity: Similarity
) -> dict[str, Any]:
    """What paired comparisons need of every image, for the headline bands: F(x_i) and a_i.

    {level: {side: {scale: {"hits": bits, "exclusive": counts}}}}, packed
    (`pack_bits`, `pack_counts`); a level without a threshold is missing, and so are counts of bands
    whose pairs are not all known.
    """
    found: dict[str, Any] = {}
    for level, name, scale, counted in _headline(matches, calibration, similarity):
        packed: dict[str, Any] = {"hits": pack_bits(counted.hits)}
        if counted.known:
            packed["exclusive"] = pack_counts(counted.exclusive)
        found.setdefault(level, {}).setdefault(name, {})[scale] = packed
    return found


def incidence(
    matches: Mapping[float, Matches], calibration: Calibration, similarity: Similarity
) -> dict[str, Any]:
    """How often each reference is matched, for the headline bands: what rarefied UMS needs.

    {level: {side: {scale: {"times": [...], "references": [...]}}}}: so many references are matched
    by exactly so many images. Levels without a threshold and bands whose pairs are not all known
    are missing.
    """
    found: dict[str, Any] = {}
    for level, name, scale, counted in _headline(matches, calibration, similarity):
        if counted.known:
            times, references = np.unique(counted.counts[counted.counts > 0], return_counts=True)
            found.setdefault(level, {}).setdefault(name, {})[scale] = {
                "times": times.tolist(),
                "references": references.tolist(),
            }
    return found


def _headline(
    matches: Mapping[float, Matches], calibration: Calibration, similarity: Similarity
) -> Iterator[tuple[str, str, str, BandCounts]]:
    """(level, side, scale, counts) of the headline bands that have a threshold."""
    any_of_them = next(iter(matches.values()))
    bands = any_of_them.measure.bands(similarity.band_modes[0], calibration.values)
    for level in LEVELS:
        band = bands[level]
        if band is None:
            continue
        for name in any_of_them.sides:
            for scale, of_scale in matches.items():
                yield level, name, f"{scale:g}", count_band(of_scale, name, band, similarity.match)


def pack_bits(values: NDArray[np.bool_]) -> str:
    """Truth values [Q] as base64 of bits, the first one highest."""
    return base64.b64encode(np.packbits(values).tobytes()).decode()


def unpack_bits(text: str, count: int) -> NDArray[np.bool_]:
    """The `count` values that `pack_bits` packed."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    return np.unpackbits(packed, count=count).astype(np.bool_)


def pack_counts(values: NDArray[Any]) -> dict[str, list[int]]:
    """Small non-negative counts [Q], most of them 0: the images that have one, and theirs."""
    image = np.flatnonzero(values)
    return {"image": image.tolist(), "count": np.asarray(values)[image].tolist()}


def unpack_counts(packed: Mapping[str, list[int]], count: int) -> NDArray[np.int64]:
    """The `count` values that `pack_counts` packed."""
    values = np.zeros(count, np.int64)
    values[packed["image"]] = packed["count"]
    return values
