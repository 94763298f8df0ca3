"""What a run keeps of its images: their nearest members and nearest held-out images.

Every score is a pure function of this file.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.files import replace_atomically
from membench.similarity.search import Neighbours, nearest

ALPHA = 0.5
"""Weight of the mean neighbour distance in `nl2` (Carlini et al. 2023)."""

_FORMAT = 1
_ARRAYS = ("members_distance", "members_index", "heldout_distance", "heldout_index")
_NUMBERS = ("format", "n_members", "n_heldout")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


def nl2(distance: NDArray[Any]) -> NDArray[np.float64]:
    """Normalised L2 of every listed pair, [Q, n] from ascending distances [Q, n]; lower is nearer.

        nL2_j = d_j / (alpha * mean(d_1 .. d_n)),   alpha = 0.5,   range of nL2_1: [0, 2]

    Where the mean is 0, all n neighbours are exact copies, and their score is 0.
    The mean is summed neighbour by neighbour, so that every machine gets the same bits.
    Source: Carlini et al. 2023 (Extracting Training Data from Diffusion Models), as in AMG, eq. 8.
    Raises MembenchError for NaN or an empty array.
    """
    if distance.ndim != 2 or distance.size == 0 or not np.isfinite(distance).all():
        raise MembenchError("normalised L2 needs finite distances of shape [Q, n]")
    d = distance.astype(np.float64)
    mean = np.zeros(len(d))
    for column in d.T:
        mean += column
    mean /= d.shape[1]
    return np.divide(d, ALPHA * mean[:, None], out=np.zeros_like(d), where=mean[:, None] > 0)


@dataclass(frozen=True)
class Matches:
    """The nearest references of Q images: members [Q, n] and, their twin, held-out images [Q, n].

    **The list is complete.** For any threshold t < 2, every pair with nL2 <= t is among the n
    listed, so that the pairs need not be stored a second time:

        nL2_j <= t < 2  <=>  d_j <= (t / 2) mean(d_1 .. d_n) < mean(d_1 .. d_n) <= d_n,

    so d_j < d_n strictly, and whatever is strictly nearer than the n-th nearest is listed; how ties
    at d_n were broken does not matter. That needs a mean above 0. If it is 0, the n nearest are n
    exact copies of the image, all of score 0, and further copies may exist that are not listed:
    such an image counts as matching the n copies of lowest index. At t = 2 itself a pair may be
    missing too (all n at one distance, tied with more). If n = N, everything is listed.
    """

    members: Neighbours
    heldout: Neighbours
    n_members: int
    n_heldout: int

    def __post_init__(self) -> None:
        for name, side, size in self._sides():
            k = side.distance.shape[1]
            if k > size:
                raise MembenchError(f"{k} neighbours listed, but {name} has only {size} images")
            if side.index.max() >= size:
                raise MembenchError(f"index {side.index.max()} is beyond the {size} of {name}")
            if (np.diff(np.sort(side.index, axis=1), axis=1) == 0).any():
                raise MembenchError(f"an image lists the same neighbour twice in {name}")
        if len(self.members.index) != len(self.heldout.index):
            raise MembenchError(
                f"members and held-out neighbours are of {len(self.members.index)} and "
                f"{len(self.heldout.index)} images; they must be the same images"
            )

    def __len__(self) -> int:
        return len(self.members.index)

    def _sides(self) -> tuple[tuple[str, Neighbours, int], ...]:
        return (
            ("members", self.members, self.n_members),
            ("heldout", self.heldout, self.n_heldout),
        )

    def pairs(
        self, threshold: float, side: str = "members"
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
        """All pairs with nL2 <= threshold < 2: (image index, reference index, score), each [P].

        Sorted by image, then nearness. side: "members" or "heldout".
        Raises MembenchError for a threshold from which on the list is not complete, and for NaN.
        """
        if not threshold < 2:
            raise MembenchError(f"pairs are complete for thresholds below 2, not for {threshold}")
        neighbours = {name: found for name, found, _ in self._sides()}.get(side)
        if neighbours is None:
            raise MembenchError(f"side must be 'members' or 'heldout', not {side!r}")
        score = nl2(neighbours.distance)
        image, column = np.nonzero(score <= threshold)
        return image, neighbours.index[image, column], score[image, column]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz that np.load can read; the same content always gives the same bytes.

        Written beside `path` and renamed into place, so that no half-written file is ever seen.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Any] = {"format": _FORMAT}
        for name, side, size in self._sides():
            contents |= {f"{name}_distance": side.distance, f"{name}_index": side.index}
            contents[f"n_{name}"] = size

        def write(partial: Path) -> None:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted(contents):
                    array = np.asarray(contents[name])
                    array = array.astype(array.dtype.newbyteorder("<"), order="C")
                    entry = io.BytesIO()
                    np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)
                    info = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
                    info.create_system = 3
                    archive.writestr(info, entry.getvalue())

        replace_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Matches:
        """Reads what `save` wrote; a MembenchError for anything else, truncated files included."""
        try:
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is no zip archive")
            with archive as file:
                names = set(file.files)
                expected = {*_ARRAYS, *_NUMBERS}
                if names != expected:
                    raise ValueError(f"it holds {sorted(names)}, expected {sorted(expected)}")
                content = {name: file[name] for name in file.files}
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, expected {_FORMAT}")
            return cls(
                Neighbours(content["members_distance"], content["members_index"]),
                Neighbours(content["heldout_distance"], content["heldout_index"]),
                int(content["n_members"]),
                int(content["n_heldout"]),
            )
        except FileNotFoundError:
            raise MembenchError(f"{path}: no such matches file; run the cell again") from None
        except (MembenchError, ValueError, TypeError, AttributeError, KeyError) as error:
            reason = str(error)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            reason = f"truncated or damaged ({error})"
        reason = " ".join(reason.split())
        raise MembenchError(
            f"{path}: not a matches file that membench wrote: {reason}; "
            "delete it and run the cell again"
        )


def match(
    images: NDArray[Any],
    members: NDArray[Any],
    heldout_reference: NDArray[Any],
    k: int = 50,
    progress: Callable[[int], None] | None = None,
    *,
    memory_bytes: int = 256 * 2**20,
) -> Matches:
    """The nearest members of `images` [Q, ...] and, against a reference of equal size, their twin.

    members, heldout_reference: [N, ...], arrays or memory maps, see `nearest`.
    progress: called with the pairs just compared; they add up to 2 Q N.
    Raises MembenchError unless both references have the same size: a false-match rate against a
    smaller reference would flatter the method.
    """
    if len(members) != len(heldout_reference):
        raise MembenchError(
            f"the held-out reference must have as many images as there are members: "
            f"{len(heldout_reference)} and {len(members)}"
        )
    return Matches(
        nearest(images, members, k, memory_bytes=memory_bytes, progress=progress),
        nearest(images, heldout_reference, k, memory_bytes=memory_bytes, progress=progress),
        len(members),
        len(heldout_reference),
    )
