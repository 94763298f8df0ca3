"""The matches file: complete, reproducible, and refused when damaged."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from membench.errors import MembenchError
from membench.similarity.matches import Matches, match
from membench.similarity.measures import nl2
from membench.similarity.search import Neighbours, nearest


def images(n, seed=0, shape=(4, 4, 1), high=256):
    return np.random.default_rng(seed).integers(0, high, (n, *shape), dtype=np.uint8)


@pytest.fixture
def matches():
    return match(images(20), images(90, 1), images(90, 2))


def all_distances(queries, reference):
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (queries, reference))
    return (np.sqrt(((a[:, None] - b) ** 2).sum(axis=2)) / 255).astype(np.float32)


def test_nl2_is_its_definition():
    distance = np.sort(np.random.default_rng(0).random((9, 50), np.float32), axis=1)
    expected = [[d / (0.5 * np.mean(row, dtype=np.float64)) for d in row] for row in distance]
    np.testing.assert_allclose(nl2(distance), expected, rtol=1e-12)
    assert (nl2(distance)[:, 0] <= 2).all()


def test_nl2_of_exact_copies_and_of_equal_distances():
    np.testing.assert_array_equal(nl2(np.zeros((1, 3))), [[0, 0, 0]])
    np.testing.assert_array_equal(nl2(np.full((1, 3), 0.25)), [[2, 2, 2]])


@pytest.mark.parametrize("bad", [np.full((1, 2), np.nan), np.ones(3), np.ones((0, 3))])
def test_nl2_refuses(bad):
    with pytest.raises(MembenchError):
        nl2(bad)


@settings(deadline=None)
@given(data=st.data())
def test_pairs_are_complete_below_two(data):
    """Every pair of the whole reference with nL2 <= t is listed, unless all n are exact copies."""
    draw = lambda n: data.draw(  # noqa: E731
        hnp.arrays(np.uint8, (n, 2), elements=st.integers(0, data.draw(st.sampled_from([1, 3, 9]))))
    )
    queries, reference = draw(4), draw(data.draw(st.integers(1, 25)))
    k = data.draw(st.integers(1, 7))  # NumPy sums up to 7 values in order, as we do
    threshold = data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.35, 1.5, 1.9, 1.999]))
    distance = all_distances(queries, reference)
    mean = np.sort(distance.astype(np.float64), axis=1)[:, :k].mean(axis=1)
    expected = {
        (i, j)
        for i in range(len(queries))
        for j in range(len(reference))
        if mean[i] > 0 and distance[i, j] / (0.5 * mean[i]) <= threshold
    }
    image, index, score = match(queries, reference, reference, k).pairs(threshold)
    listed = set(zip(image.tolist(), index.tolist(), strict=True))
    assert {pair for pair in listed if mean[pair[0]] > 0} == expected
    copies = {pair for pair in listed if mean[pair[0]] == 0}
    assert len(copies) == min(k, len(reference)) * (mean == 0).sum()
    assert (score <= threshold).all() and len(score) == len(listed)


def test_pairs_refuse_thresholds_that_are_not_complete(matches):
    for threshold in (2.0, 10.0, np.nan):
        with pytest.raises(MembenchError, match="below 2"):
            matches.pairs(threshold)
    with pytest.raises(MembenchError, match="side"):
        matches.pairs(1.0, "test")


def test_match_searches_both_references(matches):
    for side, seed in ((matches.members, 1), (matches.heldout, 2)):
        found = nearest(images(20), images(90, seed))
        np.testing.assert_array_equal(side.listed.index, found.index)
        np.testing.assert_array_equal(side.listed.distance, found.distance)
    assert len(matches) == 20 and matches.n_members == matches.n_heldout == 90


def test_match_refuses_references_of_unequal_size():
    with pytest.raises(MembenchError, match="held-out reference must have as many"):
        match(images(2), images(5), images(4))


def test_progress_covers_both_searches():
    seen = []
    match(images(3), images(5), images(5, 1), progress=seen.append)
    assert sum(seen) == 2 * 3 * 5


def test_saved_and_loaded_unchanged(matches, tmp_path):
    matches.save(tmp_path / "new" / "matches.npz")
    loaded = Matches.load(tmp_path / "new" / "matches.npz")
    for side in ("members", "heldout"):
        for field in ("distance", "index"):
            before, after = (getattr(m.side(side).listed, field) for m in (matches, loaded))
            np.testing.assert_array_equal(before, after)
            assert before.dtype == after.dtype
    assert (loaded.n_members, loaded.n_heldout) == (90, 90)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["matches.npz"]


def test_same_content_same_bytes(matches, tmp_path, monkeypatch):
    digests = set()
    for now in (1.5e9, 1.6e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        matches.save(tmp_path / "m.npz")
        copy = Matches.load(tmp_path / "m.npz")
        copy.save(tmp_path / "copy.npz")
        for name in ("m.npz", "copy.npz"):
            digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    match(images(20), images(90, 2), images(90, 1)).save(tmp_path / "m.npz")
    assert hashlib.sha256((tmp_path / "m.npz").read_bytes()).hexdigest() not in digests


def test_a_failed_save_leaves_the_old_file(matches, tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    matches.save(path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        matches.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def write_foreign(path):
    np.savez(path, a=np.ones(3))


def write_other_dtype(path):
    ones = np.ones((1, 1))
    names = ("members_distance", "members_index", "heldout_distance", "heldout_index")
    numbers = dict.fromkeys(("members_n", "heldout_n", "members_rows", "heldout_rows"), 1)
    np.savez(path, **dict.fromkeys(names, ones), **numbers, format=2, measure="nl2")


def write_array(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


DAMAGE = {
    "text": lambda path: path.write_text("not a zip"),
    "empty": lambda path: path.write_bytes(b""),
    "first half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a flipped bit": lambda path: path.write_bytes(
        bytes(b ^ (i == path.stat().st_size // 3) for i, b in enumerate(path.read_bytes()))
    ),
    "another npz": write_foreign,
    "other dtypes": write_other_dtype,
    "a bare array": write_array,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_by_name(matches, tmp_path, damage):
    path = tmp_path / "matches.npz"
    matches.save(path)
    damage(path)
    with pytest.raises(MembenchError) as error:
        Matches.load(path)
    message = str(error.value)
    assert str(path) in message and "run the cell again" in message and "\n" not in message


def neighbours(index, distance=None):
    distance = np.zeros(np.shape(index)) if distance is None else distance
    return Neighbours(np.array(distance, np.float32), np.array(index, np.int32))


@pytest.mark.parametrize(
    ("members", "heldout", "n", "message"),
    [
        ([[0, 2]], [[0, 1]], 2, "beyond"),
        ([[0, 1]], [[0, 1]], 1, "only 1 images"),
        ([[1, 1]], [[0, 1]], 2, "twice"),
        ([[0], [1]], [[0]], 2, "same images"),
    ],
)
def test_contradictory_matches_are_refused(members, heldout, n, message):
    with pytest.raises(MembenchError, match=message):
        Matches.of(neighbours(members), neighbours(heldout), n, n)
