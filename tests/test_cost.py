"""The cost model of exact matching: by hand, by its own laws, and as a command."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from membench.cli import app
from membench.errors import MembenchError
from membench.similarity.cost import H100, Hardware, Search, memory, steps, this_cpu, total

ROUND = Hardware(
    name="round numbers",
    products={"float32": 1e9, "bfloat16": 4e9},
    plain=1e8,
    bandwidth=1e9,
    results=1e7,
    keys=1e6,
    memory=10**9,
    queries_at_once=100,
    source="made up",
)


def test_full_product_by_hand() -> None:
    """1,000 queries, 2,000 references, 500 values of 4 bytes, 50 neighbours; ten groups."""
    found = steps(Search(1_000, 2_000, 500), ROUND, "float32")
    features, filter_, compare, select, refine = found
    assert (features.flops, features.bytes) == (0, 3_000 * (2_000 + 2_000))
    assert features.seconds == pytest.approx(0.012), "by its bytes"
    assert filter_.flops == 2 * 1_000 * 2_000 * 500
    assert filter_.bytes == (1_000 + 10 * 2_000) * 2_000
    assert filter_.seconds == pytest.approx(2.0), "by its FLOPs"
    assert (compare.flops, compare.bytes, compare.seconds) == (2e6, 1.6e7, 0.2)
    candidates = 1_000 * 50 * (1 + math.log(2_000 / 50))
    assert (select.flops, select.bytes) == (0, pytest.approx(16 * candidates))
    assert select.seconds == pytest.approx(candidates / 1e6)
    assert refine.flops == 3 * 500 * 1_000 * 100, "twice the neighbours survive"
    assert refine.bytes == 1_000 * 100 * 2_000 + 1_000 * 50 * 8
    assert refine.seconds == pytest.approx(1.5)
    whole = total(found)
    assert whole.seconds == pytest.approx(0.012 + 2.0 + 0.2 + select.seconds + 1.5)
    assert whole.flops == features.flops + filter_.flops + compare.flops + refine.flops


def test_directions_by_hand() -> None:
    search = Search(1_000, 2_000, 500, itemsize=1, directions=20, survivors=300)
    features, filter_, _, _, refine = steps(search, ROUND, "bfloat16")
    assert features.flops == 2 * 3_000 * 500 * 20
    assert features.bytes == 3_000 * (500 + 2 * 20)
    assert filter_.flops == 2 * 1_000 * 2_000 * 20
    assert filter_.seconds == pytest.approx(filter_.flops / 4e9)
    assert refine.flops == 3 * 500 * 1_000 * 300


def test_memory_by_hand() -> None:
    """Rows and features, unless they are the same; a group of queries; its product; the result."""
    rest = 100 * 2_000 * 4 + 1_000 * 50 * 8
    assert memory(Search(1_000, 2_000, 500), ROUND, "float32") == 2_100 * 2_000 + rest
    pixels = Search(1_000, 2_000, 500, itemsize=1, directions=20, survivors=300)
    assert memory(pixels, ROUND, "bfloat16") == 2_100 * (500 + 40) + rest


def test_imagenet_on_an_h100_by_the_data_sheet() -> None:
    """What the product alone must take: 2 Q N D FLOPs at the peak."""
    search = Search(1_000_000, 1_281_167, 512, itemsize=2)
    flops = 2 * 1_000_000 * 1_281_167 * 512
    by = {p: steps(search, H100, p)[1].seconds for p in H100.products}
    assert by["float32"] == pytest.approx(flops / 67e12)
    assert by["tf32"] == pytest.approx(flops / 494.5e12)
    assert by["bfloat16"] == pytest.approx(flops / 989.5e12)
    assert memory(search, H100, "bfloat16") < H100.memory


sizes = st.integers(1, 10**7)
searches = st.builds(
    Search,
    queries=sizes,
    references=sizes,
    dimensions=st.integers(64, 10**5),
    itemsize=st.sampled_from([1, 2, 4]),
    neighbours=st.integers(1, 100),
    directions=st.none() | st.integers(1, 64),
    survivors=st.floats(1, 1e4),
)


@given(searches, st.sampled_from(["queries", "references", "dimensions"]))
def test_more_of_anything_never_costs_less(search: Search, what: str) -> None:
    larger = dataclasses.replace(search, **{what: 2 * getattr(search, what)})
    for small, large in zip(
        steps(search, ROUND, "float32"), steps(larger, ROUND, "float32"), strict=True
    ):
        assert small.flops <= large.flops <= 2 * small.flops * (1 + 1e-12)
        assert small.bytes <= large.bytes
        assert small.seconds <= large.seconds
    assert memory(search, ROUND, "float32") <= memory(larger, ROUND, "float32")


def test_candidates_are_those_of_a_stream() -> None:
    """Counted: references that enter the k nearest so far, which come in random order."""
    rng = np.random.default_rng(0)
    k, n, queries = 20, 2_000, 200
    entered = 0
    for row in rng.random((queries, n)):
        nearest: list[float] = []
        for distance in row:
            if len(nearest) < k or distance < nearest[-1]:
                entered += 1
                nearest = sorted([*nearest, distance])[:k]
    assert Search(queries, n, 1, neighbours=k).candidates == pytest.approx(entered, rel=0.03)
    assert Search(queries, 7, 1, neighbours=k).candidates == queries * 7


@given(searches)
def test_no_step_beats_the_peaks(search: Search) -> None:
    for step in steps(search, ROUND, "bfloat16")[:2]:
        assert step.seconds >= step.flops / ROUND.products["bfloat16"]
        assert step.seconds >= step.bytes / ROUND.bandwidth
    sketched = search.directions is not None
    assert (steps(search, ROUND, "bfloat16")[0].flops > 0) == sketched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries: 0, expected at least 1"),
        ({"survivors": 0.5}, "survivors: 0.5, expected at least 1"),
        ({"directions": 600, "survivors": 9}, "directions: 600, expected at most the 512"),
        ({"directions": 64}, "survivors: not given"),
    ],
)
def test_what_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(MembenchError, match=message):
        Search(**({"queries": 1, "references": 1, "dimensions": 512} | change))


def test_an_unknown_precision() -> None:
    with pytest.raises(MembenchError, match="'int8', round numbers has figures for float32, bf"):
        steps(Search(1, 1, 1), ROUND, "int8")


def test_this_cpu_is_slower_than_an_h100() -> None:
    cpu = this_cpu()
    assert 1e8 < cpu.products["float32"] < H100.products["float32"]
    assert 1e8 < cpu.bandwidth < H100.bandwidth
    assert 1e6 < cpu.results < H100.results
    assert cpu.memory > 2**28


def test_command() -> None:
    call = ["cost", "--queries", "1000000", "--references", "1281167", "--dimensions", "512"]
    assert "Example: membench cost" in CliRunner().invoke(app, ["cost", "--help"]).output
    shown = CliRunner().invoke(app, [*call, "--no-cpu"])
    assert shown.exit_code == 0, shown.output
    assert "H100 SXM" in shown.output and "bfloat16" in shown.output
    found = json.loads(CliRunner().invoke(app, [*call, "--json", "--stored", "float16"]).output)
    assert {row["hardware"].split(" on ")[0] for row in found["hardware"]} == {
        "H100 SXM",
        "this CPU",
    }
    search = Search(1_000_000, 1_281_167, 512, itemsize=2)
    first = found["hardware"][0]
    assert first["total_seconds"] == total(steps(search, H100, "float32")).seconds
    assert first["total_seconds"] == pytest.approx(sum(first["seconds"].values()))
    assert first["memory_bytes"] == memory(search, H100, "float32")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stored", "int4"], "--stored int4: expected one of float32, float16, uint8"),
        (["--directions", "64"], "survivors: not given"),
    ],
)
def test_a_mistake_is_one_line(more: list[str], message: str) -> None:
    call = ["cost", "--queries", "1", "--references", "1", "--dimensions", "512", *more]
    result = CliRunner().invoke(app, call)
    assert isinstance(result.exception, MembenchError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
