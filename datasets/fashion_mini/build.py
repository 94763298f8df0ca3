"""Draw `fashion_mini` from the files of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence).

    python datasets/fashion_mini/build.py [FOLDER] [--check]

FOLDER holds the four idx files (Debian: package `dataset-fashion-mnist`,
/usr/share/datasets/fashion-mnist, the default). The script shuffles the 70,000 images with seed 0,
brings each to 16 x 16 (Pillow, bicubic with antialiasing) and fills the splits in that order. An
image closer than RMSE 0.02 (pixels in [0, 1]) to one already drawn is passed over, so that no
split holds a near-duplicate of its own or of another split: an absolute rule, independent of any
score that membench computes. It writes, per split, images, labels and source indices, and
`manifest.json` with their hashes. `--check` writes nothing and compares instead.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from membench.hashing import array_hash

SIZE = 16
SPLITS = {"members": 512, "auxiliary": 2048, "heldout": 2048}
NEAR_DUPLICATE_RMSE = 0.02
HERE = Path(__file__).parent


def read_idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path, "rb") as stream:
        return np.frombuffer(stream.read()[header:], np.uint8)


def read_source(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 images [N, 28, 28] and labels [N]: the training part, then the test part."""
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28))
        labels.append(read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8))
    return np.concatenate(images), np.concatenate(labels)


def draw(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """The splits and the number of near-duplicates passed over."""
    images, labels = read_source(folder)
    order = np.random.default_rng(0).permutation(len(images))
    total, limit = sum(SPLITS.values()), (NEAR_DUPLICATE_RMSE * 255) ** 2 * SIZE * SIZE
    kept = np.zeros((total, SIZE * SIZE), np.int32)
    chosen: list[int] = []
    passed_over = 0
    for source in order:
        small = Image.fromarray(images[source]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = np.asarray(small, np.int32).reshape(-1)
        distance = ((kept[: len(chosen)] - pixels) ** 2).sum(1)
        if len(chosen) and distance.min() < limit:
            passed_over += 1
            continue
        kept[len(chosen)] = pixels
        chosen.append(int(source))
        if len(chosen) == total:
            break
    splits, start = {}, 0
    for name, count in SPLITS.items():
        rows = slice(start, start + count)
        index = np.array(chosen[rows], np.int32)
        splits[name] = {
            "images": kept[rows].astype(np.uint8).reshape(-1, SIZE, SIZE, 1),
            "labels": labels[index].astype(np.int16),
            "index": index,
        }
        start += count
    return splits, passed_over


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="/usr/share/datasets/fashion-mnist", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the files here")
    arguments = parser.parse_args()
    splits, passed_over = draw(arguments.folder)
    manifest = {
        "near_duplicates_passed_over": passed_over,
        "splits": {
            name: {"count": len(part["index"])}
            | {f"{kind}_sha256": array_hash(array) for kind, array in part.items()}
            for name, part in splits.items()
        },
    }
    if arguments.check:
        same = json.loads((HERE / "manifest.json").read_text()) == manifest
        print("the same" if same else "DIFFERENT from manifest.json")
        return 0 if same else 1
    for name, part in splits.items():
        for kind, array in part.items():
            np.save(HERE / f"{name}.{kind}.npy", array)
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
