"""The check of Theorem 1: on targets whose answer is known, and how its verdicts read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from membench.contract import silent
from membench.experiments import theorem as experiment
from membench.registry import Registry


def found(model: str, log_p: float, noise: float = 1.0) -> experiment._Found:
    """A model whose log density is `log_p` at 20 members, 10 lower at held-out images."""
    rng = np.random.default_rng(0)
    values = {"rows": np.arange(20)}
    for e in range(len(experiment.EPSILONS)):
        for side, lower in (("members", 0), ("heldout", 10)):
            values[f"{side}_log_q_{e}"] = np.zeros((20, 1))
            values[f"{side}_log_p_{e}"] = log_p - lower + noise * rng.standard_normal((20, 1, 1))
    return experiment._Found(model, "elbo of p(x)", {}, values)


def rows(*items: experiment._Found, gap: float = 10.0) -> list[dict]:  # type: ignore[type-arg]
    return [
        {"model": item.model, "measure": item.measure, "epsilon": e, "gap": gap, "gap_error": 1.0}
        for item in items
        for e in experiment.EPSILONS
    ] + [
        {"model": item.model, "measure": metric, "epsilon": None, "members": 0.1, "heldout": 0.0}
        for item in items
        for metric in ("AMS", "UMS")
    ]


@pytest.mark.parametrize(
    ("log_p", "word"),
    [
        (-95.0, "lower, as predicted"),
        (-105.0, "not lower: against the prediction"),
        (-100.0, "not distinguishable"),
    ],
)
def test_the_verdict_is_that_of_the_paired_difference(log_p: float, word: str) -> None:
    items = found("none", -100.0), found("labels", log_p, noise=1.5)
    lines = experiment._reading(rows(*items), items)
    assert len(lines) == len(experiment.EPSILONS) + 2
    assert all(word in line for line in lines[:2])
    assert "none 10.00 % (0.00 %)" in lines[2]


@pytest.mark.slow
def test_theorem_of_targets_of_known_order(registry: Registry, tmp_path: Path) -> None:
    """A model that copies members always, against one that does so half the time."""
    folder = experiment.theorem(
        registry, tmp_path / "results", silent, out=tmp_path / "out", images=8,
        targets={"half": "oracle:0.5", "all": "oracle:1"}, estimators=("elbo",),
    )  # fmt: skip
    with open(folder / "theorem.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    ams = {line["model"]: float(line["members"]) for line in lines if line["measure"] == "AMS"}
    assert ams["all"] > 0.95 and abs(ams["half"] - 0.5) < 0.15
    facts = json.loads((folder / "theorem.json").read_text())
    assert facts["rows"] and "<svg" in (folder / "theorem.svg").read_text()
    gaps = {line["model"]: float(line["gap"]) for line in lines if line["epsilon"] == "0.05"}
    assert gaps["all"] > gaps["half"] > 0
