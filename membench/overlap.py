"""Numbers that model-level metrics are made of: log densities of a target at noised images.

Three sets of points: members and held-out twins with noise of each width e on them, and samples of
the target. Every point draws its noise and probes from a generator of its own, seeded by what it
is, so batches, resumed or not, change nothing; the same image has the same noise at every e.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from membench.data.imageset import Dataset
from membench.diffusion import likelihood
from membench.diffusion.clusters import describe
from membench.diffusion.targets import DensityTarget, draw_conditions
from membench.errors import MembenchError
from membench.files import replace_atomically
from membench.hashing import derive_seed
from membench.metrics import divergence
from membench.metrics.divergence import Floats, Groups
from membench.specs_base import Spec

Side = Literal["members", "heldout"]
SIDES: tuple[Side, Side] = ("members", "heldout")
Values = dict[str, np.ndarray]
HALVED = 8
"""Points of each batch grid that are solved again with half the steps: the solver's error."""


class DivergenceSpec(Spec):
    """How a model-level estimate is made.

    images: how many members (and held-out twins, and samples) are looked at; steps: of the solver
    (`pf_ode`) or strata of timesteps (`elbo`); probes: estimates of each log p, by random signs or
    by fresh timesteps and noise; draws: of noise for each image; neighbours: k of `knn`; marginal:
    of a conditional target p(x) = sum_y P(y) p(x | y) in place of p(x | y).
    """

    estimator: Literal["pf_ode", "elbo", "knn"]
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    images: int = Field(gt=1)
    steps: int | None = Field(default=None, gt=0)
    probes: int | None = Field(default=None, gt=0)
    draws: int = Field(default=1, gt=0)
    neighbours: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, gt=0)
    marginal: bool = False
    seed: int = 0

    @field_validator("epsilons")
    @classmethod
    def _widths(cls, epsilons: tuple[float, ...]) -> tuple[float, ...]:
        if not epsilons or any(not 0 < e < float("inf") for e in epsilons):
            raise ValueError("expected one or more finite widths above 0")
        if len(set(epsilons)) < len(epsilons):
            raise ValueError("a width is named twice")
        return epsilons


def flat(images: np.ndarray) -> Floats:
    """uint8 [N, H, W, C] -> float64 [N, D] in [-1, 1]."""
    return np.asarray(images, np.float64).reshape(len(images), -1) / 127.5 - 1


def chosen_rows(spec: DivergenceSpec, count: int) -> np.ndarray:
    """Which images are looked at: a random subset drawn from the seed, ascending."""
    rng = np.random.default_rng(derive_seed(spec.seed, "divergence rows"))
    return np.sort(rng.permutation(count)[: spec.images])


def generator(spec: DivergenceSpec, what: str, row: int, draw: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(spec.seed, "divergence", what, row, draw))


def set_labels(
    condition: str | None, target_labels: np.ndarray | None, dataset: Dataset, seed: int
) -> dict[Side, np.ndarray] | None:
    """Labels under which a conditional target judges members and held-out twins; else None.

    Members keep those the target was trained with. Held-out images have their own where these are
    the data set's, and where training labels were random each draws one, uniform like theirs.
    """
    if target_labels is None:
        return None
    twin = dataset.heldout_twin
    if condition == "labels":
        return {"members": target_labels, "heldout": np.asarray(twin.labels, np.int64)}
    rng = np.random.default_rng(derive_seed(seed, "held-out labels"))
    drawn = rng.integers(int(target_labels.max()) + 1, size=len(twin))
    return {"members": target_labels, "heldout": drawn}


def log_density(
    spec: DivergenceSpec,
    target: DensityTarget,
    x: Tensor,
    labels: np.ndarray | None,
    generators: Sequence[np.random.Generator],
    steps: int,
) -> np.ndarray:
    """log p_theta at x [B, C, H, W], float64 [B, P]."""
    probes = spec.probes or 1
    known: np.ndarray | None = getattr(target, "labels", None)
    if spec.marginal and known is not None:
        values, counts = np.unique(known, return_counts=True)
        mixture = [
            (count / len(known) * weight, field)
            for value, count in zip(values, counts, strict=True)
            for weight, field in target.mixture(np.full(len(x), value))
        ]
    else:
        mixture = target.mixture(labels)
    x = x.to(target.device)
    if spec.estimator == "pf_ode":
        signs = np.stack([g.integers(0, 2, (probes, *x.shape[1:])) * 2.0 - 1 for g in generators])
        moved = torch.from_numpy(signs).transpose(0, 1).to(target.device)

        def density(field: Any) -> Tensor:
            return likelihood.pf_ode(field, x, target.abar, steps=steps, probes=moved)
    else:
        states = [g.bit_generator.state for g in generators]

        def density(field: Any) -> Tensor:
            for g, state in zip(generators, states, strict=True):  # the same draws for each part
                g.bit_generator.state = state
            return likelihood.elbo(
                field, x, target.abar, steps=steps, replicates=probes, generators=generators
            )

    return likelihood.mixed(mixture, density).cpu().numpy()


def density_values(
    spec: DivergenceSpec,
    dataset: Dataset,
    target: DensityTarget,
    labels: dict[Side, np.ndarray] | None,
    samples: np.ndarray,
    folder: Path,
    advance: Callable[[int], None],
) -> Values:
    """`pf_ode` and `elbo`: log densities of everything, batch by batch, each kept in `folder`.

    samples: uint8 [S, H, W, C] of the target, S >= spec.images.
    """
    shape, steps = target.shape, spec.steps or 1
    labels = None if spec.marginal else labels
    sets = {"members": dataset.members, "heldout": dataset.heldout_twin}
    centres = {side: flat(images.images) for side, images in sets.items()}
    rows = chosen_rows(spec, len(dataset.members))
    points = [(int(row), draw) for row in rows for draw in range(spec.draws)]
    result: Values = {"rows": rows, "seconds": np.zeros(1)}

    def evaluate(what: str, width: float, clean: Floats, which: list, given: Any) -> Values:
        """All points of one set at one width: points x, log_p and, for pf_ode, log_p_half."""
        parts = []
        for start in range(0, len(which), spec.batch_size):
            batch = which[start : start + spec.batch_size]
            part = folder / f"{what}-{width:g}-{start // spec.batch_size:06d}.npz"
            if not part.is_file():
                began = time.monotonic()
                told = None if given is None else given[[row for row, _ in batch]]
                generators = [generator(spec, what, *point) for point in batch]
                noise = np.stack([g.standard_normal(clean.shape[1]) for g in generators])
                x = clean[[row for row, _ in batch]] + width * noise
                # float32 is what a network is given: densities are compared at the same points
                x = x.astype(np.float32).astype(np.float64)
                images = torch.from_numpy(_to_chw(x, shape))
                found = {
                    "x": x,
                    "log_p": log_density(spec, target, images, told, generators, steps),
                }
                if spec.estimator == "pf_ode" and start == 0 and steps > 1:
                    few = slice(0, HALVED)
                    again = [generator(spec, what, *point) for point in batch[few]]
                    for g in again:
                        g.standard_normal(clean.shape[1])
                    few_told = None if told is None else told[few]
                    found["log_p_half"] = log_density(
                        spec, target, images[few], few_told, again, steps // 2
                    )
                found["seconds"] = np.array([time.monotonic() - began])
                save_arrays(part, found)
            found = load_arrays(part)
            result["seconds"] += found.pop("seconds")
            parts.append(found)
            advance(len(batch))
        joined = {key: np.concatenate([part[key] for part in parts]) for key in ("x", "log_p")}
        return joined | {key: value for key, value in parts[0].items() if key == "log_p_half"}

    for side in SIDES:
        told = None if labels is None else labels[side]
        for e, width in enumerate(spec.epsilons):
            found = evaluate(side, width, centres[side], points, told)
            groups: Groups | None = None
            if told is not None:
                groups = (np.repeat(told[rows], spec.draws), told)
            log_q = divergence.log_mixture(found["x"], centres[side], width, groups)
            result[f"{side}_log_q_{e}"] = log_q.reshape(len(rows), spec.draws)
            result[f"{side}_log_p_{e}"] = found["log_p"].reshape(len(rows), spec.draws, -1)
            if "log_p_half" in found:
                result[f"{side}_log_p_half_{e}"] = found["log_p_half"]

    count = min(spec.images, len(samples))
    told = None if labels is None else _sample_labels(target, spec.seed, count)
    # the density is that of the model blurred by sigma_0: so are its samples
    width = likelihood.smallest_noise(target.abar)
    clean = flat(samples[:count])
    found = evaluate("samples", width, clean, [(i, 0) for i in range(count)], told)
    result["samples_log_p"] = found["log_p"]
    for side in SIDES:
        groups = None if labels is None or told is None else (told, labels[side])
        result[f"{side}_squares"] = divergence.mean_squared_distance(
            found["x"], centres[side], groups
        )
    return result


def knn_values(
    images: np.ndarray,
    dataset: Dataset,
    spec: DivergenceSpec,
    describe_images: Callable[[np.ndarray], Floats] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Values:
    """`knn`: terms [n, R] of KL(q_e || P) for bare images uint8 [M, H, W, C] drawn from P.

    describe_images: uint8 [N, H, W, C] -> float [N, D], for another space than pixels in [-1, 1];
    the noise of width e is then added to the descriptors.
    """
    space = describe_images or flat
    y = np.asarray(space(images), np.float64)
    rows = chosen_rows(spec, len(dataset.members))
    result: Values = {"rows": rows, "generated": np.array([len(images)])}
    for side, pixels in zip(
        SIDES, (dataset.members.images, dataset.heldout_twin.images), strict=True
    ):
        clean = np.asarray(space(pixels[rows]), np.float64)
        for e, width in enumerate(spec.epsilons):
            columns, jackknives = [], []
            for draw in range(spec.draws):
                noise = np.stack([
                    generator(spec, side, int(row), draw).standard_normal(clean.shape[1])
                    for row in rows
                ])  # fmt: skip
                terms, jackknife = divergence.knn_terms(
                    clean + width * noise, y, spec.neighbours or 1
                )
                columns.append(terms)
                jackknives.append(jackknife)
            result[f"{side}_terms_{e}"] = np.stack(columns, 1)
            result[f"{side}_jackknife_{e}"] = np.stack(jackknives, 1)
            if advance:
                advance(1)
    return result


def semantic_values(z: Sequence[Floats], groups: Mapping[Side, Groups] | None) -> Values:
    """mean_i ||z - z_i||^2 of every generated image, z: descriptors of members, twins, generated.

    `set_descriptors` gives them for pixels of the sets themselves; all three must share a space.
    """
    return {
        f"{side}_semantic": divergence.mean_squared_distance(
            np.asarray(z[2], np.float64),
            np.asarray(centres, np.float64),
            None if groups is None else groups[side],
        )
        for side, centres in zip(SIDES, z[:2], strict=True)
    }


def set_descriptors(images: np.ndarray, dataset: Dataset, name: str) -> list[Floats]:
    """Descriptors of members, held-out twins and generated images, fitted to all of them together.

    name: one of `membench.diffusion.clusters.DESCRIPTORS`.
    """
    members, twin = dataset.members.images, dataset.heldout_twin.images
    z = describe(np.concatenate([members, twin, images]), name)
    return np.split(z, [len(members), len(members) + len(twin)])


def sample_groups(
    spec: DivergenceSpec,
    target: DensityTarget,
    labels: dict[Side, np.ndarray] | None,
    count: int,
) -> dict[Side, Groups] | None:
    """Samples of a conditional target are compared with the images of their own label."""
    if labels is None or spec.marginal or spec.estimator == "knn":
        return None
    told = _sample_labels(target, spec.seed, count)
    return {side: (told, labels[side]) for side in SIDES}


def _sample_labels(target: Any, seed: int, count: int) -> np.ndarray:
    drawn = draw_conditions(target.labels, seed, range(count))
    assert drawn is not None
    return drawn


def _to_chw(x: Floats, shape: tuple[int, int, int]) -> Floats:
    channels, height, width = shape
    return np.ascontiguousarray(x.reshape(-1, height, width, channels).transpose(0, 3, 1, 2))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz that needs no pickle; the same arrays give the same bytes."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            np.savez(stream, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]

    replace_atomically(path, write)


def load_arrays(path: Path) -> Values:
    """Every array of an .npz; `MembenchError` names a file that is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise MembenchError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise MembenchError(f"{path}: truncated or not an array file ({error})") from None
    except Exception as error:  # zipfile has an error of its own
        raise MembenchError(f"{path}: damaged ({error})") from None
