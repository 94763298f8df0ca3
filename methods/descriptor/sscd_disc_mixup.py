"""SSCD as published: the official TorchScript file, which the user supplies."""

from membench.plugins import Describe, Setup, Weights, descriptor
from membench.similarity.runtimes import torchscript

WEIGHTS = Weights(
    file="sscd_disc_mixup.torchscript.pt",
    published="https://github.com/facebookresearch/sscd-copy-detection",
    sha256="9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56",
    size=98_791_638,
)


@descriptor(
    title="SSCD disc_mixup",
    paper="Pizzi et al. 2022, arXiv:2202.10261",
    dimensions=512,
    weights=WEIGHTS,
    preset="official_320",
)
def sscd_disc_mixup(setup: Setup) -> Describe:
    """The copy-detection descriptor of the papers: ResNet-50, float32."""
    return torchscript(setup)
