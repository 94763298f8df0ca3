"""The five-method board: model calls of one sweep against those of five runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeps import planned, records, run_inline, write_file

from membench import lab
from membench import run as engine
from membench.diffusion import tdkd
from membench.diffusion.targets import OracleTarget
from membench.registry import Registry
from membench.sweep import worker

FIVE = ["random", "ol_ti", "side_o", "side_a", "side_c"]


class Calls:
    """Images that went through the target and, for guidance and labels, through a classifier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unet: list[int] = []
        self.classifier: list[int] = []

        def counted(target: OracleTarget, seed: int, indices: Any) -> Any:
            predict = eps_model(target, seed, indices)
            return lambda x_t, t: (self.unet.append(len(x_t)), predict(x_t, t))[1]

        def guided(*arguments: Any, **options: Any) -> Any:
            guide = guidance(*arguments, **options)
            return lambda x_t, t, eps: (self.classifier.append(len(x_t)), guide(x_t, t, eps))[1]

        def labelled(network: Any, images: Any) -> Any:
            self.classifier.append(len(images))
            return pseudo_label(network, images)

        eps_model, guidance = OracleTarget.eps_model, lab.classifier_guidance
        pseudo_label = tdkd.pseudo_label
        monkeypatch.setattr(OracleTarget, "eps_model", counted)
        monkeypatch.setattr(lab, "classifier_guidance", guided)
        monkeypatch.setattr(tdkd, "pseudo_label", labelled)

    def take(self) -> tuple[int, int]:
        """The calls since the last time."""
        found = sum(self.unet), sum(self.classifier)
        self.unet.clear()
        self.classifier.clear()
        return found


def test_calls_counted_at_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan promises is what reaches target and classifiers, together and apart."""
    worker.STOP.clear()
    methods = [*FIVE[:-1], {"name": "side_c", "parameters": {"n_clusters": 4}}]
    file = write_file(tmp_path, methods=methods, guidance_scales=[0.1, 0.3])
    plan, _ = planned(file, tmp_path / "results")
    calls = Calls(monkeypatch)
    swept = run_inline(file, tmp_path / "results")
    together = calls.take()
    assert together == plan.calls

    apart = []
    for i in plan.prepared:
        alone, _ = planned(file, tmp_path / f"alone-{i}")
        record = engine.run(alone.prepared[i])
        apart.append(calls.take())
        assert record["results_sha256"] == records(swept)[i]["results_sha256"]
        assert (record["cost"]["unet_calls"], record["cost"]["classifier_calls"]) == apart[-1]
    assert len(apart) == 5
    assert tuple(map(sum, zip(*apart, strict=True))) == plan.calls_apart


@pytest.mark.parametrize(("seeds", "share"), [([0], 0.62), ([0, 1, 2], 0.50)])
def test_the_board_of_fashion_mini(tmp_path: Path, seeds: list[int], share: float) -> None:
    """The card's own numbers: what is drawn once is the synthetic set, shared by three methods."""
    file = tmp_path / "board.toml"
    file.write_text(f'datasets = ["fashion_mini"]\nmethods = {FIVE}\nseeds = {seeds}\n')
    plan, _ = planned(file, tmp_path / "results")
    card = Registry().card("fashion_mini")
    asked, steps = card.extraction, card.extraction.sampling.steps
    synthetic = steps * card.attack.synthetic_images
    guided = steps * asked.images_per_scale * 4 * len(asked.guidance_scales)
    drawn = len(seeds) * (steps * asked.images_per_scale + guided)
    assert plan.calls[0] == drawn + synthetic
    assert plan.calls_apart[0] == drawn + 3 * len(seeds) * synthetic
    assert plan.calls[0] <= share * plan.calls_apart[0]
    # every guided image needs its classifier at every step: only labels can be shared
    labels = 2 * card.attack.synthetic_images
    assert plan.calls[1] == len(seeds) * guided + labels
    assert plan.calls_apart[1] == len(seeds) * (guided + labels)


def test_scale_0_is_drawn_once(tmp_path: Path) -> None:
    """At guidance scale 0 all methods are Random: images and matches of one seed are its own."""
    file = write_file(tmp_path, methods=FIVE[:-1], guidance_scales=[0.0, 0.3])
    plan, _ = planned(file, tmp_path / "results")
    cells = list(plan.prepared.values())
    assert len({cell.images[0.0].key for cell in cells}) == 1
    assert len({cell.matches[0.0].key for cell in cells}) == 1
    assert len({cell.images[0.3].key for cell in cells[1:]}) == 3
