"""Flip-aware search: an image and its mirror image count as one, at the smaller distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from membench.errors import MembenchError
from membench.similarity.filter import MEMORY, Array, to_distance
from membench.similarity.index import Index
from membench.similarity.ranges import Pairs, Tally, tally_nearest_side, within_sides
from membench.similarity.search import Neighbours, nearest_blocks

_MERGED = 4096  # queries whose lists are merged at a time


def merge(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k nearest references of each query under the smaller of its two distances.

    first, second: of the same Q queries in two versions (say, plain and mirrored) against one
    reference, both by `nearest` with at least k neighbours, or with all there are. Nearest first,
    ties by lowest index; as many as are listed where those are fewer than k.

    **Nothing is missing.** Let j be among the k nearest under min(d1, d2), and let d1(j) be the
    minimum. If j were not among the k first by d1, then k other references i would come before it
    by d1; as min(d1, d2)(i) <= d1(i), they would come before it under the minimum too (ties by
    index alike), and j would not be among the k nearest. So each of them is listed at its minimum.

    **Nothing is too much.** Let j be listed at d1(j), but missing where its smaller distance d2(j)
    belongs. Then k others are listed there at no more than d2(j) < d1(j), and j is not chosen.

    The lists hold float32 distances: references that only the exact squared distance tells apart
    are a tie here, but not for `nearest_with_flips`. Raises MembenchError for lists of different
    shapes and k < 1.
    """
    if first.index.shape != second.index.shape:
        raise MembenchError(
            f"only lists of one shape can be merged, not {first.index.shape} and "
            f"{second.index.shape}"
        )
    if k < 1:
        raise MembenchError(f"k must be at least 1, not {k}")
    distance, index = _merge((first.distance, second.distance), (first.index, second.index), k)
    return Neighbours(distance, index)


def nearest_with_flips(
    queries: Array,
    reference: Array | Index,
    k: int = 50,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """`nearest` under the smaller distance of each query and its mirror image.

    queries: uint8 images [Q, H, W, C]; reference: the same, [N, H, W, C]. Mirroring either side
    gives the same distances. The order is that of the smaller integer squared distance.
    progress: as for `nearest`, but the pairs add up to 2 Q N. Raises MembenchError as `nearest`
    does, and for anything but images.
    """
    _check_images(queries, reference)
    index = Index.of(reference)
    sides = []
    for side in (queries, _mirrored(queries)):
        found = nearest_blocks(side, index, k, memory_bytes=memory_bytes, progress=progress)
        sides.append([np.concatenate(parts) for parts in zip(*found, strict=True)])
    (first, first_index), (second, second_index) = sides
    for start in range(0, len(first), _MERGED):
        rows = slice(start, start + _MERGED)
        first[rows], first_index[rows] = _merge(
            (first[rows], second[rows]), (first_index[rows], second_index[rows]), first.shape[1]
        )
    return Neighbours(to_distance(first, queries.dtype), first_index)


def within_with_flips(
    queries: Array,
    reference: Array | Index,
    radius: ArrayLike,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Pairs]:
    """`within` for each query or its mirror image: each pair once, at its smaller distance.

    Arguments as for `within`, but for images only, see `nearest_with_flips`; progress adds up to
    2 Q N.
    """
    _check_images(queries, reference)
    sides = [queries, _mirrored(queries)]
    streams = within_sides(sides, reference, radius, memory_bytes * 2 // 3, progress)
    return (_unite(*blocks) for blocks in zip(*streams, strict=True))


def tally_with_flips(
    queries: Array,
    reference: Array | Index,
    radii: ArrayLike,
    *,
    memory_bytes: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Counts what `within_with_flips` would stream, without ever holding the pairs; see `tally`."""
    _check_images(queries, reference)
    sides = [queries, _mirrored(queries)]
    return tally_nearest_side(sides, reference, radii, memory_bytes, progress)


def _merge(
    distances: tuple[NDArray[Any], NDArray[Any]],
    indices: tuple[NDArray[np.int32], NDArray[np.int32]],
    k: int,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The first k of two lists [Q, m] by distance, then index; what is in both counts once."""
    distance, index = np.concatenate(distances, axis=1), np.concatenate(indices, axis=1)
    order = np.lexsort((distance, index))
    distance, index = (np.take_along_axis(x, order, axis=1) for x in (distance, index))
    distance[:, 1:][index[:, 1:] == index[:, :-1]] = np.inf  # listed before, and nearer
    order = np.lexsort((index, distance))[:, : min(k, indices[0].shape[1])]
    return np.take_along_axis(distance, order, axis=1), np.take_along_axis(index, order, axis=1)


def _unite(first: Pairs, second: Pairs) -> Pairs:
    """The pairs of both, each once at its smaller squared distance, by query, then index."""
    query = np.concatenate([first[0], second[0]])
    index = np.concatenate([first[1], second[1]])
    squared = np.concatenate([first[2], second[2]])
    order = np.lexsort((squared, index, query))
    query, index, squared = query[order], index[order], squared[order]
    new = np.ones(len(query), bool)
    new[1:] = (query[1:] != query[:-1]) | (index[1:] != index[:-1])
    return query[new], index[new], squared[new]


def _mirrored(images: Array) -> Array:
    """A view of images [N, H, W, C] mirrored along their width."""
    return np.asarray(images)[:, :, ::-1]


def _check_images(queries: Array, reference: Array | Index) -> None:
    for name, x in (("queries", queries), ("reference", Index.of(reference).rows)):
        if not isinstance(x, np.ndarray) or x.ndim != 4 or x.dtype != np.uint8:
            what = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise MembenchError(
                f"only uint8 images [*, H, W, C] can be mirrored, but {name} are {what}"
            )
