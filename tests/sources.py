"""Small sources in the official layouts, of images made here, and cards with counts to match."""

from __future__ import annotations

import io
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from membench.registry import Registry
from membench.specs import DataCard

Files = dict[str, bytes]
"""Name in the source -> content."""


def picture(number: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth image that no other number gives."""
    rng = np.random.default_rng([number, width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return stream.getvalue()


def jpeg(number: int, width: int, height: int) -> bytes:
    return encoded(picture(number, width, height))


def write_folder(files: Files, folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(files: Files, path: Path, *, packed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(files: Files, path: Path) -> Path:
    """In the reverse of the alphabet: the order in a tar must not matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w") as archive:
        for name in sorted(files, reverse=True):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    return path


CELEBA_PARTS = {"train": 14, "val": 5, "test": 6}


def celeba_lists() -> dict[str, str]:
    """The three lists of 25 images; persons 101 to 107 train, others elsewhere."""
    total = sum(CELEBA_PARTS.values())
    part = np.repeat([0, 1, 2], list(CELEBA_PARTS.values()))
    names = [f"{i:06d}.jpg" for i in range(1, total + 1)]
    person = [101 + i % 7 + 20 * part[i] for i in range(total)]
    signs = [" ".join("1" if (i >> k) & 1 else "-1" for k in range(4)) for i in range(total)]
    return {
        "identity_CelebA.txt": "".join(f"{n} {p}\n" for n, p in zip(names, person, strict=True)),
        "list_eval_partition.txt": "".join(f"{n} {p}\n" for n, p in zip(names, part, strict=True)),
        "list_attr_celeba.txt": f"{total}\nMale Bald Smiling Young \n"
        + "".join(f"{n}  {s}\n" for n, s in zip(names, signs, strict=True)),
    }


def celeba(folder: Path, *, unpacked: bool = False, official_tree: bool = False) -> Path:
    files = {f"img_align_celeba/{i:06d}.jpg": jpeg(i, 178, 218) for i in range(1, 26)}
    images = folder / ("Img" if official_tree else "")
    if unpacked:
        write_folder(files, images)
    else:
        write_zip(files, images / "img_align_celeba.zip", packed=True)
    for name, text in celeba_lists().items():
        place = ("Eval" if "eval" in name else "Anno") if official_tree else ""
        (folder / place).mkdir(exist_ok=True)
        (folder / place / name).write_text(text)
    return folder


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10_binary(per_file: int = 6) -> Files:
    """Records in the six files of the binary version."""
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for number, name in enumerate(names):
        records = b""
        for i in range(per_file):
            pixels = np.asarray(picture(number * per_file + i, 32, 32))
            records += bytes([(number + i) % 10]) + pixels.transpose(2, 0, 1).tobytes()
        files[f"cifar-10-batches-bin/{name}"] = records
    return files


def cifar10_folders(count: int = 36, kind: str = "JPEG") -> Files:
    """`train|test/CLASS/NNNN.jpg`, five in six for training."""
    suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
    return {
        f"{'train' if i % 6 else 'test'}/{CIFAR[i % 10]}/{i:04d}.{suffix}": encoded(
            picture(i, 32, 32), kind
        )
        for i in range(count)
    }


def imagenet(*, imagenette: bool) -> Files:
    """30 training and 10 validation images of the ten classes, and one of another class."""
    folders = card("imagenet").preparation.folders  # type: ignore[union-attr]
    files: Files = {}
    for i in range(40):
        wnid, validation = folders[i % 10], i >= 30
        name = f"ILSVRC2012_val_{i:08d}.JPEG" if validation else f"{wnid}_{i}.JPEG"
        content = jpeg(i, 300 + i, 280)
        if i == 7:
            content = encoded(picture(i, 300, 280, "L"))
        if imagenette:  # shuffles what ImageNet trained on and what it did not
            files[f"imagenette2/{'val' if i % 3 else 'train'}/{wnid}/{name}"] = content
        else:
            part = "val" if validation else f"train/{wnid}"
            files[f"ILSVRC/Data/CLS-LOC/{part}/{name}"] = content
    if not imagenette:
        files["ILSVRC/Data/CLS-LOC/train/n09999999/n09999999_1.JPEG"] = jpeg(99, 300, 300)
        lines = "".join(
            f"ILSVRC2012_val_{i:08d},{folders[i % 10]} 1 2 3 4\n" for i in range(30, 40)
        )
        files["LOC_val_solution.csv"] = f"ImageId,PredictionString\n{lines}".encode()
    return files


LFW_PEOPLE = {"Al_Gore": 3, "Al_Gore-Lee": 2, "Al_Pacino": 1, "Bo": 4, "Cy": 2, "Di_Wu": 3}


def lfw(*, flat: bool) -> Files:
    files: Files = {}
    number = 0
    for person, count in LFW_PEOPLE.items():
        for i in range(1, count + 1):
            number += 1
            name = f"{person}_{i:04d}.jpg"
            size = 150 if flat else 250
            image = picture(number, 150, 150)
            if not flat:  # the same picture with a frame, as the card's crop has it
                framed = Image.new("RGB", (250, 250))
                framed.paste(image, (50, 50))
                image = framed
            assert image.size == (size, size)
            files[name if flat else f"lfw/{person}/{name}"] = encoded(image, "PNG")
    return files


def lfw_list(folder: Path) -> Path:
    """A card's folder with the list of all these images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        f"{person},{' '.join(str(i) for i in range(1, count + 1))}\n"
        for person, count in LFW_PEOPLE.items()
    )
    (folder / "images.csv").write_text(lines)
    return folder


def celebahq_fi() -> Files:
    """Eight persons, 20 images, in train and test."""
    root = "CelebA_HQ_facial_identity_dataset"
    return {
        f"{root}/{'test' if i % 4 == 3 else 'train'}/{100 + i % 8}/{i}.jpg": jpeg(i, 256, 256)
        for i in range(20)
    }


def card(name: str, **changes: Any) -> DataCard:
    """A card of the benchmark with `changes` in its preparation, and without pinned numbers.

    Keys are paths: `draw__members__count=5`.
    """
    content = tomllib.loads(Path(Registry().datasets[name].origin).read_text())
    content["splits"] = {"members": {}, "auxiliary": {}, "heldout": {}}
    for download in content["preparation"]["downloads"]:
        for kind in ("md5", "sha256"):
            download.pop(kind, None)
    for path, value in changes.items():
        *folders, last = path.split("__")
        place: dict[str, Any] = content["preparation"]
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return DataCard.model_validate(content)


SMALL: Mapping[str, dict[str, Any]] = {
    "cifar10": {"count": 36, "draw__auxiliary__count": 2, "draw__heldout__count": 4},
    "cifar10_mini": {
        "count": 36,
        "draw__members__count": 8,
        "draw__auxiliary__count": 10,
        "draw__heldout__count": 6,
    },
    "celeba": {"count": 25},
    "celeba25k": {"count": 25, "draw__members__count": 9},
    "celebahq_fi": {"count": 20, "draw__auxiliary__count": 2, "draw__heldout__count": 2},
    "imagenet": {"count": 40, "draw__auxiliary__count": 4},
    "lfw": {"count": 15, "draw__auxiliary__count": 1, "draw__heldout__count": 2},
}
"""What makes each card fit the sources above."""
