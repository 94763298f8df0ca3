"""From saved matches to scores: what `run` writes and `verify` repeats. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from membench.metrics.calibration import Calibration, calibrate
from membench.metrics.image import bands
from membench.metrics.intervals import clopper_pearson
from membench.metrics.scores import average, score
from membench.similarity.matches import Matches, nl2
from membench.specs import Similarity


def calibrate_from(null: Matches, similarity: Similarity, pixels: int) -> Calibration:
    """Thresholds from the nearest members of real held-out images, near-duplicates left out.

    pixels: numbers in one image, which turn the card's RMSE into a distance.
    """
    return calibrate(
        null.members,
        null.n_members,
        rates=similarity.false_match_rates.model_dump(),
        copy_distance=copy_distance(similarity, pixels),
    )


def copy_distance(similarity: Similarity, pixels: int) -> float:
    """The card's RMSE of a near-duplicate as an L2 distance."""
    return similarity.near_duplicate_rmse * pixels**0.5


def fixed_band_rates(null: Matches, similarity: Similarity, pixels: int) -> dict[str, Any]:
    """How often real held-out images, whom nobody trained on, reach the papers' fixed bands.

    The images are those that calibrate: without near-duplicates of members.

    {mode: {level: {"upper", "rate", "interval"}}} for every mode of the card but the calibrated.
    """
    keep = null.members.distance[:, 0] > copy_distance(similarity, pixels)
    best = nl2(null.members.distance[keep])[:, 0]
    rates: dict[str, Any] = {}
    for mode in similarity.band_modes:
        if mode == "calibrated":
            continue
        rates[mode] = {}
        for level, band in bands(mode).items():
            assert band is not None, "only calibrated bands can be missing"
            hits = int(band.contains(best).sum())
            interval = list(clopper_pearson(hits, len(best)))
            rates[mode][level] = {
                "upper": band.upper,
                "rate": hits / len(best),
                "interval": interval,
            }
    return rates


def score_all(
    matches: Mapping[float, Matches], calibration: Calibration, similarity: Similarity
) -> dict[str, Any]:
    """Scores at every scale and their average: a pure function of matches and calibration."""
    options: dict[str, Any] = {"match": similarity.match, "modes": similarity.band_modes}
    return {
        "scales": {f"{s:g}": score(found, calibration, **options) for s, found in matches.items()},
        "average": average(list(matches.values()), calibration, **options),
    }
