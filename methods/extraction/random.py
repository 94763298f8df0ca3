"""Random: sample the target and hope (no condition, no classifier)."""

from membench.plugins import Lab, Surrogate, extraction


@extraction(title="Random", paper="Carlini et al. 2023, arXiv:2301.13188")
def random(lab: Lab) -> Surrogate | None:
    """Plain samples of the target; the baseline of every other method."""
    return None
