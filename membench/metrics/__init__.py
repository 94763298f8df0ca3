"""Metrics: pure functions on arrays, each with a name, a version, a formula and a source."""

from membench.metrics.calibration import Calibration, Threshold, calibrate
from membench.metrics.catalogue import METRIC_VERSIONS, METRICS, Metric
from membench.metrics.invariants import check_invariants
from membench.metrics.scores import average, score

__all__ = [
    "METRICS",
    "METRIC_VERSIONS",
    "Calibration",
    "Metric",
    "Threshold",
    "average",
    "calibrate",
    "check_invariants",
    "score",
]
