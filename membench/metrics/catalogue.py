"""Name, version, formula and source of every metric.

A score that changes needs a higher version: `tests/reference_scores.json` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric's name, version (raised whenever a score changes), formula and source."""

    name: str
    version: int
    formula: str
    source: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "nl2",
            1,
            "d_j / (0.5 mean(d_1 .. d_50)): normalised L2, lower is nearer",
            "Carlini et al. 2023; AMG eq. 8",
        ),
        Metric(
            "sscd",
            1,
            "<f(x), f(y)>, f the unit descriptor: higher is nearer",
            "Pizzi et al. 2022; SIDE",
        ),
        Metric("ams", 1, "mean_i [best score of image i lies in the band]", "SIDE"),
        Metric(
            "ums",
            1,
            "|union_i {j: score of (i, j) lies in the band}| / N_G",
            "SIDE; interval by jackknife (Efron and Stein 1981)",
        ),
        Metric("l2_ratio", 1, "mean_i [d_1 / d_2 < 1/3]", "Yoon et al. 2023; Gu et al. 2023"),
        Metric("top_percent", 1, "mean of the nearest x % of best scores", "SIDE, top-x % table"),
        Metric("mean", 1, "mean of the best scores", "SIDE, mean SSCD"),
        Metric(
            "percentiles",
            1,
            "50, 90, 95, 99, 99.9 % percentiles of similarity",
            "Somepalli et al. 2023",
        ),
        Metric(
            "percentile_95",
            1,
            "95th percentile of similarity of the best matches (5 % quantile of nL2)",
            "Somepalli et al. 2023; SIDE",
        ),
        Metric(
            "curve",
            1,
            "AMS and UMS of all as near as t; nL2: t = 0, 0.01 .. 1.99; SSCD: 1, 0.99 .. 0",
            "membench",
        ),
        Metric(
            "excess",
            1,
            "metric over members - metric over as many held-out images",
            "membench; interval by Bonett and Price 2012",
        ),
        Metric(
            "calibration",
            1,
            "thresholds that 5, 1, 0.2 % of real held-out images pass against the members",
            "membench; order-statistic intervals",
        ),
        Metric(
            "rarefied_ums",
            1,
            "sum_j [1 - C(N_G - k_j, n) / C(N_G, n)] / n: UMS expected at n < N_G images",
            "Hurlbert 1971",
        ),
    )
}
METRIC_VERSIONS = {name: metric.version for name, metric in METRICS.items()}

MODEL_METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "memorization_divergence",
            1,
            "KL(q_e || p_theta), q_e = (1/N) sum_i Normal(x_i, e^2 I): lower is more memorised",
            "SIDE (Chen et al. 2025), eq. 5; by pf_ode, elbo or knn",
        ),
        Metric(
            "pointwise_memorization",
            1,
            "sum_i E_p[log p_theta(x) - log Normal(x; x_i, e I)]: lower is more memorised",
            "SIDE (Chen et al. 2024), eq. 1; by pf_ode or elbo",
        ),
        Metric(
            "semantic_memorization",
            1,
            "sum_i E_p ||z - z_i||^2 in a descriptor space: lower is more memorised",
            "SIDE (Chen et al. 2024), eq. 3",
        ),
        Metric(
            "knn_divergence",
            1,
            "(D/n) sum_i log(nu_k(i) / rho_k(i)) + log(m / (n - 1))",
            "Wang, Kulkarni and Verdu 2009, eq. 5",
        ),
    )
}
"""Of a whole model; they have records of their own (`membench diverge`)."""
MODEL_METRIC_VERSIONS = {name: metric.version for name, metric in MODEL_METRICS.items()}
