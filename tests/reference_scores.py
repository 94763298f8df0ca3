"""Reference scores: `python tests/reference_scores.py` writes reference_scores.json.

It refuses to replace a score whose metric has kept its version.
"""

import json
import sys
from pathlib import Path

import numpy as np

from membench.metrics import METRIC_VERSIONS, average, calibrate, score
from membench.metrics.image import match_counts, matched, rarefied
from membench.similarity import match, nearest, nl2

PATH = Path(__file__).with_suffix(".json")


def compute():
    """Scores of 60 images: a third noisy copies of members, the rest strangers; two scales."""
    rng = np.random.default_rng(20240607)
    faces = rng.integers(40, 216, (500, 8, 8, 1))
    members, heldout, null, strangers = (
        faces[a:b].astype(np.uint8) for a, b in ((0, 120), (120, 240), (240, 460), (460, 500))
    )
    scales = []
    for noise in (20, 60):
        copies = faces[rng.integers(0, 30, 20)] + rng.integers(-noise, noise + 1, (20, 8, 8, 1))
        images = np.concatenate([copies.clip(0, 255).astype(np.uint8), strangers])
        scales.append(match(images, members, heldout))
    null = nearest(null, members).distance
    calibration = calibrate(nl2(null[null[:, 0] > 0.5])[:, 0], len(members))
    modes = ("calibrated", "cumulative", "literal", "shifted")
    first = scales[0].members.listed
    phi = matched(nl2(first.distance) <= 1.5, "any")
    counts = match_counts(phi, first.index, len(members))
    return {
        "versions": METRIC_VERSIONS,
        "calibration": calibration.to_dict(),
        "score_any": score(scales[0], calibration, modes=modes),
        "score_best": score(scales[0], calibration, match="best", modes=modes),
        "average": average(scales, calibration, modes=modes),
        "rarefied_ums": [rarefied(counts, 60, n) / n for n in (1, 10, 30, 60)],
    }


def differences(old, new, path=""):
    """Paths at which two results differ by more than rounding."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif isinstance(old, int | float) and isinstance(new, int | float):
        if not np.isclose(old, new, rtol=1e-9, atol=1e-12):
            yield f"{path}: {old} became {new}"
    elif old != new:
        yield f"{path}: {old} became {new}"


if __name__ == "__main__":
    new = compute()
    if PATH.exists():
        old = json.loads(PATH.read_text())
        changed = list(differences(old, new))
        if changed and old["versions"] == new["versions"]:
            sys.exit("\n".join([*changed, "raise the version of every metric that changed"]))
    PATH.write_text(json.dumps(new, indent=1) + "\n")
