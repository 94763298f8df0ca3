"""Clusters as surrogate labels: descriptors, the cohesion cut, relabelling, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from membench.data.imageset import ImageSet, load_dataset
from membench.diffusion.clusters import DESCRIPTORS, cluster, describe
from membench.errors import MembenchError
from membench.specs import load_card

DATASETS = Path(__file__).parents[1] / "datasets"


@pytest.fixture(scope="module")
def members() -> ImageSet:
    card = load_card(DATASETS / "fashion_mini.toml")
    return load_dataset(card, DATASETS / "fashion_mini").members


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def bundles(spread: list[float], per_bundle: int = 50) -> np.ndarray:
    """Unit vectors round orthogonal axes, one bundle an axis, of the given spreads."""
    rng = np.random.default_rng(0)
    axes = 2 * np.eye(len(spread))
    noise = rng.standard_normal((len(spread), per_bundle, len(spread)))
    rows = axes[:, None] + noise * np.array(spread)[:, None, None]
    return unit(rows.reshape(-1, len(spread)))


def test_bundles_are_found() -> None:
    rows = bundles([0.1] * 6)
    found = cluster(rows, 6, seed=0)
    assert found.n_clusters == found.report["kept"] == 6
    for start in range(0, 300, 50):
        assert len(set(found.labels[start : start + 50])) == 1
    assert len(set(found.labels)) == 6
    assert found.report["sizes"] == [50] * 6


def test_loose_clusters_are_dropped_and_every_image_relabelled() -> None:
    rng = np.random.default_rng(1)
    tight = np.pad(bundles([0.1] * 4), ((0, 0), (0, 60)))
    loose = np.pad(unit(rng.standard_normal((40, 60))), ((0, 0), (4, 0)))
    rows = np.concatenate([tight, loose])
    found = cluster(rows, 5, seed=0)
    assert found.n_clusters == 4
    assert found.report["images_in_dropped"] == 40
    assert found.labels.shape == (240,)
    assert set(found.labels) == set(range(4))
    assert found.report["cohesion_quantiles"]["0.05"] < 0.5 < found.report["mean_cohesion"]
    with pytest.raises(MembenchError, match=r"none of 5 .*the best has \d\.\d\d"):
        cluster(rows, 5, seed=0, min_cohesion=1.0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(MembenchError, match="300 images are too few for 100 clusters"):
        cluster(bundles([0.1] * 6), seed=0)


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptors_are_centred_and_normalised(members: ImageSet, name: str) -> None:
    rows = describe(members.images, name)
    assert len(rows) == 512 and rows.shape[1] <= 64
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.abs(rows.mean(axis=0)).max() < 0.3


def test_pca_holds_95_percent_of_the_variance(members: ImageSet) -> None:
    pixels = members.images.reshape(512, -1) / 127.5 - 1
    centred = pixels - pixels.mean(axis=0)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2
    held = np.cumsum(variance) / variance.sum()
    dimensions = describe(members.images, "pixels_pca").shape[1]
    assert dimensions == np.searchsorted(held, 0.95) + 1 < 64


def test_clusters_of_images_follow_the_classes(members: ImageSet) -> None:
    found = cluster(describe(members.images, "pixels_pca"), 20, seed=3)
    again = cluster(describe(members.images, "pixels_pca"), 20, seed=3)
    assert np.array_equal(found.labels, again.labels)
    assert found.report == again.report
    json.dumps(found.report)
    pure = sum(
        np.bincount(members.labels[found.labels == k]).max() for k in range(found.n_clusters)
    )
    assert pure / len(members) > 0.5


def test_unknown_descriptors_are_refused(members: ImageSet) -> None:
    with pytest.raises(MembenchError, match="pixels"):
        describe(members.images, "pixel_soup")
