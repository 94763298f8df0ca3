"""Near-duplicates by a strict absolute rule that knows no score: RMSE between thumbnails.

The rule measures two images only, in units of pixels, so it depends neither on the rest of a data
set (as normalised L2 does) nor on a descriptor and its weights. Searches are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from membench.errors import MembenchError
from membench.similarity.pages import release
from membench.similarity.search import nearest, within

Array = NDArray[Any]
Progress = Callable[[int], None] | None

SIDE = 32  # longest side of a thumbnail, pixels
_BLOCK = 2048  # images compared at a time by `keep_first`


def thumbnails(images: Array) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, C] as they are up to 32 pixels on the longer side, else averaged down.

    Larger ones become [N, h, w, C] with 32 pixels on the longer side, each the mean of its area
    (Pillow's BOX), rounded. They may be a memory map, which is read image by image.
    Raises MembenchError for other shapes and dtypes, and for channels other than 1 or 3.
    """
    images = np.asarray(images)  # a memory map stays one
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise MembenchError(
            f"near-duplicates need uint8 images [N, H, W, C], not {images.dtype} {images.shape}"
        )
    n, height, width, channels = images.shape
    longer = max(height, width)
    if longer <= SIDE:
        return images
    if channels not in (1, 3):
        raise MembenchError(f"near-duplicates need images of 1 or 3 channels, not {channels}")
    h, w = (max(1, round(side * SIDE / longer)) for side in (height, width))
    small = np.empty((n, h, w, channels), np.uint8)
    for i, image in enumerate(images):
        pixels = Image.fromarray(image[..., 0] if channels == 1 else image)
        small[i] = np.asarray(pixels.resize((w, h), Image.Resampling.BOX)).reshape(h, w, channels)
        release(image)
    return small


def nearest_rmse(
    images: Array, reference: Array, *, progress: Progress = None
) -> NDArray[np.float32]:
    """RMSE [Q], pixels in [0, 1], of each image's thumbnail to the nearest one of the reference.

    images, reference: uint8 [*, H, W, C]. progress: called with numbers of pairs, Q * N in all.
    """
    images, reference = thumbnails(images), thumbnails(reference)
    found = nearest(images, reference, 1, progress=progress)
    return _rmse(found.distance[:, 0], images)


def nearest_other_rmse(images: Array, *, progress: Progress = None) -> NDArray[np.float32]:
    """RMSE [N], pixels in [0, 1], of each thumbnail to the nearest *other* one of the same set.

    Exact duplicates have 0, a single image inf. images: uint8 [N, H, W, C]. progress: called with
    numbers of pairs, N * N in all.
    """
    images = thumbnails(images)
    found = nearest(images, images, 2, progress=progress)
    if len(images) == 1:
        return np.full(1, np.inf, np.float32)
    # the image itself comes first, or behind a duplicate, which is at distance 0 as well
    itself = found.index[:, 0] == np.arange(len(images))
    return _rmse(np.where(itself, found.distance[:, 1], found.distance[:, 0]), images)


def keep_first(images: Array, rmse: float, *, progress: Progress = None) -> NDArray[np.bool_]:
    """Which images [N] remain if each within `rmse` of an earlier one that remains is dropped.

    images: uint8 [N, H, W, C]; compared as thumbnails. rmse: pixels in [0, 1], edge included.
    Exact for duplicates in any number; the working memory does not grow with them.
    progress: called with numbers of pairs, N * N in all (a pair counts in both orders).
    """
    images = thumbnails(images)
    radius = rmse * _values(images)
    kept = np.ones(len(images), bool)
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK]
        stop = start + len(block)
        own = kept[start:stop]  # a view
        near = np.zeros((len(block), len(block)), bool)  # [earlier, later] of this block
        for query, index, _ in within(block, images[:stop], radius):
            inside = index >= start
            near[index[inside] - start, query[inside]] = True
            own[query[~inside][kept[index[~inside]]]] = False
        near = np.triu(near, 1)
        for i in np.flatnonzero(near.any(axis=1)):
            if own[i]:
                own[near[i]] = False
        if progress is not None:
            progress(stop**2 - start**2)
    return kept


def _values(images: Array) -> float:
    """L2 distance over RMSE of such images."""
    return math.sqrt(math.prod(images.shape[1:]))


def _rmse(distance: NDArray[np.float32], images: Array) -> NDArray[np.float32]:
    rmse: NDArray[np.float32] = (distance.astype(np.float64) / _values(images)).astype(np.float32)
    return rmse
