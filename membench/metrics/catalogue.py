"""Name, version, formula and source of every metric.

A score that changes needs a higher version: `tests/reference_scores.json` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric's name, version (raised whenever a score changes), formula and source.

    scored: whether it is part of a record's scores, and so its version of a record's identity.
    Others are computed from records afterwards.
    """

    name: str
    version: int
    formula: str
    source: str
    scored: bool = True


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
        Metric(
            "rarefied_variance",
            1,
            "Var over subsets of n images of their unique matches: exact, conditional on the N_G",
            "Heck, van Belle and Simberloff 1975, for images that may match several",
            scored=False,
        ),
        Metric(
            "ums_with_replacement",
            1,
            "sum_j [1 - (1 - k_j / N_G)^n] / n: the papers' expectation of UMS, biased downwards",
            "SIDE",
            scored=False,
        ),
        Metric(
            "chao1",
            1,
            "S + (N_G - 1) / N_G f_1^2 / (2 f_2): unique matches in the end, a lower bound",
            "Chao 1984, 1987; incidence form (Chao2); extrapolation",
            scored=False,
        ),
        Metric(
            "extrapolated_ums",
            1,
            "(S + f_0 [1 - (1 - f_1 / (N_G f_0 + f_1))^(n - N_G)]) / n, f_0 = chao1 - S, n > N_G",
            "Shen et al. 2003; Colwell et al. 2012, eq. 9; extrapolation",
            scored=False,
        ),
        Metric(
            "good_toulmin",
            1,
            "S - sum_i (-t)^i P(L >= i) f_i, t = n / N_G - 1; L binomial where t > 1",
            "Good and Toulmin 1956; Orlitsky et al. 2016; extrapolation",
            scored=False,
        ),
        Metric(
            "ams_difference",
            1,
            "AMS of one method - AMS of another, same seeds; p over all signs of the pairs",
            "McNemar 1947 for one scale; interval by Bonett and Price 2012 or bootstrap; Holm 1979",
            scored=False,
        ),
        Metric(
            "ums_difference",
            1,
            "UMS of one method - UMS of another, same seeds; jackknife over images",
            "Efron and Stein 1981; Holm 1979",
            scored=False,
        ),
        Metric(
            "group_extraction",
            1,
            "extracted members of a class or cluster / its members",
            "membench; interval by Clopper and Pearson 1934",
            scored=False,
        ),
        Metric(
            "linear_fit",
            1,
            "least-squares line of AMS or UMS on the number of classes",
            "SIDE, Table 2; errors by Student's t",
            scored=False,
        ),
    )
}
METRIC_VERSIONS = {name: metric.version for name, metric in METRICS.items() if metric.scored}
"""Of the metrics in a record's scores."""
DERIVED_VERSIONS = {name: m.version for name, m in METRICS.items() if not m.scored}
"""Of the metrics computed from records afterwards."""

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
