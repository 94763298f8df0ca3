"""What drawing images asks of the networks: every call is counted, and each runs on one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import unet
from sweeps import made, write_file, write_plugins
from torch import nn

from membench.contract import silent
from membench.data.imageset import Dataset
from membench.diffusion.classifier import ResNet
from membench.diffusion.targets import UNetTarget
from membench.diffusion.threads import torch_threads
from membench.diffusion.unet import NoiseSchedule, schedule_abar
from membench.lab import Lab
from membench.registry import Registry
from membench.run import Cell, build_cell, cost_of
from membench.specs import RunSpec, Sampling
from membench.store import Store
from membench.sweep.dispatch import go
from membench.sweep.local import Local

IMAGES, STEPS, BATCH = 22, 3, 8  # two batches and a short one


@pytest.fixture
def target() -> UNetTarget:
    return UNetTarget("random", unet(), (1, 16, 16), schedule_abar(NoiseSchedule()), {"kind": "t"})


@pytest.fixture
def lab(small: Dataset, target: UNetTarget, tmp_path: Path) -> Lab:
    extraction = small.card.extraction.model_copy(
        update={"sampling": Sampling(steps=STEPS, batch_size=BATCH)}
    )
    attack = small.card.attack.model_copy(update={"synthetic_images": 36})
    card = small.card.model_copy(update={"extraction": extraction, "attack": attack})
    return Lab(replace(small, card=card), target, Store(tmp_path / "results"), silent)


def cell_of(lab: Lab, method: str) -> Cell:
    spec = RunSpec(
        method=method, dataset="fashion_mini", target="random", guidance_scales=(0.0, 0.3),
        images_per_scale=IMAGES, sampling=lab.dataset.card.extraction.sampling,
    )  # fmt: skip
    return build_cell(spec, Registry().method(method), lab)


class Counter:
    """Images that a network was really shown, by a hook on its every call."""

    def __init__(self, network: nn.Module | None = None) -> None:
        self.images = 0
        if network is not None:
            network.register_forward_hook(self)

    def __call__(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.images += len(inputs[0])


@pytest.mark.parametrize("method", ["random", "side_o"])
def test_the_record_counts_what_was_called(lab: Lab, target: UNetTarget, method: str) -> None:
    """The synthetic set, plain and guided images: steps x images of each, no call more."""
    counter = Counter(target.network)
    cell = cell_of(lab, method)
    for images in cell.images.values():
        lab.store.get(images)
    bill = lab.store.bill(list(cell.images.values()))
    guided = cell.surrogate is not None
    expected = IMAGES * STEPS * len(cell.images) + (36 * STEPS if guided else 0)
    assert cost_of(bill)["unet_calls"] == counter.images == expected


def test_classifier_calls_are_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of guidance at scale 0.3; there are none at scale 0."""
    cell, counter = cell_of(lab, "side_o"), Counter()
    assert cell.surrogate is not None
    lab.store.get(cell.surrogate.classifier)
    forward = ResNet.forward

    def counted(self: ResNet, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        counter(self, (x,), None)
        return forward(self, x, t)

    monkeypatch.setattr(ResNet, "forward", counted)
    for scale, expected in ((0.0, 0), (0.3, IMAGES * STEPS)):
        counter.images = 0
        lab.store.get(cell.images[scale])
        assert lab.store.stages[cell.images[scale].key].work.classifier_calls == expected
        assert counter.images == expected


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_stop_costs_no_second_call(lab: Lab, target: UNetTarget, scale: float) -> None:
    """Stopped after a batch: both attempts together call what the record says, once."""

    @contextmanager
    def stop(title: str, total: int, unit: str) -> Iterator[Any]:
        def advance(n: int) -> None:
            if title.startswith(("plain", "images")):
                raise KeyboardInterrupt

        yield advance

    surrogate = cell_of(lab, "side_o").surrogate
    assert surrogate is not None
    lab.store.get(surrogate.classifier)
    counter = Counter(target.network)
    stopped = cell_of(replace(lab, progress=stop), "side_o")
    with torch_threads(1):
        with pytest.raises(KeyboardInterrupt):
            lab.store.get(stopped.images[scale])
        assert counter.images == BATCH * STEPS
        images = cell_of(lab, "side_o").images[scale]
        lab.store.get(images)
    assert lab.store.stages[images.key].work.unet_calls == counter.images == IMAGES * STEPS


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_side_by_side_take_one_thread_each(
    lab: Lab, target: UNetTarget, count: int
) -> None:
    """As many batches at a time as the process has threads, and so no more threads than that."""
    seen, busy, most, lock = set[int](), 0, 0, threading.Lock()

    def enter(*_: Any) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
            seen.add(torch.get_num_threads())
        time.sleep(0.02)  # so that the others are seen beside it

    def leave(*_: Any) -> None:
        nonlocal busy
        with lock:
            busy -= 1

    target.network.register_forward_pre_hook(enter)
    target.network.register_forward_hook(leave)
    with torch_threads(count):
        lab.store.get(cell_of(lab, "random").images[0.0])
        assert torch.get_num_threads() == count
    assert seen == {1}
    assert most == count


def test_workers_take_the_threads_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes at a time on one core each, whatever the environment said before."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    body = (
        "import os, pathlib, torch; found = torch.get_num_threads(), os.environ['OMP_NUM_THREADS']"
        f"; pathlib.Path({str(tmp_path)!r}, f'threads-{{os.getpid()}}').write_text(str(found))"
    )
    file = write_file(tmp_path, methods=["mine", "theirs"], images=4)
    write_plugins(tmp_path / "plugins", mine=body, theirs=body)
    go(made(file, tmp_path / "results"), Local(jobs=2))
    found = [path.read_text() for path in tmp_path.glob("threads-*")]
    assert found and set(found) == {"(1, '1')"}
