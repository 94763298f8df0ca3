"""log p_theta(x) of a target, by the probability-flow ODE or from below by the variational bound.

Both return replicates: `log_p` [B, P] whose columns are equally good, independent estimates, so
that whoever averages them knows their standard error. Densities are per unit of volume of images in
[-1, 1]^D; sums are float64, the U-Net works in float32.

**pf_ode.** With sigma = sqrt((1 - abar) / abar) and y = x_t / sqrt(abar) the probability flow of a
variance-preserving diffusion is DDIM's ODE (Song, Meng and Ermon 2021, eq. 14; Song et al. 2021,
eq. 39), and the density of y changes along it by the trace of its Jacobian:

    dy / dsigma = eps(x_t, t),    d log p(y) / dsigma = - tr d eps / d y = - sqrt(abar) tr J,

J = d eps / d x_t. So only t(sigma) is needed of the schedule. The T discrete timesteps are made
continuous by letting log abar be linear in t between integers (`eps.abar_at`), and the U-Net's
time embedding takes the real t. From sigma_0 (t = 0) to sigma_T (t = T - 1), where x_T is taken as
N(0, I):

    log p(y_0) = log N(x_T; 0, I) + (D / 2) log abar_T + integral sqrt(abar) tr J dsigma.

The solver is the classical Runge-Kutta method of order 4 on `steps` equal steps of sigma^(1/7) (the
grid of Karras et al. 2022). tr J is Hutchinson's v^T J v, v of random signs, the same v at every
step, so each v gives an unbiased estimate of the whole integral. Bias: y_0 is a data point with
noise of width sigma_0 (0.01 for the linear schedule of 1000 steps) on it; what is computed is the
density of the model blurred by sigma_0, never of something sharper. And x_T is only nearly normal:
a point near x_0 is wrong by about sqrt(abar_T) ||x_0||, 0.0064 ||x_0|| there, of either sign.
Where a field nearly jumps (the closed form of far-apart images, seen from outside), the solver
misses narrow peaks of the trace and log p comes out too high, with more error than half the steps
tell; no such error was seen on points near the kernels or in few dimensions.

**elbo.** The bound of a DDPM (Ho, Jain and Abbeel 2020, eq. 5) whose reverse steps have variance
beta_t (their "fixed large"; the posterior variance r_t beta_t is far too small where the noise is
narrower than the data), timesteps from 0:

    -log p(x) <= KL(q(x_T | x) || N(0, I))
                 + sum_{t=1}^{T-1} [ w_t E||eps - eps_theta(x_t, t)||^2
                                     + D (r_t - 1 - log r_t) / 2 ]
                 + E||eps - eps_theta(x_0, 0)||^2 / 2 + (D / 2) log(2 pi sigma_0^2),

w_t = beta_t / (2 alpha_t (1 - abar_t)), r_t = (1 - abar_{t-1}) / (1 - abar_t). The last line is the
reconstruction term of continuous data: x given x_0 is Normal around the predicted clean image with
the width sigma_0, which is what the noise at t = 0 leaves unknown. All terms but the expected
errors are exact; those are summed over all timesteps or by stratified sampling: one timestep from
each of `steps` strata, geometrically growing, since w_t falls like 1 / t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from membench.diffusion.targets import Field
from membench.errors import MembenchError

RHO = 7.0
"""Of the grid sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
CALLS = {"pf_ode": 4, "elbo": 1}
"""Evaluations of the field at one step."""
VERSIONS = {"pf_ode": 1, "elbo": 1}
Density = Callable[[Field], Tensor]


def smallest_noise(abar: Sequence[float]) -> float:
    """sigma_0: the width by which both estimators blur the model, in units of [-1, 1]."""
    return math.sqrt((1 - abar[0]) / abar[0])


def pf_ode(
    field: Field,
    x: Tensor,
    abar: Sequence[float],
    *,
    steps: int,
    probes: Tensor | None = None,
) -> Tensor:
    """log p(x) by the probability-flow ODE: float64 [B, P], a column for each probe.

    x: [B, C, H, W] in units of [-1, 1]; probes: random signs [P, B, C, H, W]; None takes the exact
    trace by D products with the Jacobian, for small D: [B, 1].
    """
    if steps < 1:
        raise MembenchError(f"steps: {steps}, expected at least 1")
    exact = probes is None
    if probes is None:
        size = x[0].numel()
        basis = torch.eye(size, dtype=torch.float64, device=x.device)
        probes = basis.view(size, 1, *x.shape[1:]).expand(-1, *x.shape)
    t_of = _time_of_noise(abar)
    first, last = (math.sqrt((1 - a) / a) ** (1 / RHO) for a in (abar[0], abar[-1]))
    width = (last - first) / steps

    def slope(y: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """dy / du and d(integral) / du at sigma = u^rho."""
        sigma = u**RHO
        shrink = 1 / math.sqrt(1 + sigma**2)  # sqrt(abar)
        t = torch.full((len(y),), t_of(sigma), dtype=torch.float64, device=y.device)
        eps, traces = _traces(field, shrink * y, t, probes)
        speed = RHO * u ** (RHO - 1)
        return speed * eps, speed * shrink * traces

    y = x.double()
    integral = torch.zeros(len(x), len(probes), dtype=torch.float64, device=x.device)
    for i in range(steps):
        u = first + i * width
        y_1, trace_1 = slope(y, u)
        y_2, trace_2 = slope(y + width / 2 * y_1, u + width / 2)
        y_3, trace_3 = slope(y + width / 2 * y_2, u + width / 2)
        y_4, trace_4 = slope(y + width * y_3, u + width)
        y = y + width / 6 * (y_1 + 2 * y_2 + 2 * y_3 + y_4)
        integral = integral + width / 6 * (trace_1 + 2 * trace_2 + 2 * trace_3 + trace_4)
    if exact:
        integral = integral.sum(1, keepdim=True)
    size = x[0].numel()
    square = abar[-1] * y.flatten(1).square().sum(1, keepdim=True)
    prior = -(square + size * math.log(2 * math.pi / abar[-1])) / 2
    return prior + integral


def elbo(
    field: Field,
    x: Tensor,
    abar: Sequence[float],
    *,
    steps: int,
    replicates: int,
    generators: Sequence[np.random.Generator],
) -> Tensor:
    """The variational bound, a number below log p(x): float64 [B, replicates].

    x: [B, C, H, W] in units of [-1, 1]; steps: strata of timesteps, `len(abar)` for all of them;
    generators: one per image, so that batches do not change what is drawn.
    """
    a = torch.tensor(abar, dtype=torch.float64, device=x.device)
    edges, weights = strata(len(abar), steps), elbo_weights(abar).to(x.device)
    size, x = x[0].numel(), x.double()
    columns = []
    for _ in range(replicates):
        loss = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for low, high in pairwise(edges):
            draws = [g.integers(low, high) for g in generators]
            noises = np.stack([g.standard_normal(x.shape[1:]) for g in generators])
            t = torch.tensor(draws, device=x.device)
            noise = torch.from_numpy(noises).to(x.device)
            a_t = a[t].view(-1, 1, 1, 1)
            with torch.no_grad():
                eps = field(a_t.sqrt() * x + (1 - a_t).sqrt() * noise, t.double())
            square = (noise - eps.double()).flatten(1).square().sum(1)
            loss += (high - low) * weights[t] * square
        columns.append(loss)
    prior = abar[-1] * x.flatten(1).square().sum(1) - size * (abar[-1] + math.log1p(-abar[-1]))
    r = (1 - a[:-1]) / (1 - a[1:])
    widths = math.log(2 * math.pi * smallest_noise(abar) ** 2) + (r - 1 - r.log()).sum().item()
    return -torch.stack(columns, 1) - (prior[:, None] + size * widths) / 2


def strata(timesteps: int, count: int) -> list[int]:
    """Edges of `count` strata of the timesteps 0 .. T - 1; stratum k is [edge_k, edge_{k+1}).

    The early ones hold one timestep each, the later ones grow geometrically.
    """
    if not 1 <= count <= timesteps:
        raise MembenchError(f"steps: {count}, expected 1 to {timesteps} strata of timesteps")
    edges = [0]
    for left in range(count, 0, -1):
        start = edges[-1]
        grown = round((start + 1) * ((timesteps + 1) / (start + 1)) ** (1 / left)) - 1
        edges.append(min(max(grown, start + 1), timesteps - left + 1))
    return edges


def elbo_weights(abar: Sequence[float]) -> Tensor:
    """Factors w_t of E||eps - eps_theta||^2 in the bound: float64 [T]; w_0 is the decoder's."""
    a = torch.tensor(abar, dtype=torch.float64)
    alpha = a[1:] / a[:-1]
    decoder = torch.full((1,), 0.5, dtype=torch.float64)
    return torch.cat([decoder, (1 - alpha) / (2 * alpha * (1 - a[1:]))])


def mixed(mixture: list[tuple[float, Field]], density: Density) -> Tensor:
    """log of the weighted sum of densities: float64 [B, P]; of bounds it is a bound."""
    logs = [math.log(weight) + density(field) for weight, field in mixture]
    return logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0)


def _traces(field: Field, x_t: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """eps [B, C, H, W] and v^T (d eps / d x_t) v for every probe [B, P], in float64."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        eps = field(x, t)
        traces = []
        for i, v in enumerate(probes):
            (row,) = torch.autograd.grad(eps, x, v.to(eps.dtype), retain_graph=i + 1 < len(probes))
            traces.append((row.double() * v).flatten(1).sum(1))
    return eps.detach().double(), torch.stack(traces, 1)


def _time_of_noise(abar: Sequence[float]) -> Callable[[float], float]:
    """t(sigma) where log abar is linear in t between integers."""
    log_abar = np.log(np.asarray(abar, np.float64))[::-1]
    times = np.arange(len(abar), dtype=np.float64)[::-1]
    return lambda sigma: float(np.interp(-math.log1p(sigma**2), log_abar, times))
