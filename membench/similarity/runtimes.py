"""What runs a network that came as a file: TorchScript and ONNX, as functions of images.

torch is imported when a network is loaded: a list of descriptors needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from membench.errors import MembenchError

if TYPE_CHECKING:
    from membench.plugins import Describe, Setup


def torchscript(setup: Setup) -> Describe:
    """A TorchScript network of normalised images float32 [B, 3, H, W] -> [B, D]."""
    import torch

    assert setup.weights is not None
    try:
        network = torch.jit.load(str(setup.weights), map_location=setup.device).eval()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise MembenchError(f"{setup.weights}: not a TorchScript file ({reason})") from None

    @torch.inference_mode()
    def describe(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(setup.preprocessing.normalise(images)).to(setup.device)
        # the profiling executor compiles anew after its first runs, and rounds differently then
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return network(x).float().cpu().numpy()

    return describe


def onnx(setup: Setup) -> Describe:
    """An ONNX network of pixels uint8 [B, H, W, 3] that applies ImageNet's normalisation itself.

    It runs on the CPU with torch's number of threads. onnxruntime's int8 kernels may saturate on
    x86 processors without VNNI (its documentation on quantisation), so int8 scores of two kinds of
    processor need not agree.
    """
    import torch

    try:
        import onnxruntime
    except ImportError:
        raise MembenchError(
            f"{setup.weights}: needs onnxruntime; pip install 'membench[sscd-onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(setup.weights), options, providers=["CPUExecutionProvider"]
    )
    (pixels,), (embedding,) = session.get_inputs(), session.get_outputs()

    def describe(images: np.ndarray) -> np.ndarray:
        inputs = {pixels.name: setup.preprocessing.as_imagenet(images)}
        found: np.ndarray = session.run([embedding.name], inputs)[0]
        return found

    return describe
