"""Model-level metrics: how near a model's density is to its members (spec section 5), in float64.

Points and centres are [*, D] in units of [-1, 1]; epsilon is the width of the kernels of

    q_e(x) = (1/N) sum_i Normal(x; x_i, e^2 I).

Densities are given as numbers: nothing here knows a model. Every estimate is a dictionary with its
`value`, its `standard_error` and what the error covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.search import nearest

Floats = NDArray[np.float64]
Groups = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Labels of the points [n] and of the centres [N]: a point is compared with its own group only."""
BLOCKS = 10
"""Of the jackknife of `knn`."""
_SPARE = 40  # neighbours beyond the k-th that are kept: a block left out never takes all of them
_BLOCK = 2**22  # pairs whose squared distances are in memory at a time


def squared_distances(points: Floats, centres: Floats) -> Floats:
    """||x - c||^2 for all pairs, [n, N]; to 1e-12 of ||x||^2 + ||c||^2, never negative."""
    middle = centres.mean(axis=0)
    x, c = points - middle, centres - middle
    squares = (x**2).sum(1)[:, None] + (c**2).sum(1) - 2 * x @ c.T
    return np.maximum(squares, 0, out=squares)


def log_mixture(
    points: Floats, centres: Floats, epsilon: float, groups: Groups | None = None
) -> Floats:
    """log q_e at the points, [n]: log-sum-exp over the centres, in blocks.

    groups: each point under the mixture of the centres of its own label.
    Raises `MembenchError` for a point whose group has no centre.
    """
    if not epsilon > 0:
        raise MembenchError(f"epsilon: {epsilon:g}, expected a width above 0")
    n, dimensions = points.shape
    result = np.empty(n)
    rows = max(1, _BLOCK // len(centres))
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        logits = squared_distances(points[block], centres) / (-2 * epsilon**2)
        count = np.full(len(logits), float(len(centres)))
        if groups is not None:
            same = groups[0][block, None] == groups[1]
            logits[~same], count = -np.inf, same.sum(1).astype(float)
            if not count.all():
                label = groups[0][block][count == 0][0]
                raise MembenchError(f"label {label}: no image of the set has it")
        top = logits.max(1)
        result[block] = top + np.log(np.exp(logits - top[:, None]).sum(1)) - np.log(count)
    return result - dimensions / 2 * math.log(2 * math.pi * epsilon**2)


def mean_squared_distance(points: Floats, centres: Floats, groups: Groups | None = None) -> Floats:
    """mean_i ||x - x_i||^2 over the centres (of the point's own group), [n]."""
    result = np.empty(len(points))
    rows = max(1, _BLOCK // len(centres))
    for start in range(0, len(points), rows):
        block = slice(start, start + rows)
        squares = squared_distances(points[block], centres)
        if groups is None:
            result[block] = squares.mean(1)
        else:
            same = groups[0][block, None] == groups[1]
            result[block] = np.where(same, squares, 0).sum(1) / same.sum(1)
    return result


def memorization_divergence(log_q: Floats, log_p: Floats) -> dict[str, Any]:
    """KL(q_e || p_theta) = -H(q_e) - E_q[log p_theta] (seed 000 eq. 5) by Monte Carlo.

    log_q [n, R]: log q_e at x_i + e * noise, n images and R draws of noise each; log_p [n, R, P]:
    P independent estimates of log p_theta there. Entropy and cross-entropy are taken at the same
    points: what their errors share cancels. `standard_error` covers everything, as if the n images
    were drawn from all there might be; `of_noise` and `of_replicates` are the parts of it due to
    the draws of noise and to the estimates of log p_theta, None where one draw cannot tell.
    """
    if log_q.shape != log_p.shape[:2] or log_p.ndim != 3:
        raise MembenchError(f"log_q {log_q.shape} and log_p {log_p.shape} do not fit together")
    n, draws, replicates = log_p.shape
    each = log_q - log_p.mean(2)
    of_noise = of_replicates = None
    if draws > 1:
        of_noise = math.sqrt(each.var(1, ddof=1).sum() / draws) / n
    if replicates > 1:
        of_replicates = math.sqrt(log_p.var(2, ddof=1).sum() / replicates) / (n * draws)
    return _estimate(each.mean(1)) | {
        "of_noise": of_noise,
        "of_replicates": of_replicates,
        "entropy": _estimate(-log_q.mean(1)),
        "cross_entropy": _estimate(-log_p.mean((1, 2))),
    }


def pointwise_memorization(
    log_p: Floats, squares: Floats, epsilon: float, dimensions: int, count: int
) -> dict[str, Any]:
    """sum_i E_p[log p_theta(x) - log Normal(x; x_i, e I)] (seed 002 eq. 1; e is a *variance*).

    log_p [S, P]: P estimates of log p_theta at S samples of p_theta; squares [S]: mean_i of
    ||x_s - x_i||^2 (`mean_squared_distance`); count: N, the images that are summed over. `value` is
    the mean over the N images, `sum` the paper's sum. The set enters only through its mean and its
    total variance, sum_i ||x - x_i||^2 = N ||x - mean||^2 + sum_i ||x_i - mean||^2: this metric
    cannot tell a copied image from one like the average. The error is over the samples.
    """
    if not epsilon > 0:
        raise MembenchError(f"epsilon: {epsilon:g}, expected a variance above 0")
    normal = dimensions / 2 * math.log(2 * math.pi * epsilon) + squares / (2 * epsilon)
    return _summed(log_p.mean(1) + normal, count)


def semantic_memorization(squares: Floats, count: int) -> dict[str, Any]:
    """sum_i E_p ||z - z_i||^2 (seed 002 eq. 3) from samples, in whatever space z lives.

    squares [S]: mean_i of ||z_s - z_i||^2; count: N. As `pointwise_memorization`.
    """
    return _summed(squares, count)


def knn_terms(x: Floats, y: Floats, k: int, floor: float = 0.0) -> tuple[Floats, Floats]:
    """Terms [n] whose mean estimates KL(P || Q) from x ~ P [n, D] and y ~ Q [m, D].

        D log(nu_k(i) / rho_k(i)) + log(m / (n - 1))

    (Wang, Kulkarni and Verdu 2009, eq. 5): rho_k the distance of x_i to its k-th neighbour among
    the other x, nu_k that among the y; exact neighbours. Consistent for any k, but in many
    dimensions its bias is large and falls slowly with n: differences between models on the same
    points are what counts.

    Second comes the jackknife [BLOCKS]: the estimate without every BLOCKS-th x and y, from the
    first, the second, ... on. Terms share neighbours and samples: their spread is no error.

    floor: distances below it count as it (quantised data: half a step). Without one, a k-th
    neighbour at distance zero (k + 1 equal points) is refused: the estimate would be infinite.
    """
    n, m = len(x), len(y)
    most = min(n - 1, m) - (max(n, m) // BLOCKS + 1)  # what is left without a block
    if not 1 <= k <= most:
        raise MembenchError(f"k: {k}, expected 1 to {most} for {n} and {m} points")
    among_x, among_y = nearest(x, x, k + 1 + _SPARE), nearest(x, y, k + _SPARE)
    others = among_x.index != np.arange(n)[:, None]

    def kth(distance: NDArray[np.float32], valid: NDArray[np.bool_], where: str) -> Floats:
        place = (valid.cumsum(1) == k).argmax(1)
        found = np.take_along_axis(distance, place[:, None], 1)[:, 0].astype(np.float64)
        found = np.maximum(found, floor)
        if not found.all():
            raise MembenchError(
                f"knn: {np.count_nonzero(found == 0)} points have {k} equal points in {where}; "
                "take a larger k, or a floor for distances"
            )
        return found

    def terms(left_out: int | None) -> Floats:
        keep_x, keep_y = others, np.ones_like(among_y.index, bool)
        rows = np.ones(n, bool)
        if left_out is not None:
            keep_x = others & (among_x.index % BLOCKS != left_out)
            keep_y = among_y.index % BLOCKS != left_out
            rows = np.arange(n) % BLOCKS != left_out
        own = kth(among_x.distance[rows], keep_x[rows], "the same set")
        other = kth(among_y.distance[rows], keep_y[rows], "the other set")
        left = m - (0 if left_out is None else len(range(left_out, m, BLOCKS)))
        return x.shape[1] * np.log(other / own) + math.log(left / (rows.sum() - 1))

    return terms(None), np.array([terms(block).mean() for block in range(BLOCKS)])


def knn_divergence(terms: Floats, jackknife: Floats) -> dict[str, Any]:
    """Mean of `knn_terms` and its jackknife error, of the variance only, never of the bias.

    terms [n, R], jackknife [BLOCKS, R]: R sample sets x with the same y.
    """
    found = _estimate(terms.mean(1))
    return found | {"standard_error": _jackknife_error(jackknife.mean(1))}


def knn_gap(
    members: Mapping[str, Any], heldout: Mapping[str, Any], jackknives: tuple[Floats, Floats]
) -> dict[str, Any]:
    """Held-out minus members where both saw the same y: the blocks are left out of both."""
    error = _jackknife_error((jackknives[1] - jackknives[0]).mean(1))
    return _with_z(heldout["value"] - members["value"], error)


def _jackknife_error(replicates: Floats) -> float:
    """Delete-a-block jackknife (Efron and Tibshirani 1993, ch. 11): [B] estimates."""
    blocks = len(replicates)
    return math.sqrt((blocks - 1) / blocks * ((replicates - replicates.mean()) ** 2).sum())


def gap(members: Mapping[str, Any], heldout: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out minus members, two independent estimates: above 0 is evidence of memorization."""
    error = math.hypot(members["standard_error"], heldout["standard_error"])
    return _with_z(heldout["value"] - members["value"], error)


def paired_gap(members: Floats, heldout: Floats) -> dict[str, Any]:
    """Held-out minus members where both were taken at the same n samples: [n] each."""
    found = _estimate(heldout - members)
    return _with_z(found["value"], found["standard_error"])


def _with_z(value: float, error: float) -> dict[str, Any]:
    return {"value": value, "standard_error": error, "z": value / error if error > 0 else None}


def _summed(each: Floats, count: int) -> dict[str, Any]:
    found = _estimate(each)
    return found | {"sum": count * found["value"], "images": count}


def _estimate(each: Floats) -> dict[str, Any]:
    """Mean of n independent numbers, and the standard error of the mean."""
    if len(each) < 2:
        raise MembenchError(f"{len(each)} image: a standard error needs at least two")
    if not np.isfinite(each).all():
        raise MembenchError("the model's density is NaN or infinite at some points")
    error = float(each.std(ddof=1)) / math.sqrt(len(each))
    return {"value": float(each.mean()), "standard_error": error, "n": len(each)}
