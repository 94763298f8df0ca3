"""OpenAI's layout: our network against diffusers' blocks and against plain functions of tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from membench.diffusion.improved_diffusion import ImprovedUNet, improved_abar
from membench.diffusion.pretrained import PretrainedTarget, as_target, read_pretrained
from membench.diffusion.unet import count_parameters
from membench.errors import MembenchError
from membench.hashing import file_hash
from membench.specs import Images
from membench.specs_pretrained import ImprovedDiffusion, Pretrained

SMALL: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 1,
    "num_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "num_heads": 2,
    "learn_sigma": True,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
}
CIFAR10 = ImprovedDiffusion(
    image_size=32,
    num_channels=128,
    num_res_blocks=3,
    learn_sigma=True,
    dropout=0.3,
    diffusion_steps=4000,
    noise_schedule="cosine",
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_scale_shift_norm": False, "learn_sigma": False},
    {"num_res_blocks": 2, "attention_resolutions": (16, 8), "num_heads": 4},
    {"num_heads_upsample": 1},
    {"num_head_channels": 16, "use_new_attention_order": True},
    {"resblock_updown": True, "channel_mult": (1, 1, 2), "attention_resolutions": (8, 4)},
    {"num_classes": 5},
]


def settings(**changes: Any) -> ImprovedDiffusion:
    return ImprovedDiffusion.model_validate(SMALL | changes)


def random_network(chosen: ImprovedDiffusion) -> ImprovedUNet:
    """All tensors random: a fresh network of OpenAI's has layers of zeros, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    network = ImprovedUNet(chosen).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


# --- an independent forward pass: float64 functions of tensors by their published names


def forward(
    tensors: dict[str, Tensor],
    x: Tensor,
    t: float,
    heads: int,
    heads_up: int,
    labels: Tensor | None = None,
    new_order: bool = False,
    head_channels: int | None = None,
    halving: frozenset[str] = frozenset(),
) -> Tensor:
    """What a checkpoint computes, told by its names: blocks are known by what they hold.

    halving: input blocks whose residual block also halves the image, which no name tells.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        kernel = w[f"{name}.weight"]
        return F.conv2d(h, kernel, w[f"{name}.bias"], stride, padding=kernel.shape[-1] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        grouped = h.reshape(len(h), 32, -1)
        mean = grouped.mean(2, keepdim=True)
        variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
        h = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(h.shape)
        shape = (1, -1) + (1,) * (h.ndim - 2)
        return h * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    def halve(h: Tensor) -> Tensor:
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def double(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def residual(name: str, h: Tensor, change: Any) -> Tensor:
        inner = conv(f"{name}.in_layers.2", change(silu(norm(f"{name}.in_layers.0", h))))
        told = linear(f"{name}.emb_layers.1", silu(emb))[:, :, None, None]
        if told.shape[1] == 2 * inner.shape[1]:
            scale, shift = told[:, : inner.shape[1]], told[:, inner.shape[1] :]
            inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = norm(f"{name}.out_layers.0", inner + told)
        inner = conv(f"{name}.out_layers.3", silu(inner))
        h = change(h)
        if f"{name}.skip_connection.weight" in w:
            h = conv(f"{name}.skip_connection", h)
        return h + inner

    def attend(name: str, h: Tensor, count: int) -> Tensor:
        batch, channels = h.shape[:2]
        pixels = h.reshape(batch, channels, -1)
        qkv = torch.einsum(
            "oi,bip->bop", w[f"{name}.qkv.weight"][:, :, 0], norm(f"{name}.norm", pixels)
        )
        qkv = qkv + w[f"{name}.qkv.bias"][:, None]
        count = channels // head_channels if head_channels else count
        size = channels // count
        outputs = []
        for head in range(count):
            if new_order:
                starts = [part * channels + head * size for part in range(3)]
            else:
                starts = [(3 * head + part) * size for part in range(3)]
            q, k, v = (qkv[:, start : start + size] for start in starts)
            weight = (torch.einsum("bcp,bcs->bps", q, k) / math.sqrt(size)).softmax(-1)
            outputs.append(torch.einsum("bps,bcs->bcp", weight, v))
        out = torch.cat(outputs, 1)
        out = torch.einsum("oi,bip->bop", w[f"{name}.proj_out.weight"][:, :, 0], out)
        return h + (out + w[f"{name}.proj_out.bias"][:, None]).reshape(h.shape)

    def block(name: str, h: Tensor, count: int, up: bool) -> Tensor:
        place = 0
        while any(key.startswith(f"{name}.{place}.") for key in w):
            part = f"{name}.{place}"
            if f"{part}.in_layers.0.weight" in w:
                doubles = up and place > 0  # the second residual block of an output block
                change = halve if name in halving else double if doubles else lambda z: z
                h = residual(part, h, change)
            elif f"{part}.qkv.weight" in w:
                h = attend(part, h, count)
            elif f"{part}.op.weight" in w:
                h = conv(f"{part}.op", h, stride=2)
            elif f"{part}.conv.weight" in w:
                h = conv(f"{part}.conv", double(h))
            else:
                h = conv(part, h)
            place += 1
        return h

    width = w["time_embed.0.weight"].shape[1]
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.full((len(x), 1), t, dtype=torch.float64) * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    emb = linear("time_embed.2", silu(linear("time_embed.0", emb)))
    if labels is not None:
        emb = emb + w["label_emb.weight"][labels]
    h, left = x.double(), []
    for i in range(100):
        if not any(key.startswith(f"input_blocks.{i}.") for key in w):
            break
        h = block(f"input_blocks.{i}", h, heads, up=False)
        left.append(h)
    h = residual("middle_block.0", h, lambda z: z)
    h = attend("middle_block.1", h, heads)
    h = residual("middle_block.2", h, lambda z: z)
    for i in range(len(left)):
        h = block(f"output_blocks.{i}", torch.cat([h, left.pop()], 1), heads_up, up=True)
    return conv("out.2", silu(norm("out.0", h)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_the_network_is_what_its_tensors_say(variant: dict[str, Any]) -> None:
    chosen = settings(**variant)
    network = random_network(chosen)
    levels, blocks = len(chosen.channel_mult), chosen.num_res_blocks
    places = [(blocks + 1) * level for level in range(1, levels)]
    halving = frozenset(f"input_blocks.{i}" for i in places if chosen.resblock_updown)
    labels = None if chosen.num_classes is None else torch.tensor([4, 0])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = forward(
        network.state_dict(), x, 123.25, chosen.num_heads,
        chosen.num_heads_upsample or chosen.num_heads, labels,
        chosen.use_new_attention_order, chosen.num_head_channels, halving,
    )  # fmt: skip
    with torch.no_grad():
        (found,) = network(x, torch.full((2,), 123.25), class_labels=labels)
    assert found.shape == (2, 1 + chosen.learn_sigma, 16, 16)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.05


# --- diffusers' UNet2DModel, where it can express the same network


def diffusers_twin(chosen: ImprovedDiffusion, tensors: dict[str, Tensor]) -> UNet2DModel:
    """The same function by diffusers' blocks; attention of one head size in all levels."""
    widths = [int(m * chosen.num_channels) for m in chosen.channel_mult]
    sizes = [chosen.image_size // 2**level for level in range(len(widths))]
    attending = [size in chosen.attention_resolutions for size in sizes]
    head = widths[-1] // chosen.num_heads
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if chosen.resblock_updown else ("DownBlock2D", "UpBlock2D")
    twin = UNet2DModel(
        sample_size=chosen.image_size,
        in_channels=chosen.in_channels,
        out_channels=chosen.in_channels * (1 + chosen.learn_sigma),
        block_out_channels=tuple(widths),
        layers_per_block=chosen.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attending),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in attending[::-1]),
        attention_head_dim=head,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet" if chosen.resblock_updown else "conv",
        upsample_type="resnet" if chosen.resblock_updown else "conv",
        num_class_embeds=chosen.num_classes,
    ).eval()
    renamed: dict[str, Tensor] = {}

    def move(source: str, to: str) -> None:
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in tensors:
                renamed[f"{to}.{kind}"] = tensors[f"{source}.{kind}"]

    def resnet(source: str, to: str) -> None:
        for a, b in (("in_layers.0", "norm1"), ("in_layers.2", "conv1"),
                     ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
                     ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")):  # fmt: skip
            move(f"{source}.{a}", f"{to}.{b}")

    def attention(source: str, to: str) -> None:
        move(f"{source}.norm", f"{to}.group_norm")
        for kind in ("weight", "bias"):
            tensor = tensors[f"{source}.qkv.{kind}"]
            heads = len(tensor) // (3 * head)
            split = tensor.reshape(heads, 3, head, -1)
            for i, name in enumerate(("to_q", "to_k", "to_v")):
                part = split[:, i].reshape(heads * head, -1)
                renamed[f"{to}.{name}.{kind}"] = part if kind == "weight" else part[:, 0]
            out = tensors[f"{source}.proj_out.{kind}"]
            renamed[f"{to}.to_out.0.{kind}"] = out[:, :, 0] if kind == "weight" else out

    for a, b in (("time_embed.0", "time_embedding.linear_1"), ("out.0", "conv_norm_out"),
                 ("time_embed.2", "time_embedding.linear_2"), ("out.2", "conv_out"),
                 ("input_blocks.0.0", "conv_in"), ("label_emb", "class_embedding")):  # fmt: skip
        move(a, b)
    i = 1
    for level, attends in enumerate(attending):
        for layer in range(chosen.num_res_blocks):
            resnet(f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}")
            if attends:
                attention(f"input_blocks.{i}.1", f"down_blocks.{level}.attentions.{layer}")
            i += 1
        if level < len(widths) - 1:
            to = f"down_blocks.{level}.downsamplers.0"
            if chosen.resblock_updown:
                resnet(f"input_blocks.{i}.0", to)
            else:
                move(f"input_blocks.{i}.0.op", f"{to}.conv")
            i += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    i = 0
    for level, attends in enumerate(attending[::-1]):
        for layer in range(chosen.num_res_blocks + 1):
            resnet(f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                attention(f"output_blocks.{i}.1", f"up_blocks.{level}.attentions.{layer}")
            i += 1
        if level < len(widths) - 1:
            source = f"output_blocks.{i - 1}.{2 if attends else 1}"
            to = f"up_blocks.{level}.upsamplers.0"
            if chosen.resblock_updown:
                resnet(source, to)
            else:
                move(f"{source}.conv", f"{to}.conv")
    twin.load_state_dict(renamed, strict=True)
    return twin


@pytest.mark.parametrize(
    "variant",
    [
        {"channel_mult": (1, 2, 2), "attention_resolutions": (8, 4), "num_res_blocks": 2},
        {"resblock_updown": True},
        {"num_classes": 5, "learn_sigma": False},
    ],
    ids=lambda v: "-".join(v),
)
def test_the_network_is_diffusers_unet_where_that_can_be_it(variant: dict[str, Any]) -> None:
    chosen = settings(**variant)
    network = random_network(chosen)
    twin = diffusers_twin(chosen, network.state_dict())
    labels = None if chosen.num_classes is None else torch.tensor([4, 0])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([17.0, 903.5])
    with torch.no_grad():
        (found,) = network(x, t, class_labels=labels)
        expected = twin(x, t, class_labels=labels).sample
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_published_cifar10_flags_give_the_published_size() -> None:
    """`cifar10_uncond_50M_500K`: some 50 million parameters, as diffusers' blocks have."""
    with torch.device("meta"):
        network = ImprovedUNet(CIFAR10)
    twin = diffusers_twin(CIFAR10, {k: torch.empty_like(v, device="cpu") for k, v in
                                    network.state_dict().items()})  # fmt: skip
    assert count_parameters(network) == count_parameters(twin)
    assert 50e6 < count_parameters(network) < 55e6
    assert network.state_dict()["out.2.weight"].shape == (6, 128, 3, 3)


# --- schedules and timesteps


def test_schedules() -> None:
    linear = improved_abar(settings(noise_schedule="linear", diffusion_steps=1000))
    np.testing.assert_allclose(linear, DDPMScheduler().alphas_cumprod, rtol=2e-4)
    cosine = improved_abar(settings(noise_schedule="cosine", diffusion_steps=4000))
    theirs = DDPMScheduler(4000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    np.testing.assert_allclose(cosine, theirs, rtol=2e-3)
    wanted = [math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 2001)]
    assert cosine[0] == pytest.approx(wanted[1] / wanted[0], rel=1e-12)
    assert cosine[2000] == pytest.approx(wanted[2] / wanted[0], rel=1e-9)
    stretched = improved_abar(settings(noise_schedule="linear", diffusion_steps=4000))
    betas = np.linspace(0.0001 / 4, 0.02 / 4, 4000)
    np.testing.assert_allclose(stretched, np.cumprod(1 - betas), rtol=1e-12)


# --- as a target

IMAGES = Images(height=16, width=16, channels=1, classes=tuple("abcde"))


def load(path: Path, chosen: ImprovedDiffusion, **options: Any) -> PretrainedTarget:
    spec = Pretrained(
        title="tiny", pretrained=str(path), layout="improved_diffusion", network=chosen, **options
    )
    model = read_pretrained(spec, [Path()])
    return as_target(model, spec.condition, IMAGES, np.arange(10) % 5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ema.pt"
    torch.save(random_network(settings()).state_dict(), path)
    return path


@pytest.mark.parametrize("rescale", [True, False])
def test_a_checkpoint_is_a_target(checkpoint: Path, rescale: bool) -> None:
    chosen = settings(rescale_timesteps=rescale)
    sha256 = file_hash(checkpoint)
    target = load(checkpoint, chosen, allow_pickle=True, weights_sha256=sha256)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        scale = 0.25 if rescale else 1.0
        (both,) = random_network(chosen)(x, torch.full((2,), 3200 * scale))
    torch.testing.assert_close(target.eps_model(0, range(2))(x, 3200), both[:, :1])
    assert len(target.abar) == 4000
    assert target.identity["config"]["rescale_timesteps"] is rescale
    ((_, field),) = target.mixture(None)
    torch.testing.assert_close(field(x.double(), torch.full((2,), 3200.0)), both[:, :1])


def test_x_0_instead_of_eps(checkpoint: Path) -> None:
    options = {"allow_pickle": True, "weights_sha256": file_hash(checkpoint)}
    x = torch.randn(2, 1, 16, 16)
    x_0 = load(checkpoint, settings(), **options).eps_model(0, range(2))(x, 1000)
    target = load(checkpoint, settings(predict_xstart=True), **options)
    a = target.abar[1000]
    expected = (x - a**0.5 * x_0) / (1 - a) ** 0.5
    torch.testing.assert_close(target.eps_model(0, range(2))(x, 1000), expected)


def test_labels_are_told(tmp_path: Path) -> None:
    chosen = settings(num_classes=5, learn_sigma=False)
    network = random_network(chosen)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    target = load(tmp_path / "model.safetensors", chosen)
    assert target.identity["condition"] == "labels"
    x, told = torch.randn(2, 1, 16, 16), np.array([3, 1])
    with torch.no_grad():
        (expected,) = network(x, torch.full((2,), 25.0), class_labels=torch.from_numpy(told))
    torch.testing.assert_close(target.given(told)(x, 100), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_res_blocks": 2}, r"tensor input_blocks.\S+ is missing"),
        ({"learn_sigma": False}, r"tensor out.2.\w+ has shape \(2.*\), expected \(1"),
        ({"attention_resolutions": ()}, "tensor output_blocks.1.1.conv.bias is missing"),
        ({"resblock_updown": True}, r"tensor input_blocks.2.0.emb_layers.1.bias is missing"),
        ({"num_classes": 3}, "tensor label_emb.weight is missing"),
    ],
)
def test_other_settings_name_the_tensor(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"allow_pickle": True, "weights_sha256": file_hash(checkpoint)}
    with pytest.raises(MembenchError, match=message) as error:
        load(checkpoint, settings(**changes), **options)
    assert str(error.value).startswith(str(checkpoint))


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    network = random_network(settings(num_classes=5))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(MembenchError, match=r"tensor label_emb\.weight is unexpected"):
        load(tmp_path / "model.safetensors", settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 48, "channel_mult": ()}, "no default for image_size = 48"),
        ({"image_size": 15}, "not divisible by 2"),
        ({"num_channels": 40}, "no multiple of 32"),
        ({"use_kl": True}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)
