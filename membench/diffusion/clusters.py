"""Clusters as surrogate labels (SIDE-C): k-means on descriptors of synthetic images (spec 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from membench.diffusion.sampler import from_uint8
from membench.errors import MembenchError

DESCRIPTORS = ("pixels_pca", "pixels_lowres")
DIRECTIONS, VARIANCE = 64, 0.95  # pixels_pca: the fewest directions that hold 95 %, at most 64
LOWRES = 8  # pixels_lowres: at most 8 x 8 averages per channel
IMAGES_PER_CLUSTER = 4
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Clusters:
    """labels: int64 [N], each image's kept cluster, 0 .. n_clusters - 1; report: JSON-able."""

    labels: np.ndarray
    n_clusters: int
    report: dict[str, Any]


def describe(images: np.ndarray, name: str) -> np.ndarray:
    """Descriptors of a set of images, centred on the set and L2-normalised: float64 [N, D].

    images: uint8 [N, H, W, C]. `pixels_pca`: coordinates along the first principal directions of
    the pixels; `pixels_lowres`: pixels averaged to 8 x 8.
    """
    if name not in DESCRIPTORS:
        raise MembenchError(f"cluster_descriptor: {name!r}, expected one of {DESCRIPTORS}")
    if name == "pixels_lowres":
        _, height, width, _ = images.shape
        size = (min(height, LOWRES), min(width, LOWRES))
        pooled = torch.nn.functional.adaptive_avg_pool2d(from_uint8(images), size)
        raw = pooled.flatten(1).double().numpy()
    else:
        from sklearn.decomposition import PCA

        pixels = from_uint8(images).flatten(1).double().numpy()
        pca = PCA(min(DIRECTIONS, *pixels.shape), svd_solver="full")
        coordinates = pca.fit_transform(pixels)
        held = np.cumsum(pca.explained_variance_ratio_)
        raw = coordinates[:, : int(np.searchsorted(held, VARIANCE)) + 1]
    return _normalised(raw - raw.mean(axis=0))


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def check_settings(count: int, n_clusters: int, min_cohesion: float) -> None:
    """Refuse settings that cannot cluster `count` images, with a `MembenchError`."""
    if n_clusters < 2 or not 0 <= min_cohesion <= 1:
        raise MembenchError(
            f"clusters: n_clusters={n_clusters}, min_cohesion={min_cohesion}; expected at least 2 "
            "clusters and a cohesion from 0 to 1"
        )
    if count < IMAGES_PER_CLUSTER * n_clusters:
        raise MembenchError(
            f"clusters: {count} images are too few for {n_clusters} clusters; "
            f"take at least {IMAGES_PER_CLUSTER * n_clusters}"
        )


def cluster(
    descriptors: np.ndarray, n_clusters: int = 100, *, seed: int, min_cohesion: float = 0.5
) -> Clusters:
    """k-means on L2-normalised descriptors [N, D]; loose clusters are dropped, images relabelled.

    The cohesion of a cluster is the mean cosine of its images to its centroid. Clusters below
    `min_cohesion` are dropped, and every image takes the label of the nearest kept centroid (by
    cosine). Raises `MembenchError` when there are too few images or no cluster is kept.
    """
    from sklearn.cluster import KMeans

    check_settings(len(descriptors), n_clusters, min_cohesion)
    descriptors = np.asarray(descriptors, dtype=np.float64)
    with threadpool_limits(1):  # sums of several threads depend on who comes first
        found = KMeans(n_clusters, n_init=4, random_state=seed % 2**32).fit(descriptors)
    centroids = _normalised(found.cluster_centers_)
    first = found.labels_
    sizes = np.bincount(first, minlength=n_clusters)
    cosine = (descriptors * centroids[first]).sum(axis=1)
    cohesion = np.bincount(first, weights=cosine, minlength=n_clusters) / np.maximum(sizes, 1)
    kept = np.flatnonzero((cohesion >= min_cohesion) & (sizes > 0))
    if not len(kept):
        raise MembenchError(
            f"clusters: none of {n_clusters} has a cohesion of {min_cohesion} "
            f"(the best has {cohesion.max():.2f}); choose another descriptor or fewer clusters"
        )
    labels = (descriptors @ centroids[kept].T).argmax(axis=1)
    quantiles = {f"{q:g}": float(np.quantile(cohesion, q)) for q in QUANTILES}
    return Clusters(
        labels,
        len(kept),
        {
            "n_clusters": n_clusters,
            "kept": len(kept),
            "min_cohesion": min_cohesion,
            "dimensions": descriptors.shape[1],
            "mean_cohesion": float(cosine.mean()),
            "cohesion_quantiles": quantiles,
            "images_in_dropped": int((~np.isin(first, kept)).sum()),
            "sizes": np.bincount(labels, minlength=len(kept)).tolist(),
        },
    )
