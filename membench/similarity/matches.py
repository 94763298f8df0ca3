"""What a run keeps of its images: their nearest members and nearest held-out images.

One file format for every similarity; every score is a pure function of this file.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.files import write_npz
from membench.similarity.filter import MEMORY, to_distance
from membench.similarity.flips import merge
from membench.similarity.index import Index
from membench.similarity.measures import MEASURES, NL2, Band, Measure
from membench.similarity.ranges import tally_nearest_side, within
from membench.similarity.search import Neighbours, nearest

_FORMAT = 2
SIDES = ("members", "heldout", "members_twin")
MAX_PAIRS = 1 << 24
"""Pairs beyond the listed neighbours that are kept; more are counted in a streaming pass."""


@dataclass(frozen=True)
class Pairs:
    """Pairs inside the widest band that are not among the listed neighbours.

    image: int32 [P]; index: int32 [P], the reference; distance: float32 [P]. Sorted by image.
    """

    image: NDArray[np.int32]
    index: NDArray[np.int32]
    distance: NDArray[np.float32]

    @classmethod
    def none(cls) -> Pairs:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Counted:
    """Exact counts of all pairs of one band, for bands with more pairs than are kept.

    count: int32 [N], the images that match each reference; sole: int64 [N], the image where it is
    only one, else -1.
    """

    count: NDArray[np.int32]
    sole: NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The nearest references of Q images among n.

    listed: the k nearest; beyond: the other pairs of the widest band; complete: the score down to
    which both together hold every pair; counted: by band, where `beyond` would be too long;
    near_duplicates: how many references have another within the card's
    near-duplicate distance, None if that was not looked for.
    index is the row of the data set's split; with `dedup_reference` only `n` of the `rows` are
    compared with.
    """

    listed: Neighbours
    n: int
    rows: int
    beyond: Pairs = field(default_factory=Pairs.none)
    complete: float = 2.0
    counted: dict[str, Counted] = field(default_factory=dict)
    near_duplicates: int | None = None

    def __post_init__(self) -> None:
        index, k = self.listed.index, self.listed.index.shape[1]
        if k > self.n or self.n > self.rows:
            raise MembenchError(f"{k} neighbours listed, but there are only {self.n} images")
        for found in (index, self.beyond.index):
            if found.size and not 0 <= found.min() <= found.max() < self.rows:
                raise MembenchError(f"index {found.max()} is beyond the {self.rows} references")
        if (np.diff(np.sort(index, axis=1), axis=1) == 0).any():
            raise MembenchError("an image lists the same neighbour twice")
        if len(self.beyond):
            image = self.beyond.image
            if image.min() < 0 or image.max() >= len(index) or (np.diff(image) < 0).any():
                raise MembenchError("pairs beyond the list are not sorted by image")


@dataclass(frozen=True)
class Matches:
    """The nearest references of Q images: members and, their twin, as many held-out images.

    heldout: None for matches that need none (real held-out images against the members).
    members_twin: where fewer images are held out than there are members, as many members as the
    twin has, to stand against it; None where the twin is as large.

    **Every pair of a band is known.** For normalised L2 and any threshold t < 2, every pair with
    nL2 <= t is among the n listed, so that nothing need be stored a second time:

        nL2_j <= t < 2  <=>  d_j <= (t / 2) mean(d_1 .. d_n) < mean(d_1 .. d_n) <= d_n,

    so d_j < d_n strictly, and whatever is strictly nearer than the n-th nearest is listed; how ties
    at d_n were broken does not matter. That needs a mean above 0. If it is 0, the n nearest are n
    exact copies of the image, all of score 0, and further copies may exist that are not listed:
    such an image counts as matching the n copies of lowest index. At t = 2 itself a pair may be
    missing too (all n at one distance, tied with more). If n = N, everything is listed.

    For SSCD an image may have more than k references in the widest band: the others are in
    `beyond`. Bands that reach further, or with more pairs than `MAX_PAIRS`, are in `counted` or
    have no UMS.
    """

    members: Side
    heldout: Side | None
    measure: Measure = NL2
    flips: bool = False
    members_twin: Side | None = None

    def __post_init__(self) -> None:
        for name in self.sides:
            if len(self.side(name).listed.index) != len(self):
                raise MembenchError(
                    f"members and {name} neighbours are of {len(self)} and "
                    f"{len(self.side(name).listed.index)} images; they must be the same images"
                )
        against = self.members_twin or self.members
        if self.heldout is not None and against.n != self.heldout.n:
            raise MembenchError(
                f"the held-out reference must have as many images as there are members: "
                f"{self.heldout.n} and {against.n}"
            )

    @classmethod
    def of(
        cls, members: Neighbours, heldout: Neighbours, n_members: int, n_heldout: int
    ) -> Matches:
        """Normalised-L2 matches from the neighbours alone."""
        return cls(Side(members, n_members, n_members), Side(heldout, n_heldout, n_heldout))

    def __len__(self) -> int:
        return len(self.members.listed.index)

    @property
    def n_members(self) -> int:
        return self.members.n

    @property
    def n_heldout(self) -> int:
        return 0 if self.heldout is None else self.heldout.n

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the sides that are there."""
        return tuple(name for name in SIDES if getattr(self, name) is not None)

    def side(self, name: str) -> Side:
        """A side by its name; raises MembenchError for one that is not there."""
        side: Side | None = getattr(self, name, None) if name in SIDES else None
        if side is None:
            raise MembenchError(f"side must be one of {', '.join(self.sides)}, not {name!r}")
        return side

    def covers(self, band: Band, side: str = "members") -> bool:
        """Whether list and `beyond` hold every pair of a band."""
        found = self.side(side)
        if found.listed.index.shape[1] == found.n:
            return True
        if self.measure.sign == 1:
            return band.upper is not None and band.upper < found.complete
        return band.lower is not None and band.lower >= found.complete

    def scores(self, side: str = "members") -> NDArray[np.float64]:
        """Scores of the listed neighbours [Q, k], nearest first."""
        return self.measure.score(self.side(side).listed.distance)

    def scores_beyond(self, side: str = "members") -> NDArray[np.float64]:
        """Scores of the pairs beyond the list [P]; there are none for normalised L2."""
        found = self.side(side).beyond
        return self.measure.score(found.distance) if len(found) else np.empty(0)

    def pairs(
        self, threshold: float, side: str = "members"
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
        """All pairs at least as near as a threshold: (image, reference, score), each [P].

        Sorted by image, then nearness. side: "members" or "heldout".
        Raises MembenchError for a threshold from which on the pairs are not complete, and for NaN.
        """
        band = self.measure.up_to(threshold)
        if not self.covers(band, side) or np.isnan(threshold):
            limit = "below" if self.measure.sign == 1 else "from"
            raise MembenchError(
                f"pairs are complete for thresholds {limit} {self.side(side).complete:g}, "
                f"not for {threshold}"
            )
        found, score, more = self.side(side), self.scores(side), self.scores_beyond(side)
        image, column = np.nonzero(band.contains(score))
        keep = band.contains(more)
        images = np.concatenate([image, found.beyond.image[keep]])
        index = np.concatenate([found.listed.index[image, column], found.beyond.index[keep]])
        scores = np.concatenate([score[image, column], more[keep]])
        order = np.lexsort((self.measure.far(scores), images))
        return images[order], index[order], scores[order]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz that np.load can read; the same content always gives the same bytes.

        Written beside `path` and renamed into place, so that no half-written file is ever seen.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Any] = {
            "format": _FORMAT,
            "measure": self.measure.name,
            "flips": self.flips,
        }
        for name in self.sides:
            found = self.side(name)
            contents |= {
                f"{name}_n": found.n,
                f"{name}_rows": found.rows,
                f"{name}_complete": found.complete,
                f"{name}_near_duplicates": -1
                if found.near_duplicates is None
                else found.near_duplicates,
                f"{name}_distance": found.listed.distance,
                f"{name}_index": found.listed.index,
            }
            contents |= {f"{name}_beyond_{k}": v for k, v in vars(found.beyond).items()}
            contents[f"{name}_bands"] = np.array(sorted(found.counted), dtype="U")
            for kind in ("count", "sole"):
                rows = [getattr(found.counted[band], kind) for band in sorted(found.counted)]
                dtype = np.int32 if kind == "count" else np.int64
                stacked = np.array(rows, dtype).reshape(len(rows), found.rows)
                contents[f"{name}_counted_{kind}"] = stacked

        write_npz(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Matches:
        """Reads what `save` wrote; a MembenchError for anything else, truncated files included."""
        try:
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is no zip archive")
            with archive as file:
                content = {name: file[name] for name in file.files}
            if "format" not in content or content["format"] != _FORMAT:
                raise ValueError(f"format {content.get('format', '?')}, expected {_FORMAT}")
            return cls(
                members=_side(content, "members"),
                heldout=_side(content, "heldout") if "heldout_n" in content else None,
                measure=MEASURES[str(content["measure"])],
                flips=bool(content["flips"]),
                members_twin=_side(content, "members_twin")
                if "members_twin_n" in content
                else None,
            )
        except FileNotFoundError:
            raise MembenchError(f"{path}: no such matches file; run the cell again") from None
        except KeyError as error:
            reason = f"no {error}"
        except (MembenchError, ValueError, TypeError, AttributeError) as error:
            reason = str(error)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            reason = f"truncated or damaged ({error})"
        reason = " ".join(reason.split())
        raise MembenchError(
            f"{path}: not a matches file that membench wrote: {reason}; "
            "delete it and run the cell again"
        )


def _side(content: dict[str, Any], name: str) -> Side:
    duplicates = int(content[f"{name}_near_duplicates"])
    bands = [str(band) for band in content[f"{name}_bands"]]
    counts, soles = content[f"{name}_counted_count"], content[f"{name}_counted_sole"]
    rows = int(content[f"{name}_rows"])
    for counted in (counts, soles):
        if counted.shape != (len(bands), rows):
            raise ValueError(f"{name}: counts of shape {counted.shape} for {rows} references")
    return Side(
        Neighbours(content[f"{name}_distance"], content[f"{name}_index"]),
        int(content[f"{name}_n"]),
        rows,
        Pairs(*(content[f"{name}_beyond_{key}"] for key in ("image", "index", "distance"))),
        float(content[f"{name}_complete"]),
        {band: Counted(*pair) for band, *pair in zip(bands, counts, soles, strict=True)},
        None if duplicates < 0 else duplicates,
    )


@dataclass(frozen=True)
class Reference:
    """What images are compared with: images or descriptors [N, ...], and which rows count.

    keep: int32 [n], the rows compared with, None for all; near_duplicates: see `Side`.
    """

    rows: NDArray[Any]
    keep: NDArray[np.int32] | None = None
    near_duplicates: int | None = None

    @property
    def compared(self) -> NDArray[Any]:
        """The rows compared with, [n, ...]."""
        return self.rows if self.keep is None else self.rows[self.keep]

    def index(self, found: NDArray[Any]) -> NDArray[np.int32]:
        """Positions among the compared rows as rows of the split."""
        return np.asarray(found if self.keep is None else self.keep[found], np.int32)

    def __len__(self) -> int:
        return len(self.rows) if self.keep is None else len(self.keep)


def match(
    images: NDArray[Any],
    members: NDArray[Any] | Reference,
    heldout_reference: NDArray[Any] | Reference | None,
    k: int = 50,
    progress: Callable[[int], None] | None = None,
    *,
    members_twin: NDArray[Any] | Reference | None = None,
    measure: Measure = NL2,
    mirrored: NDArray[Any] | None = None,
    widest: float | None = None,
    bands: Sequence[Band] = (),
    max_pairs: int = MAX_PAIRS,
    memory_bytes: int = MEMORY,
    search_on: Sequence[str] = (),
) -> Matches:
    """The nearest members of `images` [Q, ...] and, against a reference of equal size, their twin.

    heldout_reference: None to look at the members only. members_twin: as many members as are held
    out, where those are fewer than the members.
    images, references: images or, for SSCD, unit descriptors; arrays or memory maps (`nearest`).
    mirrored: the same of the mirrored images, [Q, ...]: the nearer of the two counts.
    widest: the score down to which every pair is kept (SSCD; normalised L2 needs none).
    bands: whose pairs are counted exactly where they are too many to keep.
    search_on: GPUs that filter the neighbours (`Index`); no result depends on it.
    progress: called with the pairs just compared; they add up to 2 Q N (4 Q N if mirrored), plus
    those of a second pass where one is needed.
    Raises MembenchError unless twins have the same size: a false-match rate against a smaller
    reference would flatter the method.
    """
    given = {"members": members, "heldout": heldout_reference, "members_twin": members_twin}
    references = {
        name: rows if isinstance(rows, Reference) else Reference(rows)
        for name, rows in given.items()
        if rows is not None
    }
    sizes = {name: len(reference) for name, reference in references.items()}
    if "heldout" in sizes and sizes["heldout"] != sizes.get("members_twin", sizes["members"]):
        raise MembenchError(
            f"the held-out reference must have as many images as there are members: "
            f"{sizes['heldout']} and {sizes.get('members_twin', sizes['members'])}"
        )
    queries = [images] if mirrored is None else [images, mirrored]
    options: dict[str, Any] = {"memory_bytes": memory_bytes, "progress": progress}
    sides = {
        name: _match(queries, reference, k, measure, widest, bands, max_pairs, search_on, options)
        for name, reference in references.items()
    }
    return Matches(
        sides["members"],
        sides.get("heldout"),
        measure,
        mirrored is not None,
        sides.get("members_twin"),
    )


def _match(
    queries: list[NDArray[Any]],
    reference: Reference,
    k: int,
    measure: Measure,
    widest: float | None,
    bands: Sequence[Band],
    max_pairs: int,
    search_on: Sequence[str],
    options: dict[str, Any],
) -> Side:
    """The matches of one side."""
    compared = Index(reference.compared, search_on)
    listed = nearest(queries[0], compared, k, **options)
    for more in queries[1:]:
        listed = merge(listed, nearest(more, compared, k, **options), k)
    beyond: Pairs | None = Pairs.none()
    complete = 2.0
    if measure.sign == -1:
        last = measure.score(listed.distance)[:, -1]
        complete = float(np.nextafter(last.max(), np.inf))
        if widest is not None and listed.index.shape[1] < len(compared):
            full = np.flatnonzero(last >= widest)  # their lists may end inside the band
            beyond = _beyond(queries, compared, listed, full, widest, measure, max_pairs, options)
            if beyond is not None:
                complete = widest
    counted = {}
    uncovered = [
        band
        for band in bands
        if beyond is None or not _reaches(band, measure, complete, listed, compared)
    ]
    if uncovered:
        counted = _count(queries, compared, listed, uncovered, measure, options)
    pairs = Pairs.none() if beyond is None else beyond
    rows = len(reference.rows)
    return Side(
        Neighbours(listed.distance, reference.index(listed.index)),
        len(reference),
        rows,
        Pairs(pairs.image, reference.index(pairs.index), pairs.distance),
        complete,
        {band: _spread(found, reference, rows) for band, found in counted.items()},
        reference.near_duplicates,
    )


def _reaches(
    band: Band, measure: Measure, complete: float, listed: Neighbours, compared: Index
) -> bool:
    side = Side(listed, len(compared), len(compared), complete=complete)
    return Matches(side, None, measure).covers(band)


def _beyond(
    queries: list[NDArray[Any]],
    compared: Index,
    listed: Neighbours,
    full: NDArray[Any],
    widest: float,
    measure: Measure,
    max_pairs: int,
    options: dict[str, Any],
) -> Pairs | None:
    """Pairs of the images `full` down to `widest` that their lists lack; None if too many."""
    if not len(full):
        return Pairs.none()
    radius = float(measure.distances(widest, listed.distance[:1])[0])
    taken = np.sort((full[:, None] * len(compared) + listed.index[full]).ravel())
    keys, distances, held = [], [], 0
    for rows in queries:
        for query, index, squared in within(rows[full], compared, radius, **options):
            key = full[query] * len(compared) + index
            place = np.searchsorted(taken, key).clip(max=len(taken) - 1)
            new = taken[place] != key
            held += int(new.sum())
            if held > max_pairs:
                return None
            keys.append(key[new])
            distances.append(to_distance(squared[new], rows.dtype))
    key, distance = np.concatenate(keys), np.concatenate(distances)
    order = np.lexsort((distance, key))
    key, distance = key[order], distance[order]
    first = np.ones(len(key), np.bool_)  # of the two orientations the nearer one
    first[1:] = key[1:] != key[:-1]
    image, index = np.divmod(key[first], len(compared))
    distance = distance[first]
    order = np.lexsort((index, distance, image))
    return Pairs(
        image[order].astype(np.int32),
        index[order].astype(np.int32),
        distance[order],
    )


def _count(
    queries: list[NDArray[Any]],
    compared: Index,
    listed: Neighbours,
    bands: Sequence[Band],
    measure: Measure,
    options: dict[str, Any],
) -> dict[str, Counted]:
    """Exact counts of every pair of the bands, in one streaming pass over all references."""
    edges: list[NDArray[np.float64]] = []
    spans = []
    for band in bands:
        near, far = (band.lower, band.upper) if measure.sign == 1 else (band.upper, band.lower)
        near_open, far_open = (
            (band.open_below, band.open_above)
            if measure.sign == 1
            else (band.open_above, band.open_below)
        )
        inner = None
        if near is not None:
            # a closed near edge belongs to the band: what is strictly nearer does not
            edges.append(_radius(measure.distances(near, listed.distance), not near_open))
            inner = len(edges) - 1
        assert far is not None, "a band that ends nowhere"
        edges.append(_radius(measure.distances(far, listed.distance), far_open))
        spans.append((inner, len(edges) - 1))
    found = tally_nearest_side(
        queries, compared, np.array(edges), options["memory_bytes"], options["progress"]
    )
    return {
        str(band): Counted(*found.band(inner, outer))
        for band, (inner, outer) in zip(bands, spans, strict=True)
    }


def _radius(distance: NDArray[np.float64], strict: bool) -> NDArray[np.float64]:
    """The radius that holds whatever is at most (if strict: below) each distance."""
    return np.nextafter(distance, 0) if strict else distance


def _spread(counted: Counted, reference: Reference, rows: int) -> Counted:
    """Counts by compared row as counts by row of the split."""
    if reference.keep is None:
        return counted
    count, sole = np.zeros(rows, np.int32), np.full(rows, -1, np.int64)
    count[reference.keep], sole[reference.keep] = counted.count, counted.sole
    return Counted(count, sole)
