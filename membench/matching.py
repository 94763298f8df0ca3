"""Comparing images with a data set: artifacts of neighbours, near-duplicates and the null.

Needs a data set and a store, no target: `run` compares generated images, `calibrate` real held-out
ones and `score` images that some other tool made, all through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from membench.data.imageset import Dataset, ImageSet
from membench.errors import MembenchError
from membench.files import write_npz
from membench.scoring import calibrate_from
from membench.similarity.duplicates import keep_first, nearest_other_rmse, nearest_rmse
from membench.similarity.matches import Matches, Reference, match
from membench.similarity.measures import MEASURES, Band, Measure
from membench.specs import Similarity
from membench.store import Artifact, Store, Work

if TYPE_CHECKING:
    from membench.describing import Describer
    from membench.lab import Progress

VERSIONS = {"search": 3, "facts": 1}
"""Of the code behind each kind of artifact: raise one when its results change."""
MATCHES, FACTS = "matches.npz", "facts.npz"
Queries = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before anything is generated, independent of any score.

    heldout_rmse [H]: of every held-out image to the nearest member; members_rmse [N] and twin_rmse
    [N]: of every member, and held-out twin, to the nearest other one (all of thumbnails, float32).
    members_keep, twin_keep: bool [N], the first of every group of near-duplicates.
    members_labels [N], heldout_labels [H]: int64; members_index [N]: row in the source, int64.
    """

    heldout_rmse: NDArray[np.float32]
    members_rmse: NDArray[np.float32]
    twin_rmse: NDArray[np.float32]
    members_keep: NDArray[np.bool_]
    twin_keep: NDArray[np.bool_]
    members_labels: NDArray[np.int64]
    heldout_labels: NDArray[np.int64]
    members_index: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> Facts:
        """Read what `Matcher.facts` wrote; a MembenchError names a file that is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{name: file[name] for name in file.files})
        except FileNotFoundError:
            raise MembenchError(f"{path}: no such file; run the cell again") from None
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise MembenchError(f"{path}: truncated or damaged ({error}); run again") from None

    def null_rows(self, similarity: Similarity) -> NDArray[np.bool_]:
        """Which held-out images make the null: no near-duplicate of a member and, where labels are
        identities that must be distinct, no member of the same identity."""
        keep = self.heldout_rmse > similarity.near_duplicate_rmse
        if similarity.distinct_labels:
            keep &= ~np.isin(self.heldout_labels, self.members_labels)
        return keep


@dataclass(frozen=True)
class Matcher:
    """A data set, a similarity (the card's or another), and where results are kept.

    search_on: GPUs that filter the exact search (`membench.similarity.Index`).
    """

    dataset: Dataset
    similarity: Similarity
    store: Store
    progress: Progress
    describer: Describer
    search_on: tuple[str, ...] = ()

    @property
    def measure(self) -> Measure:
        return MEASURES[self.similarity.name]

    def identity(self) -> dict[str, Any]:
        """How images are compared, for a record: with the descriptor's weights and steps (SSCD)."""
        choice = self.similarity.descriptor
        found: dict[str, Any] = {"similarity": self.similarity.identity()}
        return found if choice is None else found | {"descriptor": self.describer.identity(choice)}

    # -- the data set ---------------------------------------------------------------------------

    def facts(self) -> Artifact[Facts]:
        """Near-duplicates, labels and source rows of the data set."""
        splits = self.dataset.card.splits
        identity = {
            "version": VERSIONS["facts"],
            "members": splits.members.images_sha256,
            "heldout": splits.heldout.images_sha256,
            "labels": [splits.members.labels_sha256, splits.heldout.labels_sha256],
            "index": splits.members.index_sha256,
            "near_duplicate_rmse": self.similarity.near_duplicate_rmse,
        }
        limit = self.similarity.near_duplicate_rmse

        def make(folder: Path, work: Work) -> None:
            members, heldout = self.dataset.members, self.dataset.heldout
            twin = self.dataset.heldout_twin.images
            n, h = len(members), len(heldout)
            with self.progress("near-duplicates", h * n + n * n + len(twin) ** 2, "pairs") as go:
                found: dict[str, NDArray[Any]] = {
                    "heldout_rmse": nearest_rmse(heldout.images, members.images, progress=go),
                    "members_rmse": nearest_other_rmse(members.images, progress=go),
                    "twin_rmse": nearest_other_rmse(twin, progress=go),
                }
            found |= {
                "members_keep": _keep(members.images, found["members_rmse"], limit),
                "twin_keep": _keep(twin, found["twin_rmse"], limit),
                "members_labels": np.asarray(members.labels, np.int64),
                "heldout_labels": np.asarray(heldout.labels, np.int64),
                "members_index": np.asarray(members.index, np.int64),
            }
            write_npz(folder / FACTS, found)

        return Artifact(
            "facts", "near-duplicates", identity, make, lambda folder: Facts.load(folder / FACTS)
        )

    # -- matches --------------------------------------------------------------------------------

    def matches(self, images: Artifact[Any], *, title: str) -> Artifact[Matches]:
        """Nearest members and nearest held-out twins of generated images (`Lab.images`)."""

        def queries() -> NDArray[Any]:
            return np.asarray(self.store.get(images).images)

        described = {"queries": "generated"}
        return self._matches(queries, title, described, (images,), images=images)

    def matches_of(
        self, images: NDArray[Any], images_sha256: str, *, title: str
    ) -> Artifact[Matches]:
        """The same of images from elsewhere, uint8 [N_G, H, W, C]."""
        described = {"queries": "given", "images": images_sha256}
        return self._matches(lambda: images, title, described, (), given=(images, images_sha256))

    def null(self, *, title: str = "calibration") -> Artifact[Matches]:
        """Nearest members of every real held-out image: the null that calibrates the bands."""
        card = self.dataset.card
        described = {"queries": "heldout", "images": card.splits.heldout.images_sha256}
        return self._matches(
            lambda: self.dataset.heldout.images, title, described, (), split="heldout"
        )

    def _matches(
        self,
        queries: Queries,
        title: str,
        described: dict[str, Any],
        inputs: tuple[Artifact[Any], ...],
        **source: Any,
    ) -> Artifact[Matches]:
        card, similarity = self.dataset.card, self.similarity
        is_null = source.get("split") == "heldout"
        # near-duplicates are counted for a score; a null needs them only to leave them out
        facts = None if is_null and not similarity.dedup_reference else self.facts()
        features = _Features(self, source)
        null = None if is_null or similarity.name == "nl2" else self.null()
        identity = described | {
            "version": VERSIONS["search"],
            "similarity": similarity.name,
            "neighbours": similarity.neighbours,
            "flips": similarity.flips,
            "dedup_reference": similarity.dedup_reference,
            "members": card.splits.members.images_sha256,
            "heldout": card.splits.heldout.images_sha256,
            "heldout_rows": len(self.dataset.heldout_twin),
            "near_duplicate_rmse": similarity.near_duplicate_rmse,
        }
        if not is_null:
            identity["band_modes"] = list(similarity.band_modes)
            identity["false_match_rates"] = similarity.false_match_rates.identity()
        if features.choice is not None:
            identity["distinct_labels"] = similarity.distinct_labels

        def make(folder: Path, work: Work) -> None:
            known = None if facts is None else self.store.get(facts)
            names = ["members"] if is_null else ["members", "heldout"]
            if self.dataset.twin_is_smaller and not is_null:
                names.append("members_twin")
            references = {name: self._reference(name, known, features) for name in names}
            images = features.queries(queries, mirrored=False)
            mirrored = features.queries(queries, mirrored=True) if similarity.flips else None
            widest, bands = (None, []) if is_null or known is None else self._edges(null, known)
            pairs = len(images) * sum(map(len, references.values())) * (1 + similarity.flips)
            with self.progress(title, pairs, "pairs") as advance:
                found = match(
                    images,
                    references["members"],
                    references.get("heldout"),
                    members_twin=references.get("members_twin"),
                    k=similarity.neighbours,
                    progress=advance,
                    measure=self.measure,
                    mirrored=mirrored,
                    widest=widest,
                    bands=bands,
                    search_on=self.search_on,
                )
            found.save(folder / MATCHES)

        also = tuple(artifact for artifact in (facts, null) if artifact is not None)
        needs = (*inputs, *features.inputs, *also)
        return Artifact(
            "matches", title, identity, make, lambda folder: Matches.load(folder / MATCHES), needs
        )

    def _edges(
        self, null: Artifact[Matches] | None, facts: Facts
    ) -> tuple[float | None, list[Band]]:
        """The widest threshold of any band and the bands whose pairs may be too many to keep."""
        calibrated: dict[str, float | None] = {}
        if null is not None:
            keep = facts.null_rows(self.similarity)
            calibrated = calibrate_from(self.store.get(null), keep, self.similarity).values
        bands = [
            band
            for mode in self.similarity.band_modes
            if mode != "calibrated" or null is not None
            for band in self.measure.bands(mode, calibrated).values()
            if band is not None
        ]
        if self.measure.sign == 1:
            return None, [b for b in bands if b.upper is not None and b.upper >= 2]
        return min(b.lower for b in bands if b.lower is not None), bands

    def _reference(self, name: str, facts: Facts | None, features: _Features) -> Reference:
        rows = features.reference(name)
        if facts is None:
            return Reference(rows)
        rmse = facts.twin_rmse if name == "heldout" else facts.members_rmse[: len(rows)]
        duplicates = int((rmse <= self.similarity.near_duplicate_rmse).sum())
        if not self.similarity.dedup_reference:
            return Reference(rows, None, duplicates)
        kept = np.flatnonzero(facts.twin_keep if name == "heldout" else facts.members_keep)
        kept = kept[kept < len(rows)]
        if name != "members" or not self.dataset.twin_is_smaller:
            kept = kept[: self._deduplicated_size(facts)]  # twins of one size
        return Reference(rows, kept.astype(np.int32), duplicates)

    def _deduplicated_size(self, facts: Facts) -> int:
        """How many images members (or their twin) and held-out twin keep: as many on both sides."""
        members = facts.members_keep[: len(facts.twin_keep)]
        size, twin = int(members.sum()), int(facts.twin_keep.sum())
        if twin < size and not self.dataset.twin_is_smaller:
            raise MembenchError(
                f"{self.dataset.card.name}: dedup_reference leaves {size} members but only "
                f"{twin} held-out twins; turn it off or add held-out images"
            )
        return min(size, twin)


def _keep(images: NDArray[Any], rmse: NDArray[Any], limit: float) -> NDArray[np.bool_]:
    """The first of every group of near-duplicates; most sets have few, which alone are compared."""
    keep = np.ones(len(images), np.bool_)
    suspects = np.flatnonzero(rmse <= limit)
    if len(suspects):
        keep[suspects] = keep_first(np.asarray(images[suspects]), limit)
    return keep


@dataclass(frozen=True)
class _Features:
    """What stands for an image in the search: its pixels, or a descriptor's artifacts."""

    matcher: Matcher
    source: dict[str, Any]

    @property
    def choice(self) -> Any:
        return self.matcher.similarity.descriptor

    def _of_queries(self, mirrored: bool) -> Artifact[NDArray[Any]]:
        describer, choice = self.matcher.describer, self.choice
        if "images" in self.source:
            return describer.of_images(self.source["images"], choice, mirrored)
        if "given" in self.source:
            images, sha256 = self.source["given"]
            return describer.of_array(images, sha256, choice, mirrored)
        return describer.of_split(self.matcher.dataset, self.source["split"], choice, mirrored)

    def _of_reference(self, split: str) -> Artifact[NDArray[Any]]:
        return self.matcher.describer.of_split(self.matcher.dataset, split, self.choice)

    @property
    def inputs(self) -> tuple[Artifact[Any], ...]:
        if self.choice is None:
            return ()
        own = [self._of_queries(m) for m in (False, True)[: 1 + self.matcher.similarity.flips]]
        return (*own, self._of_reference("members"), self._of_reference("heldout"))

    def queries(self, images: Queries, *, mirrored: bool) -> NDArray[Any]:
        if self.choice is not None:
            return self.matcher.store.get(self._of_queries(mirrored))
        pixels = images()
        return pixels[:, :, ::-1] if mirrored else pixels  # a view: a copy would hold all images

    def reference(self, name: str) -> NDArray[Any]:
        dataset = self.matcher.dataset
        if self.choice is None:
            images: dict[str, ImageSet] = {
                "members": dataset.members,
                "heldout": dataset.heldout_twin,
                "members_twin": dataset.members_twin,
            }
            return images[name].images
        split = "heldout" if name == "heldout" else "members"
        rows = self.matcher.store.get(self._of_reference(split))
        return rows if name == "members" else rows[: len(dataset.heldout_twin)]
