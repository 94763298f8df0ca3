"""OL-TI: original labels, a time-independent classifier."""

from membench.plugins import Lab, Surrogate, extraction


@extraction(title="OL-TI", paper="Chen et al. 2025, arXiv:2410.02467")
def ol_ti(lab: Lab, *, at: str = "x_t") -> Surrogate | None:
    """A classifier of clean members, used at every noise level although it never saw noise.

    at: where it is evaluated, `x_t` or the predicted `x_0`.
    """
    return lab.time_independent(lab.label_classifier("members"), at)
