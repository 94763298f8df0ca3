"""SIDE-O: original labels, distilled into a time-dependent classifier."""

from membench.plugins import Lab, Surrogate, extraction


@extraction(title="SIDE-O", paper="Chen et al. 2025, arXiv:2410.02467")
def side_o(lab: Lab) -> Surrogate | None:
    """TDKD with soft pseudo-labels from a classifier trained on the members' own labels."""
    synthetic = lab.synthetic()
    labels = lab.pseudo_labels(synthetic, lab.label_classifier("members"))
    return lab.time_dependent(synthetic, labels)
