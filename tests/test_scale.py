"""What the script of growth reads off the data: survivors of a sketch, and how they grow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from scale import K, growth, survivors


def test_survivors_of_all_directions_are_the_neighbours() -> None:
    """64 directions of 64 values lose nothing; of 128 values they lose something."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1_000, 64)).astype(np.float32)
    assert survivors(rows[:40], rows[40:])[64] == pytest.approx(K, abs=0.5)
    wide = rng.standard_normal((1_000, 128)).astype(np.float32)
    found = survivors(wide[:40], wide[40:])
    assert found[128] == pytest.approx(K, abs=0.5)
    assert K + 1 < found[64] < 960


def test_growth_is_that_of_what_is_not_a_neighbour() -> None:
    assert growth({n: K + 5 * n**0.3 for n in (100, 400, 1_600)}) == pytest.approx(0.3)
