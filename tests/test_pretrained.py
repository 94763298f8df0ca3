"""Pretrained targets: pipelines give what diffusers samples from them, or one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from pipelines import save_pipeline, unet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from membench.diffusion.eps import EpsNetwork, ve_abar
from membench.diffusion.pretrained import PretrainedTarget, as_target, read_pretrained
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times
from membench.diffusion.targets import ClosedFormTarget, draw_conditions
from membench.errors import MembenchError
from membench.hashing import derive_seed, file_hash
from membench.specs import Images
from membench.specs_pretrained import Pretrained

IMAGES = Images(height=16, width=16, channels=1, classes=("a", "b", "c"))
LABELS = np.array([0, 1, 2, 2, 2, 1, 0])
SHAPE = (1, 16, 16)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET_CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def load(
    folder: Path, condition: str = "auto", channels: int = 1, **options: Any
) -> PretrainedTarget:
    spec = Pretrained(title="tiny", pretrained=str(folder), condition=condition, **options)
    images = IMAGES.model_copy(update={"channels": channels})
    return as_target(read_pretrained(spec, [Path()]), spec.condition, images, LABELS)


def sample(target: PretrainedTarget, count: int = 3, steps: int = 5, eta: float = 0.0) -> Tensor:
    noise = ImageNoise(0, range(count), SHAPE)
    times = ddim_times(steps, len(target.abar))
    model = target.eps_model(0, range(count))
    return ddim(model, noise(), times, target.abar, eta=eta, noise=noise)


def generators(count: int) -> list[torch.Generator]:
    """The noise of `ImageNoise`, as diffusers takes it."""
    return [torch.Generator().manual_seed(derive_seed(0, "image", i)) for i in range(count)]


@pytest.fixture(scope="module")
def network() -> UNet2DModel:
    return unet()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, network: UNet2DModel) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_pipeline(folder, network=network)
    return folder


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A pipeline folder that a test may change."""
    return shutil.copytree(saved, tmp_path / "tiny")


# --- sampling as diffusers does

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"beta_start": 1e-3, "beta_end": 1e-2},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-3, 0.05, 200).tolist(), "num_train_timesteps": 200},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(next(iter(s), "default")))
def test_samples_are_those_of_diffusers_scheduler(
    folder: Path, network: UNet2DModel, scheduler: Any, prediction: str, schedule: dict[str, Any]
) -> None:
    saved = scheduler(prediction_type=prediction, **schedule)
    saved.save_pretrained(folder / "scheduler")
    target = load(folder)
    theirs = DDIMScheduler.from_config(saved.config)
    theirs.set_timesteps(5)
    x = ImageNoise(0, range(3), SHAPE)()
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x).prev_sample
    found = sample(target)
    torch.testing.assert_close(found, x, atol=3e-4, rtol=0)
    assert found.std() > 0.1
    if scheduler is DDIMScheduler and not schedule:
        assert target.identity["prediction_type"] == prediction


def test_sigmoid_betas_of_ddpm(folder: Path) -> None:
    scheduler = DDPMScheduler(beta_schedule="sigmoid")
    scheduler.save_pretrained(folder / "scheduler")
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.02 - 1e-4) + 1e-4
    np.testing.assert_allclose(load(folder).abar, np.cumprod(1 - beta), rtol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_images_are_those_of_diffusers_pipeline(folder: Path, eta: float) -> None:
    """The whole pipeline, from its own folder, from the same seeds."""
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, generators(3), eta, 5, output_type="pt").images * 2 - 1
    found = sample(load(folder), eta=eta)
    torch.testing.assert_close(found.clamp(-1, 1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler])
def test_other_samplers_of_the_family_give_the_same_target(folder: Path, scheduler: Any) -> None:
    before = load(folder)
    scheduler().save_pretrained(folder / "scheduler")
    after = load(folder)
    assert after.abar == before.abar
    assert torch.equal(sample(after), sample(before))


def test_the_zero_snr_schedule_starts_above_zero(folder: Path, network: UNet2DModel) -> None:
    """At abar = 0 an eps says nothing of x_0; a hair above, x_0 is the v that was predicted."""
    saved = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    saved.save_pretrained(folder / "scheduler")
    target = load(folder)
    assert target.abar[-1] == 2.0**-24
    x = ImageNoise(0, range(3), SHAPE)()
    eps = target.eps_model(0, range(3))(x, 999)
    with torch.no_grad():
        v = network(x, 999).sample  # x_0 = sqrt(abar) x - sqrt(1 - abar) v: -v at abar = 0
    found = (x - (1 - target.abar[-1]) ** 0.5 * eps) / target.abar[-1] ** 0.5
    torch.testing.assert_close(found, -v, atol=3e-3, rtol=0)


class Known(nn.Module):
    """A network that returns what a function of (x, t) says."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Any, **known: Any) -> tuple[Tensor]:
        return (self.function(x, t),)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 20, 500, 999, torch.tensor([3.0, 499.5, 998.25])])
def test_predictions_of_a_known_model(prediction: str, t: Any) -> None:
    """x_0 and v of the closed form, made eps again, also between the timesteps."""
    abar = DDPMScheduler().alphas_cumprod.double().tolist()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    known = ClosedFormTarget(pixels, abar, kernel=0.3)
    ((_, field),) = known.mixture(None)
    x_t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = t if isinstance(t, Tensor) else torch.full((3,), float(t))
    log = np.interp(times.numpy(), np.arange(1000), np.log(abar))
    a = torch.tensor(np.exp(log)).view(-1, 1, 1, 1)
    eps = field(x_t.double(), times.double())
    x_0 = (x_t.double() - (1 - a).sqrt() * eps) / a.sqrt()
    said = {"sample": x_0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x_0}[prediction]
    network = EpsNetwork(Known(lambda x, time: said.float()), prediction, abar, 1)
    torch.testing.assert_close(network(x_t, t)[0], eps.float(), atol=1e-4, rtol=1e-4)


# --- variance-exploding models


def test_a_variance_exploding_model_is_the_same_density() -> None:
    """Score of kernels on images in [0, 1], by its formula, against the closed form in [-1, 1]."""
    levels, low, high, width = 50, 0.01, 90.0, 0.2
    abar = ve_abar(low, high, levels)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    centres = torch.from_numpy(pixels / 255.0).permute(0, 3, 1, 2)
    asked = []

    def score(z: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        variance = (width / 2) ** 2 + sigma.double() ** 2  # kernels of `width` in [-1, 1]
        away = centres[None] - z.double()[:, None]
        logits = -away.flatten(2).square().sum(2) / (2 * variance[:, None])
        mean = torch.einsum("bi,bichw->bchw", logits.softmax(1), away)
        return (mean / variance.view(-1, 1, 1, 1)).float()

    ours = EpsNetwork(Known(score), "score_ve", abar, 1)
    known = ClosedFormTarget(pixels, abar, kernel=width)
    x_t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for t in (0, 1, 20, 49):
        eps = known.predict_eps(x_t.double(), t).float()
        torch.testing.assert_close(ours(x_t, t)[0], eps, atol=3e-5, rtol=1e-4)
        sigma = low * (high / low) ** (t / 49)
        torch.testing.assert_close(asked[-1], torch.full((4,), sigma), rtol=1e-5, atol=0)
    between = torch.tensor([0.5, 3.25, 20.0, 48.9])
    ((_, field),) = known.mixture(None)
    expected = field(x_t.double(), between.double()).float()
    torch.testing.assert_close(ours(x_t, between)[0], expected, atol=3e-5, rtol=1e-4)


def test_a_variance_exploding_pipeline(tmp_path: Path) -> None:
    """The probability flow in the pipeline's own coordinates, against ours on the target."""
    network = unet(
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 32),
        norm_num_groups=None,
        in_channels=3,  # diffusers' skip connections know no other
        out_channels=3,
    )
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=40, sigma_min=0.02, sigma_max=50.0)
    ScoreSdeVePipeline(network, scheduler).save_pretrained(tmp_path / "ve")
    target = load(tmp_path / "ve", channels=3)
    sigmas = scheduler.discrete_sigmas.double()
    np.testing.assert_allclose(target.abar, 1 / (1 + 4 * sigmas.numpy() ** 2), rtol=1e-5)
    assert target.identity["prediction_type"] == "score_ve"
    times = ddim_times(8, 40)
    x = ImageNoise(0, range(3), (3, 16, 16))()
    z = ((x / target.abar[times[0]] ** 0.5 + 1) / 2).double()
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], None], strict=True):
            after_sigma = 0.0 if after is None else float(sigmas[after])
            level = sigmas[t].float().expand(3)
            score = network(z.float(), level).sample.double()
            z = z + (after_sigma - float(sigmas[t])) * -float(sigmas[t]) * score
    found = ddim(target.eps_model(0, range(3)), x, times, target.abar, clip=False)
    torch.testing.assert_close(found.double(), 2 * z - 1, atol=2e-3, rtol=1e-4)


# --- learned variance and labels


def test_a_learned_variance_is_dropped(tmp_path: Path, network: UNet2DModel) -> None:
    both = unet(seed=5, out_channels=2)
    state = network.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], both.state_dict()[name][1:]])
    both.load_state_dict(state)
    save_pipeline(tmp_path, DDPMScheduler(variance_type="learned_range"), both)
    target = load(tmp_path)
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = network(x, 400).sample
    torch.testing.assert_close(target.eps_model(0, range(3))(x, 400), expected)
    assert target.identity["learned_variance"]


def test_three_channels_out_of_one_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path, out_channels=3)
    with pytest.raises(MembenchError, match="3 channels out of 1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "condition", "expected"),
    [
        ({"num_class_embeds": 3}, "auto", "labels"),
        ({"num_class_embeds": 3}, "uniform", "uniform"),
        ({"num_class_embeds": 5}, "auto", "uniform"),
        ({"num_class_embeds": 5}, "labels", "labels"),
        ({"class_embed_type": "timestep"}, "auto", "labels"),
    ],
)
def test_a_class_conditional_model_is_told_its_labels(
    tmp_path: Path, options: dict[str, Any], condition: str, expected: str
) -> None:
    network = save_pipeline(tmp_path, **options)
    target = load(tmp_path, condition)
    assert target.identity["condition"] == expected
    drawn = draw_conditions(target.labels, 7, range(6))
    if expected == "labels":
        assert target.labels.tolist() == LABELS.tolist()
        seeds = [derive_seed(7, "condition", i) % len(LABELS) for i in range(6)]
        assert drawn.tolist() == LABELS[seeds].tolist()
    else:
        count = options["num_class_embeds"]
        many = draw_conditions(target.labels, 7, range(2000))
        assert np.bincount(many, minlength=count).min() > 2000 / count * 0.8
    x = torch.randn(6, *SHAPE)
    with torch.no_grad():
        direct = network(x, 300, class_labels=torch.from_numpy(drawn)).sample
        other = network(x, 300, class_labels=torch.from_numpy(1 - np.minimum(drawn, 1))).sample
    found = target.eps_model(7, range(6))(x, 300)
    torch.testing.assert_close(found, direct)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        ({"num_class_embeds": 2}, "labels", r"knows labels 0 to 1, the members have 0 to 2"),
        ({}, "labels", "takes no labels"),
        ({"class_embed_type": "identity"}, "auto", "'identity' wants an embedding"),
    ],
)
def test_labels_that_cannot_be_told(
    tmp_path: Path, options: dict[str, Any], condition: str, message: str
) -> None:
    save_pipeline(tmp_path, **options)
    with pytest.raises(MembenchError, match=message):
        load(tmp_path, condition)


# --- the density of a pretrained target


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_field_is_the_eps_model_and_has_a_gradient(folder: Path, prediction: str) -> None:
    DDPMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    target = load(folder)
    ((weight, field),) = target.mixture(None)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    eps = field(x, torch.tensor([700.0, 700.0]))
    assert weight == 1.0
    torch.testing.assert_close(eps.detach(), target.given(None)(x.detach().float(), 700))
    v = torch.randn(2, *SHAPE)
    (gradient,) = torch.autograd.grad(eps, x, v)
    step = 1e-2 * torch.randn(2, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        times = torch.tensor([700.0, 700.0])
        change = (field(x + step, times) - field(x - step, times)).double() / 2
    expected = (change * v).sum()
    assert (gradient * step).sum() == pytest.approx(expected.item(), rel=2e-2, abs=1e-3)


# --- what pins a target


def test_the_identity_holds_what_matters_and_no_path(folder: Path, tmp_path: Path) -> None:
    before = load(folder)
    moved = load(shutil.copytree(folder, tmp_path / "elsewhere" / "tiny"))
    assert moved.identity == before.identity
    assert str(tmp_path) not in json.dumps(before.identity)
    assert before.identity["weights_sha256"] == file_hash(folder / WEIGHTS)
    assert before.name == f"tiny@{file_hash(folder / WEIGHTS)[:8]}"
    seen = [before.identity]
    for change in (
        lambda: DDPMScheduler(prediction_type="sample").save_pretrained(folder / "scheduler"),
        lambda: DDPMScheduler(beta_end=0.03).save_pretrained(folder / "scheduler"),
        lambda: _edit(folder / UNET_CONFIG, lambda c: c.update(flip_sin_to_cos=False)),
        lambda: _resave(folder / WEIGHTS, lambda t: t["conv_out.bias"].add_(1)),
    ):
        change()
        seen.append(load(folder).identity)
        assert seen[-1] not in seen[:-1]


def test_attention_under_its_old_names(folder: Path) -> None:
    """As in the published ddpm-cifar10-32, written by diffusers before 0.13."""
    before = sample(load(folder))
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }

    def old(name: str) -> str:
        for new, former in names.items():
            name = name.replace(new, former)
        return name

    tensors = {old(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(sample(load(folder)), before)


def test_float16_weights_are_computed_in_float32(folder: Path) -> None:
    halved = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halved, folder / WEIGHTS)
    target = load(folder)
    assert {p.dtype for p in target.network.parameters()} == {torch.float32}
    network = unet(seed=1)
    network.load_state_dict({name: tensor.float() for name, tensor in halved.items()})
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        expected = network(x, 10).sample
    torch.testing.assert_close(target.eps_model(0, range(2))(x, 10), expected)
    spec = Pretrained(title="", pretrained=str(folder))
    assert read_pretrained(spec, [Path()]).dtype == "float16"


def test_the_unet_alone_needs_a_schedule(folder: Path) -> None:
    expected = sample(load(folder))
    with pytest.raises(MembenchError, match="no scheduler, so nobody knows the noise schedule"):
        load(folder / "unet")
    given = {"beta_schedule": "linear", "prediction_type": "epsilon"}
    target = load(folder / "unet", scheduler=given)
    assert torch.equal(sample(target), expected)
    assert load(folder, scheduler=given | {"prediction_type": "sample"}).abar == target.abar


# --- one line for everything that is wrong


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _resave(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _pickled(folder: Path) -> Path:
    path = folder / "unet/diffusion_pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS), path)
    (folder / WEIGHTS).unlink()
    return path


def _with(file: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / file)


def _config(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / file, lambda content: content.update(changes))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: _resave(folder / WEIGHTS, change)


INDEX = "model_index.json"
WRONG: list[tuple[Callable[[Path], object], str, str]] = [
    (_with(WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:-100])), WEIGHTS, "truncated"),
    (_with(WEIGHTS, lambda p: p.write_bytes(b"")), WEIGHTS, "truncated or not a safetensors"),
    (_with(WEIGHTS, Path.unlink), WEIGHTS, "no such weights file"),
    (
        _with(WEIGHTS, lambda p: p.rename(p.with_name("diffusion_pytorch_model.fp16.safetensors"))),
        WEIGHTS,
        'no such weights file; name one .*"diffusion_pytorch_model.fp16.safetensors"',
    ),
    (_pickled, "unet/diffusion_pytorch_model.bin", "a pickle could run code"),
    (_tensors(lambda t: t.pop("mid_block.attentions.0.to_q.bias")), WEIGHTS,
     "mid_block.attentions.0.to_q.bias is missing"),
    (_tensors(lambda t: t.update(extra=torch.ones(1))), WEIGHTS, "tensor extra is unexpected"),
    (_tensors(lambda t: t.update({"conv_in.bias": torch.ones(3)})), WEIGHTS,
     r"conv_in.bias has shape \(3,\), expected \(16,\)"),
    (_config(UNET_CONFIG, _class_name="UNet2DConditionModel"), UNET_CONFIG,
     "a UNet2DConditionModel, expected a UNet2DModel"),
    (_config(UNET_CONFIG, down_block_types=["NoBlock2D", "DownBlock2D"]), UNET_CONFIG,
     "cannot be built"),
    (_with(UNET_CONFIG, lambda p: p.write_text("{")), UNET_CONFIG, "truncated or not JSON"),
    (_with(UNET_CONFIG, lambda p: p.write_text("[]")), UNET_CONFIG, "not a JSON object"),
    (_with(UNET_CONFIG, Path.unlink), "", "not a diffusers folder"),
    (_config(INDEX, vqvae=["diffusers", "VQModel"]), INDEX, r"has a vqvae \(VQModel\)"),
    (_config(INDEX, unet=["diffusers", "UNet1DModel"]), INDEX, "unet is UNet1DModel"),
    (_config(SCHEDULER, prediction_type="flow_prediction"), SCHEDULER, "'flow_prediction'"),
    (_config(SCHEDULER, _class_name="Popen"), SCHEDULER, "scheduler Popen is not supported"),
    (_config(SCHEDULER, beta_schedule="guess"), SCHEDULER, "not a noise schedule"),
    (_config(SCHEDULER, trained_betas=[0.1, 1.5]), SCHEDULER, "betas must lie between 0 and 1"),
    (
        lambda f: FlowMatchEulerDiscreteScheduler().save_pretrained(f / "scheduler"),
        SCHEDULER,
        "FlowMatchEulerDiscreteScheduler is not supported",
    ),
    (_with("scheduler", shutil.rmtree), SCHEDULER, "no scheduler"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "culprit", "message"), WRONG)
def test_what_is_wrong_is_one_line_that_names_it(
    folder: Path, damage: Callable[[Path], object], culprit: str, message: str
) -> None:
    damage(folder)
    with pytest.raises(MembenchError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder / culprit))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 8}, "8 x 8 pixels, the data set's have 16 x 16"),
        ({"in_channels": 3, "out_channels": 3}, r"3 channel\(s\), the data set's have 1"),
    ],
)
def test_a_model_of_another_size_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    save_pipeline(tmp_path, **options)
    with pytest.raises(MembenchError, match=message):
        load(tmp_path)


def test_pickled_weights_for_whoever_insists(folder: Path) -> None:
    expected = sample(load(folder))
    path = _pickled(folder)
    told = {"allow_pickle": True, "weights_sha256": file_hash(path)}
    assert torch.equal(sample(load(folder, **told)), expected)
    with pytest.raises(MembenchError, match=r"SHA-256 is [0-9a-f]{64}, expected 0{64}"):
        load(folder, allow_pickle=True, weights_sha256="0" * 64)
    with pytest.raises(ValueError, match="give weights_sha256 too"):
        Pretrained(title="", pretrained="x", allow_pickle=True)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "b": Evil()}, "holds more than tensors, which is not read"),
        ({"state_dict": {"a": torch.ones(1)}, "step": 3}, "'state_dict' is a dict"),
        ([torch.ones(1)], "holds a list"),
    ],
)
def test_a_pickle_of_anything_else_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(folder)
    path = _pickled(folder)
    torch.save(content, path)
    with pytest.raises(MembenchError, match=message) as error:
        load(folder, allow_pickle=True, weights_sha256=file_hash(path))
    assert str(path) in str(error.value)
    assert not Path("ran").exists()


def test_other_weights_than_the_cards_are_refused(folder: Path) -> None:
    with pytest.raises(MembenchError, match=r"SHA-256 is .*, expected 1{64}"):
        load(folder, weights_sha256="1" * 64)
