"""What a run holds in memory does not grow with the number of images it draws."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from membench.lab import Lab
from membench.matching import _Features
from membench.similarity.filter import MEMORY

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from stage_memory import RECORD, SHAPE, measure, table

FEW, MANY = 1024, 8192


@pytest.mark.slow
def test_no_stage_holds_all_images() -> None:
    """Seven times as many images more, 84 MiB of them, and no stage takes a quarter of that more.

    But for matches: a search takes what it is allowed, once there are queries for it.
    """
    rows = measure([FEW, MANY], method="random")
    more = (MANY - FEW) * SHAPE[0] * SHAPE[1] * SHAPE[2] / 2**20
    peaks = {(row["stage"], row["images"]): row["peak_above_mib"] for row in rows}
    written = {(row["stage"], row["images"]): row["written_mib"] for row in rows}
    stages = {stage for stage, count in peaks if count == MANY}
    assert {"plain images", RECORD} < stages, "and the matches"
    assert written["plain images", MANY] - written["plain images", FEW] == pytest.approx(more, 0.01)
    for stage in stages:
        if stage.startswith("matches"):
            assert peaks[stage, MANY] < MEMORY / 2**20, f"{stage}:\n{table(rows)}"
        else:
            assert peaks[stage, MANY] - peaks[stage, FEW] < more / 4, f"{stage}:\n{table(rows)}"


def test_mirrored_images_are_a_view(lab: Lab) -> None:
    images = lab.dataset.heldout.images
    mirrored = _Features(lab.matcher, {"split": "heldout"}).queries(lambda: images, mirrored=True)
    np.testing.assert_array_equal(mirrored[:, :, ::-1], images)
    assert np.shares_memory(mirrored, images)
