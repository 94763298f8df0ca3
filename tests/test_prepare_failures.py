"""What `membench prepare` says of every kind of broken source: one line that names the file.

`python tests/test_prepare_failures.py` prints all the lines.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import sources

from membench.contract import silent
from membench.data.imageset import load_dataset
from membench.data.prepare import prepare
from membench.errors import MembenchError

Files = sources.Files


def zipped(change: Callable[[Files], object]) -> Callable[[Path], Path]:
    """CIFAR-10 class folders in a zip, after one change."""

    def build(folder: Path) -> Path:
        files = sources.cifar10_folders()
        change(files)
        return sources.write_zip(files, folder / "cifar10.zip")

    return build


def put(name: str, content: bytes) -> Callable[[Path], Path]:
    return zipped(lambda files: files.update({name: content}))


BIRD = "train/bird/0002.jpg"


def cut_zip(folder: Path) -> Path:
    path = sources.write_zip(sources.cifar10_folders(), folder / "cifar10.zip")
    path.write_bytes(path.read_bytes()[:5000])
    return path


def flipped_byte(folder: Path) -> Path:
    """A pixel's byte changed inside a stored entry: its checksum no longer fits."""
    path = sources.write_zip(sources.cifar10_folders(kind="PNG"), folder / "cifar10.zip")
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("train/bird/0002.png").header_offset + 30 + 19 + 200
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    return path


def cut_tar(folder: Path) -> Path:
    path = sources.write_tar(sources.cifar10_binary(), folder / "cifar.tar.gz")
    path.write_bytes(path.read_bytes()[:9000])
    return path


def bomb_png(side: int) -> bytes:
    """A PNG that announces side x side pixels in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def bomb_zip(folder: Path) -> Path:
    path = folder / "cifar10.zip"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(BIRD, bytes(300_000_000))
    return path


def link_tar(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar.tar", "w") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return folder / "cifar.tar"


def celeba(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        source = sources.celeba(folder, unpacked=True)
        change(source)
        return source

    return build


def without_line(name: str, number: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        lines = (source / name).read_text().splitlines(keepends=True)
        del lines[number]
        (source / name).write_text("".join(lines))

    return change


def twice(source: Path) -> None:
    path = source / "identity_CelebA.txt"
    text = path.read_text()
    path.write_text(text + text.splitlines(keepends=True)[0])


def double_entry(folder: Path) -> Path:
    path = sources.write_zip(sources.cifar10_folders(), folder / "cifar10.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(BIRD, b"again")
    return path


def grey(folder: Path) -> Path:
    return put(BIRD, sources.encoded(sources.picture(2, 32, 32, "L")))(folder)


def pickled(folder: Path) -> Path:
    return sources.write_folder({"cifar-10-batches-py/data_batch_1": b"\x80\x02."}, folder / "x")


def wrong_checksum(folder: Path) -> Path:
    return sources.write_tar(sources.cifar10_binary(), folder / "cifar-10-binary.tar.gz")


CASES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "source missing": (
        "cifar10",
        lambda p: p / "nowhere",
        "{s}: missing; download",
    ),
    "file of the layout missing": (
        "celeba",
        celeba(lambda s: (s / "identity_CelebA.txt").unlink()),
        "{s}: identity_CelebA.txt is missing",
    ),
    "zip truncated": ("cifar10", cut_zip, "{s}: truncated or not an archive ("),
    "tar.gz truncated": ("cifar10", cut_tar, "{s}: truncated or not an archive ("),
    "image truncated": (
        "cifar10",
        zipped(lambda files: files.update({BIRD: files[BIRD][:300]})),
        f"{BIRD}: truncated or damaged image (",
    ),
    "not an image": ("cifar10", put(BIRD, b"hello"), f"{BIRD}: not an image ("),
    "empty file": ("cifar10", put(BIRD, b""), f"{BIRD}: empty file, not an image"),
    "wrong size": (
        "cifar10",
        put(BIRD, sources.jpeg(2, 33, 32)),
        f"{BIRD}: 33 x 32 pixels, expected 32 x 32 (width x height)",
    ),
    "wrong mode": ("cifar10", grey, f"{BIRD}: mode L, expected RGB"),
    "duplicate id, image": (
        "cifar10",
        put("train/bird/0002.png", sources.encoded(sources.picture(2, 32, 32), "PNG")),
        "{s}: duplicate id: 'train/bird/0002.jpg' and 'train/bird/0002.png'",
    ),
    "duplicate id, archive": (
        "cifar10",
        double_entry,
        "{s}: duplicate id: 'train/bird/0002.jpg' is in the archive twice",
    ),
    "duplicate id, list": (
        "celeba",
        celeba(twice),
        "{s}/identity_CelebA.txt:26: duplicate id: 000001.jpg",
    ),
    "label without image": (
        "celeba",
        celeba(lambda s: (s / "img_align_celeba" / "000007.jpg").unlink()),
        "{s}/identity_CelebA.txt: label without image: 000007.jpg is not in {s}",
    ),
    "image without label": (
        "celeba",
        celeba(without_line("identity_CelebA.txt", 6)),
        "image without label in {s}/identity_CelebA.txt",
    ),
    "count differs": (
        "cifar10",
        zipped(lambda files: files.pop(BIRD)),
        "{s}: 35 images, the card says 36: not the whole data set, or another one",
    ),
    "checksum of the download differs": (
        "official cifar10",
        wrong_checksum,
        "the published file's is c32a1d4ab5d03f1284b67883e8d87530; truncated or another file: "
        "fetch it again from https://www.cs.toronto.edu/",
    ),
    "checksum inside the archive differs": (
        "cifar10",
        flipped_byte,
        "train/bird/0002.png: checksum differs from that in {s}",
    ),
    "path escapes, zip": (
        "cifar10",
        put("../../train/bird/9.jpg", b"x"),
        "{s}: '../../train/bird/9.jpg' escapes its folder; the archive is refused",
    ),
    "link in a tar": (
        "cifar10",
        link_tar,
        "{s}: 'cifar-10-batches-bin/data_batch_1.bin' is a link; refused",
    ),
    "decompression bomb, image": (
        "cifar10",
        put(BIRD, bomb_png(60_000)),
        f"{BIRD}: decompression bomb: more than ",
    ),
    "decompression bomb, archive": (
        "cifar10",
        bomb_zip,
        f"{{s}}: '{BIRD}': decompression bomb: 300,000,000 bytes out of ",
    ),
    "pickled CIFAR-10": (
        "cifar10",
        pickled,
        "{s}: the pickled CIFAR-10 is never read; download cifar-10-binary.tar.gz",
    ),
}


def complaint(case: str, folder: Path) -> tuple[Path, str, str]:
    """The source, the line that should be in the message, and the message."""
    name, build, expected = CASES[case]
    card = sources.card(name.removeprefix("official "), **sources.SMALL[name.split()[-1]])
    if name.startswith("official"):
        from membench.registry import Registry

        card = Registry().card(name.split()[-1])
    source = build(folder / "source")
    with pytest.raises(MembenchError) as caught:
        prepare(card, folder, source, folder / "data", silent, workers=1)
    with pytest.raises(MembenchError, match="is not prepared yet"):
        load_dataset(card, folder / "data" / card.name)
    return source, expected.format(s=source), str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_file(case: str, tmp_path: Path) -> None:
    _, expected, message = complaint(case, tmp_path)
    assert expected in message
    assert "\n" not in message


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "membench-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_seen_before_it_is_full(tiny_disk: Path, tmp_path: Path) -> None:
    card = sources.card("cifar10", **sources.SMALL["cifar10"])
    source = sources.write_zip(sources.cifar10_folders(), tmp_path / "c.zip")
    with pytest.raises(MembenchError) as caught:
        prepare(card, tmp_path, source, tiny_disk, silent, workers=1)
    assert re.fullmatch(
        rf"{tiny_disk}: needs [\d,.]+ MB, [\d,.]+ MB are free; make room or choose another folder "
        "with --data",
        str(caught.value),
    )


def test_a_disk_that_fills_up_meanwhile(
    tiny_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes the room after the check; with it free again, the work goes on."""
    import shutil

    card = sources.card("cifar10", **sources.SMALL["cifar10"])
    source = sources.write_zip(sources.cifar10_folders(), tmp_path / "c.zip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MembenchError, match="no space left on the disk; free some and run again"):
        prepare(card, tmp_path, source, tiny_disk, silent, workers=1)
    assert not (tiny_disk / "cifar10").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    assert prepare(card, tmp_path, source, tiny_disk, silent, workers=1).images == 36


if __name__ == "__main__":
    for name in CASES:
        with tempfile.TemporaryDirectory() as place:
            where, _, said = complaint(name, Path(place))
            print(f"{name}: membench: {said.replace(str(where), 'SOURCE').replace(place, 'DIR')}")
