"""Targets: what is known in closed form, and what is refused when weights are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from membench.data.imageset import Dataset, load_dataset
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times, from_uint8, to_uint8
from membench.diffusion.targets import (
    ClosedFormTarget,
    OracleTarget,
    load_unet_target,
    parse_oracle,
)
from membench.diffusion.unet import NoiseSchedule, build_unet, schedule_abar
from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.specs import Images, TargetRecipe, load_card

DATASETS = Path(__file__).parents[1] / "datasets"
IMAGES = Images(height=8, width=8, channels=1, classes=("a", "b"))
RECIPE = TargetRecipe.model_validate(
    {
        "title": "tiny",
        "unet": {
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "add_attention": False,
        },
        "training": {"steps": 1, "learning_rate": 1e-3},
    }
)
ABAR = schedule_abar(RECIPE)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    card = load_card(DATASETS / "fashion_mini.toml")
    return load_dataset(card, DATASETS / "fashion_mini")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(build_unet(RECIPE, IMAGES).state_dict(), path)
    return path


# --- U-Nets


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_schedules_are_those_of_diffusers(schedule: str, steps: int) -> None:
    """To the last bit: images, and so records, follow from them."""
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule).alphas_cumprod
    assert schedule_abar(NoiseSchedule(steps, schedule)) == theirs.double().tolist()


def test_what_needs_no_unet_loads_no_diffusers() -> None:
    """Workers of a sweep start anew for many small tasks: imports are most of their time."""
    heavy = "('diffusers', 'sklearn', 'accelerate', 'torch._dynamo')"
    code = f"import sys, membench.run; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_unet_target_is_the_saved_network(weights: Path) -> None:
    torch.manual_seed(0)
    network = build_unet(RECIPE, IMAGES).eval()
    state = torch.random.get_rng_state()
    recipe = RECIPE.model_copy(update={"weights_sha256": file_hash(weights)})
    target = load_unet_target(recipe, IMAGES, weights, name="tiny")
    assert torch.equal(torch.random.get_rng_state(), state), "loading drew random numbers"
    x_t = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = network(x_t, 500).sample
    eps = target.eps_model(0, range(3))(x_t.requires_grad_(), 500)
    torch.testing.assert_close(eps, expected, atol=1e-5, rtol=1e-4)
    assert not eps.requires_grad
    assert not any(p.requires_grad for p in target.network.parameters())
    assert (target.name, target.shape, target.abar) == ("tiny", (1, 8, 8), ABAR)
    assert json.loads(json.dumps(target.identity))["weights_sha256"] == file_hash(weights)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _resaved(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such weights file"),
        (_truncated, "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_text("git-lfs pointer: not weights"), "truncated"),
        (_resaved(lambda t: t.pop("conv_in.bias")), "conv_in.bias is missing"),
        (_resaved(lambda t: t.update(extra=torch.ones(1))), "extra is unexpected"),
        (_resaved(lambda t: t.update({"conv_in.bias": torch.ones(3)})), r"conv_in.bias .*\(3,\)"),
    ],
)
def test_damaged_weights_name_the_file(
    weights: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(weights)
    with pytest.raises(MembenchError, match=message) as error:
        load_unet_target(RECIPE, IMAGES, weights)
    assert str(weights) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_weights_than_the_recipes_are_refused(weights: Path) -> None:
    recipe = RECIPE.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(MembenchError, match="SHA-256"):
        load_unet_target(recipe, IMAGES, weights)


# --- closed form


@pytest.mark.parametrize("kernel", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_closed_form_equals_brute_force(dataset: Dataset, t: int, kernel: float) -> None:
    references = dataset.members.images[:100]
    target = ClosedFormTarget(references, ABAR, kernel=kernel, block=7)
    x_i = references.astype(np.float64).reshape(100, -1) / 127.5 - 1
    rng = np.random.default_rng(0)
    abar_t = ABAR[t]
    noise = rng.standard_normal((5, 256))
    x_t = np.sqrt(abar_t) * x_i[:5] + np.sqrt(1 - abar_t) * noise
    v_t = abar_t * kernel**2 + 1 - abar_t
    away = x_t[:, None] - np.sqrt(abar_t) * x_i
    logits = -(away**2).sum(-1) / (2 * v_t)
    w = np.exp(logits - logits.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    pulled = x_i + np.sqrt(abar_t) * kernel**2 / v_t * away
    expected = np.einsum("bn,bnd->bd", w, pulled)
    x = torch.from_numpy(x_t).view(5, 1, 16, 16)
    np.testing.assert_allclose(target.denoise(x, t).flatten(1), expected, atol=1e-6)
    eps = (x_t - np.sqrt(abar_t) * expected) / np.sqrt(1 - abar_t)
    np.testing.assert_allclose(target.predict_eps(x, t).flatten(1), eps, atol=1e-5)


@pytest.mark.parametrize("t", [5, 300, 900])
def test_kernel_eps_is_the_score_of_the_exact_density(dataset: Dataset, t: int) -> None:
    """eps = -sqrt(1 - abar_t) grad log p_t, p_t = (1/N) sum_i Normal(sqrt(abar_t) x_i, v_t I)."""
    kernel, abar_t = 0.2, ABAR[t]
    references = dataset.members.images[:50]
    x_i = from_uint8(references).double().flatten(1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 256, dtype=torch.float64, generator=generator)
    v_t = abar_t * kernel**2 + 1 - abar_t
    x_t = (abar_t**0.5 * (x_i[:4] + x_i[4:8]) / 2 + v_t**0.5 * noise).requires_grad_()
    log_p = torch.logsumexp(-(x_t[:, None] - abar_t**0.5 * x_i).square().sum(-1) / (2 * v_t), 1)
    (score,) = torch.autograd.grad(log_p.sum(), x_t)
    target = ClosedFormTarget(references, ABAR, kernel=kernel)
    eps = target.predict_eps(x_t.detach().view(4, 1, 16, 16), t).flatten(1)
    torch.testing.assert_close(eps, -((1 - abar_t) ** 0.5) * score, atol=1e-6, rtol=1e-6)


def test_an_empty_reference_is_refused(dataset: Dataset) -> None:
    with pytest.raises(MembenchError, match="at least one image"):
        ClosedFormTarget(dataset.members.images[:0], ABAR)


# --- oracles


def _sampled(target: OracleTarget, seed: int, count: int) -> np.ndarray:
    noise = ImageNoise(seed, range(count), target.shape)
    eps_model = target.eps_model(seed, range(count))
    return to_uint8(ddim(eps_model, noise(), ddim_times(20, 1000), target.abar))


def _nearest_rmse(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """[B], in grey levels."""
    x, y = (torch.from_numpy(np.array(part)).double().flatten(1) for part in (images, references))
    return (torch.cdist(x, y).amin(1) / 16).numpy()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_oracle_copies_members_at_its_rate(dataset: Dataset, rate: float) -> None:
    target, count = OracleTarget(dataset, rate), 256
    images = _sampled(target, 5, count)
    copied = _nearest_rmse(images, dataset.members.images) < 1
    assert copied.tolist() == [target.copies_member(5, i) for i in range(count)]
    interval = binomtest(int(copied.sum()), count).proportion_ci(0.999)
    assert interval.low <= rate <= interval.high
    strangers = images[~copied]
    if len(strangers):
        assert _nearest_rmse(strangers, dataset.heldout_rest.images).max() < 1
        assert (_nearest_rmse(strangers, dataset.heldout_twin.images) > 1).all()


def test_oracle_choice_depends_on_the_image_alone(dataset: Dataset) -> None:
    target = OracleTarget(dataset, 0.5)
    x_t = ImageNoise(0, range(6), target.shape)()
    whole = target.eps_model(0, range(6))(x_t, 500)
    part = target.eps_model(0, range(2, 5))(x_t[2:5], 500)
    torch.testing.assert_close(whole[2:5], part, atol=1e-6, rtol=0)
    assert OracleTarget(dataset, 0.5).identity == target.identity
    assert OracleTarget(dataset, 0.4).identity != target.identity
    assert OracleTarget(dataset, 0.5, kernel=0.1).identity != target.identity
    json.dumps(target.identity)


def test_oracle_names() -> None:
    assert parse_oracle("oracle:0.3") == 0.3
    assert parse_oracle("oracle:1") == 1.0
    assert parse_oracle("ddpm") is None
    for bad in ("oracle:1.5", "oracle:-0.1", "oracle:nan", "oracle:", "oracle", "oracle:many"):
        with pytest.raises(MembenchError, match="rate from 0 to 1"):
            parse_oracle(bad)
