"""SIDE-A: auxiliary labels, distilled into a time-dependent classifier."""

from membench.plugins import Lab, Surrogate, extraction


@extraction(title="SIDE-A", paper="Chen et al. 2025, arXiv:2410.02467")
def side_a(lab: Lab) -> Surrogate | None:
    """TDKD with soft pseudo-labels from a classifier trained on auxiliary images."""
    synthetic = lab.synthetic()
    labels = lab.pseudo_labels(synthetic, lab.label_classifier("auxiliary"))
    return lab.time_dependent(synthetic, labels)
