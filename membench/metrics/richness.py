"""How many different training images are extracted, as a function of how many images are drawn.

k_j is the number of the n images that match training image j, "incidence" in ecology, where the
same question is asked of species (training images) and samples (generated images). An image may
match several training images; where a formula needs that none does, it says so.

Inside the n images everything is *rarefaction*, exact. Beyond them it is *extrapolation*, a guess
with assumptions of its own: callers mark it as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import bdtrc, gammaln

from membench.errors import MembenchError
from membench.metrics.intervals import CRITICAL, Interval

Counts = NDArray[Any]


def incidence(
    image: NDArray[Any], reference: NDArray[Any], n_images: int, n_references: int
) -> sparse.csr_array:
    """The matches as a sparse matrix [n_images, n_references] of ones.

    image, reference: [P], the pairs in the band. Raises MembenchError for a pair named twice.
    """
    ones = np.ones(len(image))
    found = sparse.csr_array((ones, (image, reference)), shape=(n_images, n_references))
    if found.nnz and found.data.max() > 1:
        raise MembenchError("a pair of generated and training image is listed twice")
    return found


def missed(k: Counts, n_images: int, size: int) -> NDArray[np.float64]:
    """C(n - k, size) / C(n, size): how likely a subset of `size` images has none of k given ones.

    k: [...] in 0..n. Raises MembenchError for a size outside 0..n: that would be extrapolation.
    """
    return np.asarray(np.exp(_log_missed(k, n_images, size)))


def _log_missed(k: Counts, n_images: int, size: int) -> NDArray[np.float64]:
    if not 0 <= size <= n_images:
        raise MembenchError(f"cannot rarefy {n_images} images to {size}")
    k = np.asarray(k, np.float64)
    certain = n_images - k < size  # some of the k are in every subset
    left = np.where(certain, size, n_images - k)
    log_missed = (
        gammaln(left + 1)
        - gammaln(left - size + 1)
        - gammaln(n_images + 1)
        + gammaln(n_images - size + 1)
    )
    return np.where(certain, -np.inf, np.minimum(log_missed, 0.0))


def rarefied(counts: Counts, n_images: int, size: int) -> float:
    """Expected number of unique matches in a random subset of `size` of the n images.

    sum_j [1 - C(n - k_j, size) / C(n, size)], exact rarefaction (Hurlbert 1971), whether or not
    an image matches several training images. Scores at different N_G are comparable only at a
    common size. Raises MembenchError for a size outside 0..n.
    """
    seen = np.asarray(counts)[np.asarray(counts) > 0]
    return float(-np.expm1(_log_missed(seen, n_images, size)).sum())


def rarefied_variance(found: sparse.csr_array, size: int) -> float:
    """Exact variance of the number of unique matches over all subsets of `size` of the n images.

    Conditional on the n images: 0 at size = n. With q(k) = C(n - k, size) / C(n, size) and
    k_jl the images that match j or l (or both),

        sum_j q(k_j) (1 - q(k_j)) + sum_{j != l} [q(k_jl) - q(k_j) q(k_l)]

    (Heck, van Belle and Simberloff 1975, there for samples with one species each, k_jl = k_j + k_l;
    this form also holds for images that match several). found: `incidence` [n, N].
    """
    n_images = found.shape[0]
    counts = np.asarray(found.sum(axis=0)).ravel().astype(np.int64)
    seen = np.flatnonzero(counts)
    value, number = np.unique(counts[seen], return_counts=True)
    q = missed(value, n_images, size)
    both = missed(np.minimum(value[:, None] + value, n_images), n_images, size)
    disjoint = both - np.outer(q, q)
    total = float(number @ (q * (1 - q))) + float(number @ disjoint @ number)
    total -= float(number @ np.diag(disjoint))
    kept = found[:, seen]
    shared = sparse.coo_array(kept.T @ kept)
    apart = shared.row != shared.col
    row, col = counts[seen][shared.row[apart]], counts[seen][shared.col[apart]]
    joint = row + col - shared.data[apart].astype(np.int64)
    as_counted = missed(np.minimum(row + col, n_images), n_images, size)
    total += float((missed(joint, n_images, size) - as_counted).sum())
    return max(total, 0.0)


def unconditional_variance(counts: Counts, n_images: int, size: int) -> float:
    """Variance of the unique matches of `size` *new* images of the same target.

    sum_j (1 - q(k_j))^2 - S(size)^2 / S_est, S_est by Chao (Colwell et al. 2012, eq. 5 and 18); at
    size = n it is S (1 - S / S_est). Assumes that training images are matched independently of each
    other, or that no image matches two; where many do, the jackknife of
    `intervals.unique_interval` holds. In simulations 16 % too small at n / 2, 18 % too large at n.
    """
    seen = np.asarray(counts)[np.asarray(counts) > 0]
    if not len(seen):
        return 0.0
    found = 1 - missed(seen, n_images, size)
    total = chao1(counts, n_images).value
    return max(float((found**2).sum() - found.sum() ** 2 / total), 0.0)


def with_replacement(counts: Counts, n_images: int, size: int) -> float:
    """The papers' formula: sum_j 1 - (1 - p_j)^size with p_j = k_j / n.

    Their expectation of N_umem, with the unknown p_j estimated from the same images. Draws *with*
    replacement, so that at size = n it is below the number that was seen; `rarefied` is unbiased.
    Source: SIDE, "the importance of N_G".
    """
    share = np.asarray(counts, np.float64) / n_images
    return float((1 - (1 - share) ** size).sum())


@dataclass(frozen=True)
class Extrapolated:
    """A number of unique matches that was not observed but inferred, with its 95 % interval."""

    value: float
    interval: Interval


def chao1(counts: Counts, n_images: int) -> Extrapolated:
    """Lower bound of the unique matches that endless sampling would find.

    S + A f_1^2 / (2 f_2), or S + A f_1 (f_1 - 1) / 2 if f_2 = 0; A = (n - 1) / n; f_i the number of
    training images matched exactly i times. Log-normal interval that never falls below S.
    For matches by image this is the incidence form, Chao2: images may match several.
    Sources: Chao 1984; interval and variance: Chao 1987; with A: Colwell et al. 2012, Gotelli and
    Chao 2013.
    """
    seen = np.asarray(counts)[np.asarray(counts) > 0]
    observed = float(len(seen))
    f_1, f_2 = float((seen == 1).sum()), float((seen == 2).sum())
    a = (n_images - 1) / n_images
    if f_2 > 0:
        r = f_1 / f_2
        unseen = a * f_1**2 / (2 * f_2)
        variance = f_2 * (a * r**2 / 2 + a**2 * r**3 + a**2 * r**4 / 4)
    else:
        unseen = a * f_1 * (f_1 - 1) / 2
        variance = a * f_1 * (f_1 - 1) / 2 + a**2 * f_1 * (2 * f_1 - 1) ** 2 / 4
        variance -= a**2 * f_1**4 / (4 * (observed + unseen)) if observed else 0.0
    if unseen <= 0:
        return Extrapolated(observed, (observed, observed))
    spread = math.exp(CRITICAL * math.sqrt(math.log1p(variance / unseen**2)))
    interval = (observed + unseen / spread, observed + unseen * spread)
    return Extrapolated(observed + unseen, interval)


def extrapolated(counts: Counts, n_images: int, size: int) -> float:
    """Unique matches expected at size > n images, levelling off at `chao1`.

    S + f_0 [1 - (1 - f_1 / (n f_0 + f_1))^(size - n)], f_0 = chao1 - S (Colwell et al. 2012, eq. 9;
    Shen et al. 2003). Reliable to about 2 n. Raises MembenchError for a size below n.
    """
    if size < n_images:
        raise MembenchError(f"{size} of {n_images} images: rarefy, do not extrapolate")
    seen = np.asarray(counts)[np.asarray(counts) > 0]
    f_0 = chao1(counts, n_images).value - len(seen)
    if f_0 <= 0:
        return float(len(seen))
    f_1 = float((seen == 1).sum())
    return len(seen) - f_0 * math.expm1(
        (size - n_images) * math.log1p(-f_1 / (n_images * f_0 + f_1))
    )


def good_toulmin(counts: Counts, n_images: int, size: int) -> Extrapolated:
    """Unique matches expected at size > n images by the smoothed Good-Toulmin estimator.

    With t = size / n - 1: S - sum_i (-t)^i P(L >= i) f_i. Up to t = 1 unsmoothed (Good and Toulmin
    1956). Beyond, L ~ Binomial(m, 2 / (2 + t)), m = floor(log_3(n t^2 / (t - 1)) / 2) (Efron and
    Thisted 1976; parameters: Orlitsky, Suresh and Wu 2016). So training image j adds
    g(k_j) = 1 - (-t)^k_j P(L >= k_j), and the interval +- z sqrt(sum_j g(k_j)^2), of the expected
    number, covers the noise of the k_j (no less than Poisson noise), not the bias. At least S.
    Raises MembenchError for a size below n, and for t > log n, where no estimator is consistent
    (Orlitsky et al. 2016).
    """
    t = size / n_images - 1
    if t < 0:
        raise MembenchError(f"{size} of {n_images} images: rarefy, do not extrapolate")
    if t > max(1.0, math.log(n_images)):
        farthest = int(n_images * (1 + max(1.0, math.log(n_images))))
        raise MembenchError(f"{n_images} images say nothing beyond {farthest}, not of {size}")
    seen = np.asarray(counts)[np.asarray(counts) > 0]
    i, f_i = np.unique(seen, return_counts=True)
    if t <= 1:
        weights = -((-t) ** i.astype(np.float64))
    else:
        m = math.floor(math.log(n_images * t**2 / (t - 1), 3) / 2)
        tail = np.where(i <= m, bdtrc(np.minimum(i, m + 1) - 1, m, 2 / (2 + t)), 0.0)
        log_size = i * math.log(t) + np.log(tail, out=np.full(len(i), -np.inf), where=tail > 0)
        weights = np.where(i % 2 == 1, 1.0, -1.0) * np.exp(log_size)
    value = max(float(len(seen)), float((1 + weights) @ f_i))
    half = CRITICAL * math.sqrt(float((1 + weights) ** 2 @ f_i))
    return Extrapolated(value, (max(0.0, value - half), value + half))
