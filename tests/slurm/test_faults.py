"""Sweeps on a real Slurm cluster, and everything that can go wrong with it.

After each fault the board is complete or the missing rows are named, and no batch that was whole
was made again.
"""

from __future__ import annotations

import pytest
from cluster import Trial

pytestmark = pytest.mark.slurm

ORACLE = {"name": "fashion_mini", "targets": ["oracle:0.5"]}
PACE = 0.7
"""Seconds a batch takes where a fault must come in its middle."""


def one_cell(trial: Trial, **more: object) -> None:
    """A cell of 512 images, in two shards of four batches."""
    content = {"methods": ["paced"], "shards": 2, "resources": {"default": {"memory": 0.5}}}
    trial.sweep = trial.create(trial.write(name="trial", **content | more, datasets=["fashion_mini"], targets=["oracle:0.5"]))


def test_whole(trial):
    one_cell(trial)
    trial.submit(pace=PACE)
    trial.finish()
    print(trial.summary())
    assert trial.twice() == 0
