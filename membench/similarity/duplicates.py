"""Near-duplicate images, by a strict absolute rule that is independent of every score.

Two images are near-duplicates if the root-mean-square error between their *thumbnails*, with pixels
in [0, 1], is at most a given number. A thumbnail is the image itself up to 32 x 32 pixels; a larger
one is averaged down (Pillow's BOX filter) to 32 on its longer side, in 8 bits. A rule that scores
are calibrated by must not know the score, or the null distribution is biased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from membench.errors import MembenchError
from membench.similarity.filter import MEMORY
from membench.similarity.pages import blocks
from membench.similarity.ranges import tally, within
from membench.similarity.search import nearest

SIDE = 32
"""Longer side of a thumbnail in pixels."""

_CHUNK = 1024  # images that `keep_first` settles at a time: their pairs fit into a matrix of flags
_BLOCK_BYTES = 2**24  # images read at a time to make thumbnails

Progress = Callable[[int], None] | None


def thumbnails(images: NDArray[np.uint8], *, progress: Progress = None) -> NDArray[np.uint8]:
    """Images [N, H, W, C] averaged down to at most 32 x 32 pixels, uint8 [N, h, w, C].

    Images that are small enough are returned as they are, a memory map as a memory map; larger
    ones are read block by block. progress: called with the number of images just done.
    Raises MembenchError for anything but uint8 images.
    """
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.dtype != np.uint8:
        what = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images)
        raise MembenchError(f"thumbnails are of uint8 images [N, H, W, C], not of {what}")
    if images.size == 0:
        raise MembenchError(f"there are no images to compare: shape {images.shape}")
    n, height, width, channels = images.shape
    longer = max(height, width)
    if longer <= SIDE:
        if progress is not None:
            progress(n)
        return images
    size = tuple(max(1, round(side * SIDE / longer)) for side in (width, height))
    small = np.empty((n, size[1], size[0], channels), np.uint8)
    rows = max(1, _BLOCK_BYTES // (height * width * channels))
    for start, block in blocks(np.asarray(images), rows):
        for out, image in zip(small[start : start + rows], block, strict=True):
            for c in range(channels):
                plane = Image.fromarray(np.ascontiguousarray(image[..., c]))
                out[..., c] = plane.resize(size, Image.Resampling.BOX)
        if progress is not None:
            progress(len(block))
    return small


def nearest_rmse(
    images: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    *,
    memory_bytes: int = MEMORY,
    progress: Progress = None,
) -> NDArray[np.float32]:
    """RMSE of each image's thumbnail to the nearest thumbnail of the reference, [Q] in [0, 1].

    images, reference: uint8 [Q, H, W, C] and [N, H', W', C] whose thumbnails have one shape.
    memory_bytes: bound of the working memory, without inputs, thumbnails and result.
    progress: called with the number of pairs just compared; they add up to Q * N.
    """
    small, other = thumbnails(images), thumbnails(reference)
    found = nearest(small, other, 1, memory_bytes=memory_bytes, progress=progress)
    return _rmse(found.distance[:, 0], small)


def nearest_other_rmse(
    images: NDArray[np.uint8], *, memory_bytes: int = MEMORY, progress: Progress = None
) -> NDArray[np.float32]:
    """RMSE of each image's thumbnail to the nearest of the *other* images, [N] in [0, 1].

    Duplicates have 0; an image without any other has infinity. Arguments as for `nearest_rmse`,
    pairs add up to N^2.
    """
    small = thumbnails(images)
    found = nearest(small, small, 2, memory_bytes=memory_bytes, progress=progress)
    if len(images) == 1:
        return np.full(1, np.inf, np.float32)
    # an image that is not its own first neighbour has a copy that comes before it, at 0 too
    first_is_self = found.index[:, 0] == np.arange(len(images))
    return _rmse(np.where(first_is_self, found.distance[:, 1], found.distance[:, 0]), small)


def keep_first(
    images: NDArray[np.uint8],
    rmse: float,
    *,
    memory_bytes: int = MEMORY,
    progress: Progress = None,
) -> NDArray[np.bool_]:
    """Which images stay if near-duplicates of earlier ones that stay are dropped, bool [N].

    An image is dropped if a kept image of lower index lies within `rmse` (thumbnails, edge
    included). So no two kept images are near-duplicates, and every dropped one has a kept one.
    Exact for clusters of any size: what a chunk of images keeps is counted against all later ones.
    progress: called with the number of images just settled; they add up to N.
    Raises MembenchError for an rmse that is NaN, negative or infinite.
    """
    if not 0 <= rmse < math.inf:
        raise MembenchError(f"the RMSE of near-duplicates must be a finite number >= 0, not {rmse}")
    small = np.asarray(thumbnails(images))
    radius = _radius(rmse, small)
    keep = np.ones(len(small), bool)
    for start in range(0, len(small), _CHUNK):
        end = min(start + _CHUNK, len(small))
        alive = start + np.flatnonzero(keep[start:end])
        if len(alive):
            chunk = small[alive]
            keep[alive] = _keep_first_of_chunk(chunk, radius, memory_bytes)
            kept = chunk[keep[alive]]
            if end < len(small):
                near = tally(kept, small[end:], [radius], memory_bytes=memory_bytes)
                keep[end:] &= near.count[0] == 0
        if progress is not None:
            progress(end - start)
    return keep


def _keep_first_of_chunk(
    chunk: NDArray[np.uint8], radius: float, memory_bytes: int
) -> NDArray[np.bool_]:
    near = np.zeros((len(chunk), len(chunk)), bool)
    for image, other, _ in within(chunk, chunk, radius, memory_bytes=memory_bytes):
        near[image, other] = True
    keep = np.ones(len(chunk), bool)
    for i in range(len(chunk)):
        keep[i] = not near[i, :i][keep[:i]].any()
    return keep


def _rmse(distance: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The RMSE of L2 distances between images, pixels in [0, 1]."""
    values = math.prod(images.shape[1:])
    return np.asarray(distance / np.sqrt(np.float64(values)), np.float32)


def _radius(rmse: float, images: NDArray[np.uint8]) -> float:
    """The largest float32 distance whose `_rmse` does not exceed rmse: edges are the same."""
    limit = np.float64(rmse)
    radius = np.float32(rmse * math.sqrt(math.prod(images.shape[1:])))
    while _rmse(np.nextafter(radius, np.float32(np.inf)), images) <= limit:
        radius = np.nextafter(radius, np.float32(np.inf))
    while _rmse(radius, images) > limit:
        radius = np.nextafter(radius, np.float32(-np.inf))
    return float(radius)
