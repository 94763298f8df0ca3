"""The search as GPUs do it, on the CPU: the same code, and the answers of brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st

from membench.contract import silent
from membench.errors import MembenchError
from membench.registry import Registry
from membench.run import prepare, run
from membench.similarity import Index, match, nearest
from membench.similarity import devices as on
from membench.similarity.filter import centre_of


def brute(queries: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices in float64, ties by the lower index."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (queries, reference))
    squared = ((a[:, None] - b[None]) ** 2).sum(axis=2)
    index = np.argsort(squared, axis=1, kind="stable")[:, :k]
    scale = 255 if queries.dtype == np.uint8 else 1
    distance = np.sqrt(np.take_along_axis(squared, index, axis=1)) / scale
    return distance.astype(np.float32), index


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 9),
    references=st.integers(1, 40),
    k=st.integers(1, 12),
    dtype=st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
    values=st.sampled_from([2, 5, 256]),
    names=st.sampled_from([("cpu",), ("cpu", "cpu", "cpu")]),
    rows=st.integers(1, 9),
)
def test_the_answer_is_that_of_brute_force(
    seed: int, queries: int, references: int, k: int, dtype: type, values: int,
    names: tuple[str, ...], rows: int,
) -> None:  # fmt: skip
    """Few values make many ties, which lists cannot tell apart; small blocks cut anywhere."""
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, values, (n, 6)).astype(dtype) for n in (queries, references))
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on, "Q_ROWS", rows)
        patch.setattr(on, "TILE", 6 * rows)
        found = nearest(x, Index(y, names), k, progress=seen.append)
    distance, index = brute(x, y, min(k, references))
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.distance, distance)
    assert sum(seen) == queries * references


def test_a_list_that_may_lack_something_is_not_sure() -> None:
    """Copies beyond the end of a list: float32 ranks cannot say that none of them is nearer."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (60, 8), dtype=np.uint8)
    reference[20:50] = reference[20]
    queries = np.stack([reference[20], reference[3]])
    ((block, listed),) = on.listed_blocks(
        queries, reference, centre_of(reference)[0], 5, 10, ("cpu",), None
    )
    assert len(block) == 2
    assert listed.sure.tolist() == [False, True]
    assert (np.diff(listed.rank, axis=1) >= 0).all()
    found = nearest(queries, Index(reference, ("cpu",)), 5)
    assert found.index[0].tolist() == [20, 21, 22, 23, 24]


def test_lists_are_sure_where_images_differ() -> None:
    """Smooth images, as pictures are: hardly a query goes back to the CPU."""
    rng = np.random.default_rng(1)
    images = np.cumsum(rng.normal(size=(1200, 16, 16)), axis=2).cumsum(axis=1)
    images = np.clip(128 + 12 * images, 0, 255).astype(np.uint8)[..., None]
    blocks = on.listed_blocks(
        images[:200], images[200:], centre_of(images)[0], 20, 40, ("cpu",), None
    )
    assert np.concatenate([listed.sure for _, listed in blocks]).mean() > 0.95


def test_products_are_full_float32_and_the_setting_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with on._full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_matches_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    images, members, twin = (rng.integers(0, 256, (n, 8, 8, 1), np.uint8) for n in (30, 90, 90))
    mirrored = images[:, :, ::-1]
    plain = match(images, members, twin, 10, mirrored=mirrored)
    there = match(images, members, twin, 10, mirrored=mirrored, search_on=("cpu", "cpu"))
    for name in ("members", "heldout"):
        a, b = getattr(plain, name).listed, getattr(there, name).listed
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.distance, b.distance)


def test_a_record_does_not_depend_on_it(tmp_path: Path) -> None:
    seals = []
    for place in ((), ("cpu",)):
        cell = prepare(
            Registry(), tmp_path / f"on-{len(place)}", silent, method="random",
            dataset="fashion_mini", target="oracle:0.5", images=32, steps=2, device="cpu",
            search_on=place,
        )  # fmt: skip
        record = run(cell)
        seals.append((record["id"], record["results_sha256"]))
    assert seals[0] == seals[1]


def test_a_device_that_is_not_there_is_one_line(command: Command) -> None:
    with pytest.raises(MembenchError, match=r"--search-on: 'cuda:77' is not there"):
        on.check_devices(["cpu", "cuda:77"])
    done = command(
        "run", "--method", "random", "--dataset", "fashion_mini", "--target", "oracle:0.5",
        "--search-on", "gpu0", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--search-on: 'gpu0' is not there" in done.stderr
