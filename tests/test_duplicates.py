"""Near-duplicates against brute force, whatever the blocks and however large the clusters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from membench.errors import MembenchError
from membench.similarity import duplicates
from membench.similarity.duplicates import (
    keep_first,
    nearest_other_rmse,
    nearest_rmse,
    thumbnails,
)


def all_rmse(images, reference):
    """RMSE of all pairs in float64, [Q, N]."""
    a, b = (x.reshape(len(x), -1) / 255 for x in (images, reference))
    return np.array([np.sqrt(((b - row) ** 2).mean(axis=1)) for row in a])


def greedy(images, rmse):
    """`keep_first` by definition: in integers, since rmse is given as a squared sum."""
    rows = images.reshape(len(images), -1).astype(np.int64)
    kept = []
    for i, row in enumerate(rows):
        if all(((row - rows[j]) ** 2).sum() > rmse for j in kept):
            kept.append(i)
    return np.isin(np.arange(len(images)), kept)


def rmse_of(squared, images):
    """The RMSE (float32, as the functions return it) of an integer squared distance."""
    values = np.prod(images.shape[1:])
    return float(np.float32(np.float32(np.sqrt(squared) / 255) / np.sqrt(np.float64(values))))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 5)


def clusters(rng, n, centres=6, noise=3, shape=(8, 8, 3)):
    """Images around a few centres, in random order."""
    base = rng.integers(20, 230, (centres, *shape))
    chosen = base[rng.integers(0, centres, n)]
    return (chosen + rng.integers(-noise, noise + 1, chosen.shape)).astype(np.uint8)


def test_small_images_are_their_own_thumbnails(rng, tmp_path):
    for shape in ((32, 32, 3), (1, 1, 1), (32, 5, 2)):
        images = rng.integers(0, 256, (3, *shape), dtype=np.uint8)
        assert thumbnails(images) is images
    np.save(tmp_path / "images.npy", images)
    assert isinstance(thumbnails(np.load(tmp_path / "images.npy", mmap_mode="r")), np.memmap)


@pytest.mark.parametrize("shape", [(64, 64, 3), (128, 64, 1), (33, 200, 3), (2000, 1, 2)])
def test_thumbnails_are_averages(rng, tmp_path, monkeypatch, shape):
    monkeypatch.setattr(duplicates, "_BLOCK_BYTES", 30_000)
    images = rng.integers(0, 256, (5, *shape), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    seen = []
    found = thumbnails(np.load(tmp_path / "images.npy", mmap_mode="r"), progress=seen.append)
    height, width, channels = shape
    h, w = found.shape[1:3]
    assert max(h, w) == 32 and sum(seen) == 5
    assert abs(h / w - height / width) <= max(height / width / w, 1 / w) or min(h, w) == 1
    if height % h == 0 and width % w == 0:  # whole patches: the mean, rounded once per axis
        patches = images.reshape(5, h, height // h, w, width // w, channels)
        np.testing.assert_allclose(found, patches.mean(axis=(2, 4)), atol=1)
    if channels == 3:  # the same as Pillow does for a colour image
        whole = [Image.fromarray(x).resize((w, h), Image.Resampling.BOX) for x in images]
        np.testing.assert_array_equal(found, np.stack(whole))


def test_nearest_rmse_equals_brute_force(rng):
    images, reference = clusters(rng, 30), clusters(rng, 200)
    images[:3] = reference[:3]
    found = nearest_rmse(images, reference)
    assert found.dtype == np.float32 and (found[:3] == 0).all()
    np.testing.assert_allclose(found, all_rmse(images, reference).min(axis=1), rtol=1e-6)


def test_nearest_rmse_of_large_images_is_that_of_thumbnails(rng):
    images, reference = (rng.integers(0, 256, (n, 64, 48, 3), dtype=np.uint8) for n in (4, 30))
    small = [thumbnails(x) for x in (images, reference)]
    found = nearest_rmse(images, reference)
    np.testing.assert_allclose(found, all_rmse(*small).min(axis=1), rtol=1e-6)
    assert (nearest_rmse(small[0], reference) == found).all()


def test_nearest_other_rmse_equals_brute_force(rng):
    images = clusters(rng, 150)
    images[100:103] = images[5]  # four copies
    images[149] = images[0]
    expected = all_rmse(images, images)
    np.fill_diagonal(expected, np.inf)
    found = nearest_other_rmse(images)
    np.testing.assert_allclose(found, expected.min(axis=1), rtol=1e-6)
    assert np.flatnonzero(found == 0).tolist() == [0, 5, 100, 101, 102, 149]


def test_all_equal_and_single_images():
    equal = np.full((70, 8, 8, 1), 7, np.uint8)
    assert (nearest_other_rmse(equal) == 0).all()
    assert keep_first(equal, 0).tolist() == [True] + [False] * 69
    assert nearest_other_rmse(equal[:1]).tolist() == [np.inf]
    assert keep_first(equal[:1], 0.5).tolist() == [True]


@pytest.mark.parametrize("centres", [1, 6, 60])
def test_keep_first_equals_the_definition(rng, small_chunks, centres):
    images = clusters(rng, 120, centres)
    squared = np.quantile(
        [((a.astype(int) - b) ** 2).sum() for a in images[:20] for b in images], [0.02, 0.1, 0.5]
    ).astype(int)
    for limit in squared:
        found = keep_first(images, rmse_of(limit, images))
        np.testing.assert_array_equal(found, greedy(images, limit))
        assert centres > 1 or 1 < found.sum() < 120


def test_a_chain_is_cut_greedily(small_chunks):
    """Each image is near the next only: every second one stays, although all are connected."""
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * 2
    assert keep_first(images, rmse_of(4, images)).tolist() == [True, False] * 20


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_keep_first_for_any_images_and_edges(data):
    n, top = data.draw(st.integers(1, 30)), data.draw(st.sampled_from([1, 6, 255]))
    images = data.draw(hnp.arrays(np.uint8, (n, 1, 2, 1), elements=st.integers(0, top)))
    rows = images.reshape(n, -1).astype(np.int64)
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    squared = int(((rows[i] - rows[j]) ** 2).sum())  # exactly on the edge of a pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_CHUNK", data.draw(st.integers(1, 9)))
        found = keep_first(images, rmse_of(squared, images))
    np.testing.assert_array_equal(found, greedy(images, squared))


def test_the_edge_is_that_of_nearest_rmse(rng):
    """Whatever RMSE is reported for a pair, it is dropped at that RMSE and kept just below."""
    images = rng.integers(0, 256, (60, 5, 7, 3), dtype=np.uint8)
    for pair in images.reshape(30, 2, 5, 7, 3):
        rmse = nearest_rmse(pair[1:], pair[:1])[0]
        below = np.nextafter(rmse, np.float32(0))
        assert keep_first(pair, float(rmse)).tolist() == [True, False]
        assert keep_first(pair, float(below)).tolist() == [True, True]


def test_memory_does_not_change_the_answer(rng):
    images, reference = clusters(rng, 200), clusters(rng, 100)
    for memory in (2**18, 2**20):
        options = {"memory_bytes": memory}
        assert (nearest_rmse(images, reference, **options) == nearest_rmse(images, reference)).all()
        assert (nearest_other_rmse(images, **options) == nearest_other_rmse(images)).all()
        assert (keep_first(images, 0.008, **options) == keep_first(images, 0.008)).all()


def test_progress_adds_up(rng, small_chunks):
    images, reference = clusters(rng, 33), clusters(rng, 20)
    for total, run in (
        (33 * 20, lambda tick: nearest_rmse(images, reference, progress=tick)),
        (33 * 33, lambda tick: nearest_other_rmse(images, progress=tick)),
        (33, lambda tick: keep_first(images, 0.01, progress=tick)),
        (33, lambda tick: thumbnails(images, progress=tick)),
    ):
        seen = []
        run(seen.append)
        assert sum(seen) == total


GOOD = np.zeros((3, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thumbnails(GOOD.astype(float)), "uint8 images"),
        (lambda: thumbnails(GOOD[0]), "uint8 images"),
        (lambda: thumbnails([1]), "uint8 images"),
        (lambda: nearest_rmse(GOOD[:0], GOOD), "no images"),
        (lambda: nearest_rmse(GOOD, GOOD[:, :2]), "differ in shape"),
        (lambda: keep_first(GOOD, np.nan), "finite number"),
        (lambda: keep_first(GOOD, -0.1), "finite number"),
        (lambda: keep_first(GOOD, np.inf), "finite number"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(MembenchError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
