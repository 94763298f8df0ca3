"""SIDE-C: clusters of synthetic images in the place of labels."""

from membench.plugins import Lab, Surrogate, extraction


@extraction(title="SIDE-C", paper="Chen et al. 2025, arXiv:2410.02467")
def side_c(lab: Lab, *, n_clusters: int = 100, min_cohesion: float = 0.5) -> Surrogate | None:
    """k-means clusters of synthetic images, the loose ones dropped, learnt as hard labels."""
    synthetic = lab.synthetic()
    labels = lab.clusters(synthetic, n_clusters=n_clusters, min_cohesion=min_cohesion)
    return lab.time_dependent(synthetic, labels)
