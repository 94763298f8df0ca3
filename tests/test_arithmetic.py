"""Precision and compilation: recorded where they are asked for, near float32, silent otherwise."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from pipelines import save_pipeline, unet
from sweeps import planned, write_file
from torch import Tensor, nn

from membench.checks import cell_of
from membench.contract import silent
from membench.diffusion.arithmetic import Arithmetic, Compiled
from membench.diffusion.classifier import ResNet, freeze
from membench.diffusion.eps import EpsNetwork, Prediction
from membench.diffusion.guidance import by_autograd, gradient_in
from membench.diffusion.targets import UNetTarget, computed
from membench.diffusion.unet import NoiseSchedule, schedule_abar
from membench.errors import MembenchError
from membench.registry import Registry
from membench.rerun import rerun
from membench.run import Cell, prepare, run
from membench.specs import Network, RunSpec, Sampling
from membench.verify import verify

ABAR = schedule_abar(NoiseSchedule())
TINY: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",), "norm_num_groups": 4, "add_attention": False,
}  # fmt: skip
SHAPE = (1, 16, 16)
BFLOAT16 = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
ALL = [
    Arithmetic("bfloat16"),
    pytest.param(Arithmetic(compiled=True), marks=needs_compiler),
    pytest.param(Arithmetic("bfloat16", compiled=True), marks=needs_compiler),
]


# --- what identities say


def test_identities_are_silent_about_plain_float32() -> None:
    assert Sampling().identity() == {"steps": 50, "eta": 0.0, "clip": True, "batch_size": 64}
    asked = Sampling(precision="bfloat16", compile=True)
    assert asked.identity() == Sampling().identity() | {"precision": "bfloat16", "compile": True}
    assert Sampling.model_validate(asked.model_dump()) == asked
    spec = RunSpec(
        method="random", dataset="d", target="t", guidance_scales=(0.0,), images_per_scale=1,
        sampling=Sampling(),
    )  # fmt: skip
    assert spec.identity()["sampling"] == Sampling().identity()


def cell(registry: Registry, results: Path, method: str = "random", **options: Any) -> Cell:
    return prepare(
        registry, results, silent, method=method, dataset="fashion_mini", device="cpu",
        **{"steps": 3, "images": 6, "batch_size": 4} | options,
    )  # fmt: skip


@needs_compiler
def test_records_and_images_are_others_and_the_attack_is_the_same(
    registry: Registry, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"precision": "bfloat16"}, {"compile": True},
        {"precision": "bfloat16", "compile": True},
    ]  # fmt: skip
    cells = [cell(registry, tmp_path, "side_c", **options) for options in asked]
    plain = cell(registry, tmp_path, "side_c", precision="float32", compile=False)
    assert plain.id == cells[0].id
    assert len({c.id for c in cells}) == len({c.images[0.3].key for c in cells}) == len(cells)
    surrogates = [c.surrogate.classifier.key for c in cells if c.surrogate]
    assert len(surrogates) == 4 and len(set(surrogates)) == 1


def test_a_sweep_takes_them(tmp_path: Path) -> None:
    file = write_file(
        tmp_path, targets=["ddpm"], precision="bfloat16",
        methods=["random", {"name": "ol_ti", "precision": "float32"}],
    )  # fmt: skip
    plan, _ = planned(file, tmp_path / "results")
    sampling = [cell.identity["sampling"] for cell in plan.prepared.values()]
    assert [s.get("precision") for s in sampling] == ["bfloat16", None]


def test_a_wrong_precision_is_one_line(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match="precision: Input should be 'float32' or 'bfloat16'"):
        cell(registry, tmp_path, precision="float16")


@pytest.mark.parametrize("options", ["--precision bfloat16", "--compile"])
def test_a_formula_has_no_other_arithmetic(command: Command, options: str) -> None:
    line = f"run --method random --dataset fashion_mini --target oracle:1 {options}"
    result = command(*line.split(), check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "oracle:1 is a formula" in result.stderr


def test_no_compiler_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing compiled before"))
    line = "run --method random --dataset fashion_mini --images 8 --compile"
    result = command(*line.split(), check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "--compile: torch cannot compile here" in result.stderr
    assert not (tmp_path / "results").exists()


# --- what networks return


@pytest.mark.parametrize("arithmetic", ALL)
@pytest.mark.parametrize("prediction", [None, "v_prediction", "sample"])
def test_a_network_returns_nearly_the_same(
    arithmetic: Arithmetic, prediction: Prediction | None
) -> None:
    """eps in float32, within what rounding every input of a layer to bfloat16 may do."""
    network: nn.Module = unet(**TINY)
    if prediction is not None:
        network = EpsNetwork(network, prediction, ABAR, 1)
    target = UNetTarget("random", network, SHAPE, ABAR, {})
    x_t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for t in (10, 500):
            exact = target.eps_model(0, range(3))(x_t, t)
            found = computed(target, arithmetic).eps_model(0, range(3))(x_t, t)
            error = ((found - exact).norm() / exact.norm()).item()
            assert found.dtype == torch.float32
            rounded = arithmetic.precision == "bfloat16"
            assert (0 < error < 10 * BFLOAT16) if rounded else error < 1e-5


def test_plain_float32_is_the_target_itself() -> None:
    target = UNetTarget("random", unet(**TINY), SHAPE, ABAR, {})
    assert computed(target, Arithmetic()) is target


@pytest.mark.parametrize("arithmetic", ALL)
@pytest.mark.parametrize("timed", [True, False])
def test_a_gradient_is_nearly_the_same(arithmetic: Arithmetic, timed: bool) -> None:
    torch.manual_seed(0)
    classifier = freeze(ResNet(Network(blocks=(1,), width=8, stem="small"), 1, 5, timed))
    x, c = torch.randn(4, 1, 16, 16), torch.arange(4)
    t = torch.full((4,), 300) if timed else None
    exact = by_autograd(classifier, x, t, c)
    with torch.inference_mode():
        found = gradient_in(arithmetic)(classifier, x, t, c)
    assert found.dtype == torch.float32 and exact.norm() > 0
    error = ((found - exact).norm() / exact.norm()).item()
    assert (0 < error < 40 * BFLOAT16) if arithmetic.precision == "bfloat16" else error < 1e-5


def test_the_gradient_of_each_image_is_its_own() -> None:
    """What `torch.func.grad` and autograd are given is a sum over images."""
    classifier = freeze(ResNet(Network(blocks=(1,), width=8, stem="small"), 1, 5, timed=False))
    x, c = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 3])

    def log_p(one: Tensor, label: Tensor) -> Tensor:
        return classifier(one[None]).log_softmax(1)[0, label]

    alone = torch.stack([torch.func.grad(log_p)(*pair) for pair in zip(x, c, strict=True)])
    torch.testing.assert_close(by_autograd(classifier, x, None, c), alone, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_threads_compile_once() -> None:
    """Whichever comes first compiles, the others wait: one graph, and one answer for all."""
    from torch._dynamo.utils import counters

    network = unet(**TINY).requires_grad_(False)
    compiled = Compiled(lambda network, x: network.conv_in(x).sin())
    graphs = counters["stats"]["unique_graphs"]
    x = torch.randn(2, 1, 16, 16)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiled(network, x), range(8)))
    expected = network.conv_in(x).sin()
    assert counters["stats"]["unique_graphs"] == graphs + 1
    for one in found:
        torch.testing.assert_close(one, expected)
        assert torch.equal(one, found[0])


# --- what a run makes of it


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        pytest.param({"precision": "bfloat16", "compile": True}, marks=needs_compiler),
    ],
)
def test_a_run_says_so_and_can_be_drawn_again(
    registry: Registry, tmp_path: Path, options: dict[str, Any]
) -> None:
    """6 images in batches of 4 and 2; a tiny network of the user's, since compiling takes long."""
    save_pipeline(tmp_path / "pipeline", **TINY)
    place = str(tmp_path / "pipeline")
    made = cell(registry, tmp_path / "results", target=place, **options)
    record = run(made)
    for name, value in options.items():
        assert record["identity"]["sampling"][name] == value
    assert "other sampler settings" in record["limited_by"]
    assert record["cost"]["unet_calls"] == 6 * 3
    assert verify(made.folder)["id"] == made.id
    assert rerun(made, made.folder, 6)["equal"]
    moved = record | {"identity": record["identity"] | {"target": {"name": place}}}
    assert cell_of(moved, registry, tmp_path / "elsewhere").id == made.id

    plain = cell(registry, tmp_path / "results", target=place)
    run(plain)
    images = [np.load(c.folder / "images-0.npy").astype(int) for c in (made, plain)]
    gap = np.abs(images[0] - images[1])
    assert gap.max() > 0 and np.median(gap) <= 8
