"""log p(x) of closed-form targets against their exact density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from membench.diffusion.likelihood import elbo, elbo_weights, mixed, pf_ode, smallest_noise, strata
from membench.diffusion.targets import ClosedFormTarget, OracleTarget, UNetTarget, abar_at
from membench.diffusion.unet import build_unet, schedule_abar
from membench.errors import MembenchError

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = (2, 2, 1)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def centres(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)


def exact(x: Tensor, pixels: np.ndarray, width: float) -> Tensor:
    """log of (1/N) sum_i Normal(x; x_i, width^2 I), written out."""
    points = [np.asarray(c).ravel() for c in centres(pixels)]
    size = len(points[0])
    result = []
    for row in np.asarray(x).reshape(len(x), -1):
        terms = [-((row - c) ** 2).sum() / (2 * width**2) for c in points]
        top = max(terms)
        total = sum(math.exp(term - top) for term in terms) / len(points)
        result.append(top + math.log(total) - size / 2 * math.log(2 * math.pi * width**2))
    return torch.tensor(result, dtype=torch.float64)


def near(pixels: np.ndarray, width: float, copies: int, seed: int = 1) -> Tensor:
    x = centres(pixels).repeat(copies, 1, 1, 1)
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    return x + width * torch.from_numpy(noise)


def signs(count: int, x: Tensor, seed: int = 2) -> Tensor:
    drawn = np.random.default_rng(seed).integers(0, 2, (count, *x.shape)) * 2.0 - 1
    return torch.from_numpy(drawn)


def generators(count: int, seed: int = 3) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 5])
def test_pf_ode_is_the_density_of_the_blurred_mixture(count: int) -> None:
    """N = 1 is one Gaussian. Only the solver and the prior (x_T is not quite normal) are wrong."""
    pixels, kernel = images(count), 0.2
    (_, field), *_ = ClosedFormTarget(pixels, ABAR, kernel=kernel).mixture(None)
    x = near(pixels, kernel, 20 // count)
    truth = exact(x, pixels, math.hypot(kernel, smallest_noise(ABAR)))
    errors = [
        (pf_ode(field, x, ABAR, steps=steps)[:, 0] - truth).abs().max().item()
        for steps in (16, 32, 64)
    ]
    print(f"N = {count}: largest error at 16, 32, 64 steps: {errors}")
    # of the prior: x_T ~ N(sqrt(abar_T) x_0, I) is taken as N(0, I)
    prior = math.sqrt(ABAR[-1]) * centres(pixels).flatten(1).norm(dim=1).max().item() * 3
    assert errors[2] < prior < 0.05
    assert errors[0] > errors[1]


def test_pf_ode_says_its_solver_error() -> None:
    """Half the steps change log p by more than all of them are wrong."""
    pixels = images(4)
    (_, field), *_ = ClosedFormTarget(pixels, ABAR, kernel=0.15).mixture(None)
    x = near(pixels, 0.15, 4)
    truth = exact(x, pixels, math.hypot(0.15, smallest_noise(ABAR)))
    half, whole = (pf_ode(field, x, ABAR, steps=steps)[:, 0] for steps in (12, 24))
    stated, error = (whole - half).abs().max().item(), (whole - truth).abs().max().item()
    print(f"stated {stated:.4f}, true {error:.4f}")
    assert error < stated


def test_random_signs_give_the_trace_within_their_own_error() -> None:
    pixels = images(3, shape=(3, 3, 1))
    (_, field), *_ = ClosedFormTarget(pixels, ABAR, kernel=0.3).mixture(None)
    x = near(pixels, 0.6, 8)
    whole = pf_ode(field, x, ABAR, steps=16)[:, 0]
    found = pf_ode(field, x, ABAR, steps=16, probes=signs(16, x))
    assert found.shape == (24, 16)
    error = found.std(1) / 4
    z = ((found.mean(1) - whole) / error.clamp_min(1e-9)).abs()
    assert error.max() > 1e-3  # the probes do differ
    assert z.max() < 4.5 and (z < 2.2).double().mean() > 0.8


def test_the_bound_lies_below_the_density_and_near_it() -> None:
    """In the mean over points of p itself, where no bound can lie above the density."""
    pixels, kernel = images(5), 0.2
    (_, field), *_ = ClosedFormTarget(pixels, ABAR, kernel=kernel).mixture(None)
    x = near(pixels, kernel, 60)
    found = elbo(field, x, ABAR, steps=100, replicates=4, generators=generators(len(x)))
    below = exact(x, pixels, kernel) - found.mean(1)
    error = below.std().item() / math.sqrt(len(x))
    print(f"density - bound: {below.mean().item():.3f} +- {error:.3f} in {x[0].numel()} dimensions")
    assert -3 * error < below.mean().item() < 0.2 + 3 * error


def test_strata_agree_with_all_timesteps() -> None:
    pixels = images(4)
    (_, field), *_ = ClosedFormTarget(pixels, ABAR, kernel=0.2).mixture(None)
    x = near(pixels, 0.2, 20)
    few = elbo(field, x, ABAR, steps=40, replicates=8, generators=generators(len(x), 1))
    every = elbo(field, x, ABAR, steps=1000, replicates=1, generators=generators(len(x), 2))
    change = few.mean(1) - every[:, 0]
    error = change.std().item() / math.sqrt(len(x))
    assert abs(change.mean().item()) < 3.5 * error


@pytest.mark.parametrize("count", [1, 2, 7, 64, 999, 1000])
def test_strata_cover_every_timestep_once(count: int) -> None:
    edges = strata(1000, count)
    assert (edges[0], edges[-1], len(edges)) == (0, 1000, count + 1)
    widths = np.diff(edges)
    assert widths.min() >= 1
    if count in (7, 64):
        assert widths[0] <= widths[-1]
    with pytest.raises(MembenchError, match="expected 1 to 1000 strata"):
        strata(1000, 1001)


def test_the_bound_of_a_gaussian_by_hand() -> None:
    """One timestep: KL of the prior, the reconstruction, nothing else."""
    abar = [0.5]
    x = torch.full((2, 1, 1, 2), 0.5, dtype=torch.float64)
    found = elbo(
        lambda x_t, t: torch.zeros_like(x_t),
        x, abar, steps=1, replicates=2000, generators=generators(2),
    )  # fmt: skip
    prior = 2 * (0.5 * 0.25 + 0.5 - 1 - math.log(0.5)) / 2
    decoder = 2 / 2 * math.log(2 * math.pi * 1.0) + 2 / 2  # E||eps||^2 = 2
    assert found.mean().item() == pytest.approx(-prior - decoder, abs=0.06)


def test_weights_are_those_of_the_kl_of_two_gaussians() -> None:
    """KL of the posterior from a reverse step of variance beta_t, whose mean is off by one eps."""
    t, weights = 300, elbo_weights(ABAR)
    beta = 1 - ABAR[t] / ABAR[t - 1]
    off = beta / math.sqrt(1 - ABAR[t]) / math.sqrt(1 - beta)  # of the mean, for an error of 1
    assert weights[t].item() == pytest.approx(off**2 / (2 * beta), rel=1e-9)
    assert weights[0].item() == 0.5


def test_times_between_integers_are_geometric_means() -> None:
    t = torch.tensor([0.0, 4.5, 999.0], dtype=torch.float64)
    expected = [ABAR[0], math.sqrt(ABAR[4] * ABAR[5]), ABAR[999]]
    assert abar_at(ABAR, t).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_mixture_of_targets_is_the_mixture_of_densities(small) -> None:  # type: ignore[no-untyped-def]
    target = OracleTarget(small, 0.25, kernel=0.2)
    assert [weight for weight, _ in target.mixture(None)] == [0.25, 0.75]
    x = torch.from_numpy(small.members.images[:2] / 127.5 - 1).permute(0, 3, 1, 2)
    probes = signs(1, x)
    parts = [pf_ode(f, x, target.abar, steps=8, probes=probes) for _, f in target.mixture(None)]
    found = mixed(target.mixture(None), lambda f: pf_ode(f, x, target.abar, steps=8, probes=probes))
    expected = torch.logaddexp(parts[0] + math.log(0.25), parts[1] + math.log(0.75))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_unet_knows_real_times_and_has_a_gradient(registry) -> None:  # type: ignore[no-untyped-def]
    card = registry.card("fashion_mini")
    recipe = card.targets["ddpm_labels"]
    torch.manual_seed(0)
    network = build_unet(recipe, card.images)
    labels = np.array([1, 2])
    target = UNetTarget(
        "unet", network, card.images.shape, schedule_abar(recipe), {}, "cpu", labels
    )
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    (_, field), *_ = target.mixture(labels)

    def at(t: float) -> Tensor:
        return field(x, torch.full((2,), t, dtype=torch.float64))

    torch.testing.assert_close(at(7.0), target.given(labels)(x.float(), 7), rtol=0, atol=0)
    assert not torch.equal(at(7.5), at(7.0)) and not torch.equal(at(7.5), at(8.0))
    v = signs(1, x)
    step = 1e-2
    y = x.clone().requires_grad_()
    (row,) = torch.autograd.grad(field(y, torch.full((2,), 7.0)), y, v[0].float())
    plus, minus = (field(x + s * v[0], torch.full((2,), 7.0)).double() for s in (step, -step))
    numeric = ((plus - minus) / (2 * step) * v[0]).flatten(1).sum(1)
    torch.testing.assert_close((row * v[0]).flatten(1).sum(1), numeric, rtol=2e-2, atol=2e-2)
    assert isinstance(network, nn.Module)
