"""What the script of growth reads off the data: survivors of a sketch, and how they grow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from scale import K, Point, survivors, survivors_power


def test_survivors_of_all_directions_are_the_neighbours() -> None:
    """64 directions of 64 values lose nothing; of 128 values they lose something."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1_000, 64)).astype(np.float32)
    assert survivors(rows[:40], rows[40:])[64] == pytest.approx(K, abs=0.5)
    wide = rng.standard_normal((1_000, 128)).astype(np.float32)
    found = survivors(wide[:40], wide[40:])
    assert found[128] == pytest.approx(K, abs=0.5)
    assert K + 1 < found[64] < 960


def test_survivors_power_is_that_of_searches_alike() -> None:
    def point(varied: str, references: int, directions: int, left: float) -> Point:
        return Point("pixels", varied, 100, references, 768, directions, left, 1.0, 1.0)

    points = [point("references", n, 128, 5 * n**0.3) for n in (100, 400, 1_600)]
    points += [point("queries", 1_600, 128, 9.0), point("references", 50, 64, 1e6)]
    assert survivors_power(points) == pytest.approx(0.3)
    assert survivors_power([point("queries", 1_600, 128, 9.0)]) == 1.0
