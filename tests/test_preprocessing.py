"""Presets against references of their own: numpy, Pillow, torch's antialiased resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from membench.errors import MembenchError
from membench.similarity.preprocessing import PRESETS, Preprocessing, chosen
from membench.specs import DescriptorChoice

IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
HALF = (np.full(3, 0.5), np.full(3, 0.5))
NONE = (np.zeros(3), np.ones(3))


def images(height: int, width: int, channels: int = 3, count: int = 2) -> np.ndarray:
    """Noise on a ramp: every frequency is there."""
    rng = np.random.default_rng(height * width)
    ramp = np.linspace(0, 150, height)[:, None, None] + np.linspace(0, 50, width)[None, :, None]
    noise = rng.uniform(0, 55, (count, height, width, channels))
    return (ramp + noise).astype(np.uint8)


def triangle_matrix(size: int, wanted: int) -> np.ndarray:
    """Weights [wanted, size] of an antialiased bilinear resize, from its definition.

    Output i looks at (i + 0.5) * size / wanted through a triangle whose half width is one input
    pixel, or, when shrinking, one output pixel; weights are normalised.
    """
    scale = size / wanted
    support = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


def by_definition(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [H, W, C] -> [height, width, C] without rounding in between."""
    rows, columns = triangle_matrix(len(image), height), triangle_matrix(image.shape[1], width)
    return np.einsum("ih,jw,hwc->ijc", rows, columns, image.astype(np.float64), optimize=True)


@pytest.mark.parametrize("size", [(150, 150), (16, 20), (218, 178), (640, 360), (288, 320)])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_against_their_definition(name: str, size: tuple[int, int]) -> None:
    height, width = size
    small = min(size)
    shape, crop, (mean, std) = {
        "official_288": ((height * 288 // small, width * 288 // small), None, IMAGENET),
        "official_320": ((320, 320), None, IMAGENET),
        "dcr_224": ((height * 256 // small, width * 256 // small), 224, HALF),
        "amg_224": ((224, 224), None, NONE),
    }[name]
    how = PRESETS[name]
    x = images(*size)
    got = how.apply(x)
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    for image, found, network in zip(x, got, how.normalise(got), strict=True):
        expected = by_definition(image, *shape)
        pil = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
        if crop:
            # torchvision's CenterCrop rounds half to even
            top, left = (int(np.rint((edge - crop) / 2)) for edge in shape)
            window = slice(top, top + crop), slice(left, left + crop)
            expected, pil = expected[window], pil[window]
        np.testing.assert_array_equal(found, pil)
        # uint8 after each axis: half a level twice, the first spread over the second's weights
        assert np.abs(found - expected).max() < 1.01
        assert np.abs(found - expected).mean() < 0.35
        reference = (found.transpose(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
        assert network.dtype == np.float32
        np.testing.assert_allclose(network, reference, atol=1e-6)


@pytest.mark.parametrize("wanted", [40, 320])
def test_resizing_is_torchs_antialiased_bilinear(wanted: int) -> None:
    """The filter of torchvision's tensor path, to within the rounding to uint8."""
    x = images(150, 110)
    got = Preprocessing(square=wanted).apply(x)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    kind = {"mode": "bilinear", "antialias": True, "align_corners": False}
    theirs = torch.nn.functional.interpolate(planes, (wanted, wanted), **kind)
    assert np.abs(got - theirs.permute(0, 2, 3, 1).numpy()).max() < 1.01


def test_resize_first_brings_a_data_set_to_its_size() -> None:
    x = images(150, 150)
    choice = DescriptorChoice(name="any", resize_first=64, preset="official_320")
    small = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
            for image in x
        ]
    )
    got = chosen(choice, None).apply(x)
    np.testing.assert_array_equal(got, PRESETS["official_320"].apply(small))
    assert not np.array_equal(got, PRESETS["official_320"].apply(x))


def test_grey_becomes_rgb() -> None:
    x = images(28, 28, channels=1)
    for how in PRESETS.values():
        got = how.apply(x)
        assert got.shape[3] == 3
        np.testing.assert_array_equal(got, how.apply(np.repeat(x, 3, axis=3)))


def test_the_original_is_not_touched() -> None:
    x = images(32, 32)
    got = Preprocessing().apply(x)
    assert np.array_equal(got, x) and not np.shares_memory(got, x)
    assert np.array_equal(Preprocessing(square=32).apply(x), x)


def test_imagenet_pixels_stand_for_other_normalisations() -> None:
    """A model that normalises inside sees the preset's values, off by half a level at most."""
    x = np.arange(256, dtype=np.uint8)[None, :, None, None].repeat(3, axis=3)
    mean, std = IMAGENET
    for name, how in PRESETS.items():
        seen = (how.as_imagenet(x) / 255 - mean) / std
        wanted = how.normalise(x).transpose(0, 2, 3, 1)
        bound = 1e-6 if name.startswith("official") else 0.5 / 255 / std.min() + 1e-6
        assert np.abs(seen - wanted).max() <= bound
    with pytest.raises(MembenchError, match="out of reach"):
        Preprocessing(mean=(0.0,) * 3, std=(0.1,) * 3).as_imagenet(x)


def test_what_a_choice_may_say() -> None:
    assert chosen(DescriptorChoice(name="a"), "dcr_224") == PRESETS["dcr_224"]
    assert chosen(DescriptorChoice(name="a"), None) == Preprocessing()
    assert chosen(DescriptorChoice(name="a", input_size=64), "dcr_224") == Preprocessing(square=64)
    with pytest.raises(MembenchError, match="preset: 'mine', expected one of official_288"):
        chosen(DescriptorChoice(name="a"), "mine")
    with pytest.raises(ValueError, match="preset and input_size: give one of the two"):
        DescriptorChoice(name="a", preset="amg_224", input_size=64)
    with pytest.raises(ValueError, match="colour"):
        DescriptorChoice.model_validate({"name": "a", "colour": 1})


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3))]
)
def test_what_is_no_image(bad: np.ndarray) -> None:
    with pytest.raises(MembenchError, match="images must be uint8"):
        PRESETS["amg_224"].apply(bad)
