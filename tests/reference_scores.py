"""Reference scores: `python tests/reference_scores.py` writes reference_scores.json.

It refuses to replace a score whose metric has kept its version.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from membench.metrics import (
    METRIC_VERSIONS,
    average,
    calibrate,
    comparison,
    extracted,
    regression,
    richness,
    score,
)
from membench.metrics.catalogue import DERIVED_VERSIONS
from membench.metrics.extracted import in_band
from membench.metrics.image import exclusive, hits, match_counts, matched
from membench.metrics.richness import rarefied
from membench.similarity import SSCD, match, nearest, nl2

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
        "sscd": sscd_scores(),
        "derived": {"versions": DERIVED_VERSIONS} | derived(scales, counts, len(members)),
    }


def sscd_scores():
    """The other similarity: unit descriptors, a third of them near a member's."""
    rng = np.random.default_rng(20261125)
    rows = rng.normal(size=(400, 16))
    rows[:20] = rows[120:140] + 0.5 * rows[:20]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    images, members, heldout, null = rows[:60], rows[120:220], rows[220:320], rows[320:]
    bands = [band for mode in ("literal", "cumulative") for band in SSCD.bands(mode).values()]
    found = match(images, members, heldout, 5, measure=SSCD, widest=0.4, bands=bands)
    best = match(null, members, None, 5, measure=SSCD).scores()[:, 0]
    calibration = calibrate(best, len(members), measure=SSCD)
    modes = ("calibrated", "literal", "cumulative")
    return {"calibration": calibration.to_dict(), "score": score(found, calibration, modes=modes)}


def derived(scales, counts, n):
    """What is computed from matches and records afterwards."""
    found = [in_band(m, m.measure.up_to(1.5)) for m in scales]
    incidence = richness.incidence(found[0][0], found[0][1], 60, n)
    phis = [matched(m.scores() <= 1.5, "any") for m in scales]
    ks = [match_counts(p, m.members.listed.index, n) for p, m in zip(phis, scales, strict=True)]
    sole = [
        exclusive(p, m.members.listed.index, k) for p, m, k in zip(phis, scales, ks, strict=True)
    ]
    one, two = (hits(p)[None] for p in phis)
    both = np.concatenate([one, two])
    differences = [
        comparison.rate_difference(one, two),
        comparison.rate_difference(both, two),
        comparison.unique_difference(
            [int((ks[0] > 0).sum() - (ks[1] > 0).sum())], [sole[0] - sole[1]], 60
        ),
    ]
    chao = richness.chao1(counts, 60)
    toulmin = [richness.good_toulmin(counts, 60, size) for size in (90, 150)]
    return {
        "rarefied_variance": [richness.rarefied_variance(incidence, s) for s in (10, 30, 60)],
        "unconditional_variance": richness.unconditional_variance(counts, 60, 30),
        "with_replacement": [richness.with_replacement(counts, 60, s) for s in (10, 60, 120)],
        "chao1": [chao.value, *chao.interval],
        "extrapolated": [richness.extrapolated(counts, 60, s) for s in (60, 90, 120)],
        "good_toulmin": [[t.value, *t.interval] for t in toulmin],
        "differences": [asdict(d) for d in comparison.holm(differences)],
        "groups": [asdict(g) for g in extracted.by_group(counts, np.arange(n) % 7, 7)],
        "linear_fit": asdict(regression.linear_fit(np.arange(n), counts)),
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
        changed = list(differences(old, {key: new.get(key) for key in old}))  # more may be added
        versions = [(x["versions"], x.get("derived", {}).get("versions")) for x in (old, new)]
        if changed and (versions[0] == versions[1] or versions[0][1] is None):
            sys.exit("\n".join([*changed, "raise the version of every metric that changed"]))
    PATH.write_text(json.dumps(new, indent=1) + "\n")
