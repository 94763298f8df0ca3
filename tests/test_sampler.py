"""The sampler against diffusers, and the promises about noise that make runs reproducible."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from membench.diffusion.guidance import classifier_guidance
from membench.diffusion.sampler import EpsModel, ImageNoise, ddim, ddim_times, from_uint8, to_uint8

SHAPE = (1, 8, 8)
SCHEDULER = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
ABAR = SCHEDULER.alphas_cumprod.double().tolist()


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return network.eval().requires_grad_(False)


def eps_of(unet: UNet2DModel) -> EpsModel:
    return lambda x_t, t: unet(x_t, t).sample


class DoubleNoise(ImageNoise):
    """What diffusers draws for a network in float64."""

    def __call__(self) -> torch.Tensor:
        draws = [torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(draws)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(unet: UNet2DModel, eta: float, steps: int) -> None:
    """In float64, since a random U-Net blows rounding up to 1e-2 within 50 steps of float32.

    One generator per image on both sides, so that both draw the same noise.
    """
    double = copy.deepcopy(unet).double()
    pipeline = DDIMPipeline(double, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.alphas_cumprod = SCHEDULER.alphas_cumprod.double()
    theirs = pipeline(
        batch_size=3,
        generator=DoubleNoise(7, range(3), SHAPE).generators,
        eta=eta,
        num_inference_steps=steps,
        output_type="np",
    ).images
    noise = DoubleNoise(7, range(3), SHAPE)
    x_0 = ddim(eps_of(double), noise(), ddim_times(steps, 1000), ABAR, eta=eta, noise=noise)
    ours = (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.std() > 0.05, "a constant image would agree with anything"
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_times_are_diffusers() -> None:
    for steps in (1, 7, 50, 999, 1000):
        SCHEDULER.set_timesteps(steps)
        assert ddim_times(steps, 1000) == SCHEDULER.timesteps.tolist()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            ddim_times(steps, 1000)


def test_batches_do_not_change_the_noise() -> None:
    whole = ImageNoise(3, range(8), SHAPE)
    parts = [ImageNoise(3, range(3), SHAPE), ImageNoise(3, range(3, 8), SHAPE)]
    for _ in range(3):
        assert torch.equal(whole(), torch.cat([part() for part in parts]))
    assert not torch.equal(ImageNoise(4, range(8), SHAPE)(), ImageNoise(3, range(8), SHAPE)())


def test_guidance_scale_zero_is_plain_sampling(unet: UNet2DModel) -> None:
    def never(x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        raise AssertionError("the classifier was called")

    guidance = classifier_guidance(never, torch.zeros(2), 0.0, ABAR, timed=True)
    times = ddim_times(10, 1000)
    x_t = ImageNoise(0, range(2), SHAPE)()
    plain = ddim(eps_of(unet), x_t, times, ABAR)
    assert torch.equal(plain, ddim(eps_of(unet), x_t, times, ABAR, guidance=guidance))


def test_callback_sees_every_step_and_input_stays(unet: UNet2DModel) -> None:
    seen: list[int] = []
    x_t = ImageNoise(0, range(1), SHAPE)()
    before = x_t.clone()
    ddim(eps_of(unet), x_t, ddim_times(5, 1000), ABAR, callback=lambda t, x: seen.append(t))
    assert seen == ddim_times(5, 1000)
    assert torch.equal(x_t, before)


def test_pixels_survive_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(from_uint8(pixels)), pixels)
    with pytest.raises(FloatingPointError):
        to_uint8(torch.full((1, 1, 2, 2), torch.nan))
