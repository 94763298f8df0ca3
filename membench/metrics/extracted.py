"""Which training images were extracted: how often, at which guidance scale, of which class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.metrics import image as image_level
from membench.metrics.image import Match
from membench.metrics.intervals import Interval, clopper_pearson
from membench.similarity.matches import Matches
from membench.similarity.measures import Band

Pairs = tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]
"""Matches in a band: image [P], reference [P] and score [P]."""


def in_band(matches: Matches, band: Band, side: str = "members", match: Match = "any") -> Pairs:
    """Every pair in a band, phi of spec section 4: sorted by image, then nearness.

    Raises MembenchError if the file of matches does not hold every pair of the band.
    """
    found = matches.side(side)
    if match == "any" and not matches.covers(band, side):
        raise MembenchError(f"the saved matches do not hold every pair in the band {band}")
    score = matches.scores(side)
    phi = image_level.matched(band.contains(score), match)
    row, column = np.nonzero(phi)
    pairs: Pairs = (row, found.listed.index[row, column], score[row, column])
    more = matches.scores_beyond(side)
    if match == "best" or not len(more):
        return pairs
    keep = band.contains(more)
    beyond = (found.beyond.image[keep], found.beyond.index[keep], more[keep])
    image, reference, nearness = (np.concatenate([pairs[i], beyond[i]]) for i in range(3))
    order = np.lexsort((matches.measure.far(nearness), image))
    return image[order], reference[order], nearness[order]


@dataclass(frozen=True)
class Extracted:
    """U extracted training images, the most often matched first, then by index.

    reference: index among the members [U]; count: generated images that match it, by guidance
    scale [U, S]; best: its best score [U], of image `image` [U] at scale number `scale` [U] (the
    first of equals). scales: the S guidance scales.
    """

    scales: tuple[float, ...]
    reference: NDArray[np.int64]
    count: NDArray[np.int64]
    best: NDArray[np.float64]
    scale: NDArray[np.int64]
    image: NDArray[np.int64]

    def counts(self, n_references: int) -> NDArray[np.int64]:
        """k_j [N]: images of all scales that match each training image."""
        counts = np.zeros(n_references, np.int64)
        counts[self.reference] = self.count.sum(axis=1)
        return counts

    def rows(
        self, source: NDArray[Any] | None = None, labels: NDArray[Any] | None = None
    ) -> list[dict[str, Any]]:
        """One flat row for each training image, for CSV and JSON.

        source: index of each member in the data set it was drawn from [N]; labels [N].
        """
        found = []
        for u, j in enumerate(self.reference.tolist()):
            row: dict[str, Any] = {"member": j}
            if source is not None:
                row["source_index"] = int(source[j])
            if labels is not None:
                row["label"] = int(labels[j])
            row["count"] = int(self.count[u].sum())
            counts = zip(self.scales, self.count[u].tolist(), strict=True)
            row |= {f"count_at_{scale:g}": n for scale, n in counts}
            row["best_score"] = float(self.best[u])
            row["best_at"] = self.scales[int(self.scale[u])]
            row["best_image"] = int(self.image[u])
            found.append(row)
        return found


def extracted(scales: Mapping[float, Pairs], n_references: int, *, lower: bool) -> Extracted:
    """The table of extracted training images from the matches in a band at every guidance scale.

    lower: whether a lower score is nearer (nL2) or a higher one (SSCD).
    """
    if not scales:
        raise MembenchError("there are no guidance scales to look for matches in")
    count = np.zeros((n_references, len(scales)), np.int64)
    for s, (_, reference, _) in enumerate(scales.values()):
        count[:, s] = np.bincount(reference, minlength=n_references)
    image, reference, score = (
        np.concatenate([pairs[part] for pairs in scales.values()]) for part in range(3)
    )
    scale = np.repeat(np.arange(len(scales)), [len(pairs[0]) for pairs in scales.values()])
    order = np.lexsort((image, scale, score if lower else -score, reference))
    _, first = np.unique(reference[order], return_index=True)
    best = order[first]  # one for each reference, ascending
    most = np.lexsort((reference[best], -count[reference[best]].sum(axis=1)))
    best = best[most]
    return Extracted(
        tuple(scales),
        reference[best].astype(np.int64),
        count[reference[best]],
        score[best].astype(np.float64),
        scale[best],
        image[best].astype(np.int64),
    )


@dataclass(frozen=True)
class Group:
    """Extraction from one class or cluster of the training images.

    interval: Clopper-Pearson, of the share, as if each member were extracted by its own coin.
    expected: extracted members of this group if all training images were equally easy to extract.
    """

    group: int
    members: int
    extracted: int
    matches: int
    share: float
    interval: Interval
    expected: float


def by_group(counts: NDArray[Any], labels: NDArray[Any], n_groups: int) -> list[Group]:
    """Extraction from every class or cluster with members: counts k_j [N], labels [N] in 0..G - 1.

    Raises MembenchError if there are not as many labels as training images, or one is out of range.
    """
    counts, labels = np.asarray(counts), np.asarray(labels)
    if counts.shape != labels.shape or (
        len(labels) and not 0 <= labels.min() <= labels.max() < n_groups
    ):
        raise MembenchError(f"expected {len(counts)} labels from 0 to {n_groups - 1}")
    size = np.bincount(labels, minlength=n_groups)
    found = np.bincount(labels[counts > 0], minlength=n_groups)
    matches = np.bincount(labels, weights=counts, minlength=n_groups)
    rate = float(found.sum()) / max(1, len(counts))
    return [
        Group(
            g,
            int(size[g]),
            int(found[g]),
            int(matches[g]),
            float(found[g] / size[g]),
            clopper_pearson(int(found[g]), int(size[g])),
            float(rate * size[g]),
        )
        for g in range(n_groups)
        if size[g]
    ]
