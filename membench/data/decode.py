"""One image from bytes to pixels, and every way in which that can fail (resize rule, version 1).

Imported by worker processes: nothing heavier than numpy and Pillow.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from membench.errors import MembenchError

MAX_PIXELS = 50_000_000
"""More are refused before they are decoded; the largest of ImageNet has 13 million."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_CONVERTIBLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_STORED, _DEFLATED = 0, 8


class Ref(NamedTuple):
    """Where an image's bytes lie: a file, or a stretch of an archive.

    kind: "file"; "zip": `offset` is that of the entry's local header; "tar": of the bytes
    themselves. size: bytes when unpacked.
    """

    path: str
    kind: str = "file"
    offset: int = 0
    packed: int = 0
    size: int = 0
    method: int = _STORED
    crc: int = 0


Payload = Ref | bytes | np.ndarray


class Rule(NamedTuple):
    """What `decode` needs of the card: shape [H, W, C] and `specs.Resize`; None: no resizing."""

    height: int
    width: int
    channels: int
    resize: bool = True
    source_sizes: tuple[tuple[int, int], ...] = ()
    crop: tuple[int, int] | None = None
    filter: str = "bilinear"
    convert: bool = False

    @property
    def nbytes(self) -> int:
        return self.height * self.width * self.channels


def decode(name: str, payload: Payload, rule: Rule) -> bytes:
    """Pixels of one image, row-major uint8 [H, W, C].

    Raises `MembenchError` naming the image: missing, empty, truncated, not an image, of the wrong
    size or mode, or a decompression bomb.
    """
    if isinstance(payload, np.ndarray):
        image = _from_array(name, payload)
    else:
        image = _open(name, read(name, payload) if isinstance(payload, Ref) else payload)
    width, height = image.size
    if rule.source_sizes and (height, width) not in rule.source_sizes:
        sizes = " or ".join(f"{w} x {h}" for h, w in rule.source_sizes)
        raise MembenchError(f"{name}: {width} x {height} pixels, expected {sizes} (width x height)")
    try:
        image = _channels(name, image, rule)
        image.load()
    except _BROKEN as error:
        raise MembenchError(f"{name}: truncated or damaged image ({error})") from None
    return resized(name, image, rule).tobytes()


def _open(name: str, content: bytes) -> Image.Image:
    if not content:
        raise MembenchError(f"{name}: empty file, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MembenchError(
            f"{name}: decompression bomb: more than {MAX_PIXELS:,} pixels"
        ) from None
    except UnidentifiedImageError:
        raise MembenchError(f"{name}: not an image ({', '.join(FORMATS)})") from None
    except _BROKEN as error:
        raise MembenchError(f"{name}: truncated or damaged image ({error})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise MembenchError(
            f"{name}: decompression bomb: {width} x {height}, more than {MAX_PIXELS:,} pixels"
        )
    return image


def _from_array(name: str, pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise MembenchError(
            f"{name}: {pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, C]"
        )
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if flat.ndim == 3 and flat.shape[-1] not in (3, 4):
        raise MembenchError(f"{name}: {flat.shape[-1]} channels, expected 1, 3 or 4")
    return Image.fromarray(np.ascontiguousarray(flat))


def _channels(name: str, image: Image.Image, rule: Rule) -> Image.Image:
    wanted = "RGB" if rule.channels == 3 else "L"
    if image.mode == wanted:
        return image
    if not rule.convert:
        raise MembenchError(f"{name}: mode {image.mode}, expected {wanted}")
    if image.mode not in _CONVERTIBLE:
        raise MembenchError(f"{name}: mode {image.mode} cannot be brought to {wanted}")
    return image.convert(wanted)


def resized(name: str, image: Image.Image, rule: Rule) -> Image.Image:
    """Version 1: central crop, smaller edge to size, central crop (as torchvision rounds)."""
    if rule.crop is not None:
        image = _centre(name, image, *rule.crop)
    width, height = image.size
    if (height, width) == (rule.height, rule.width):
        return image
    if not rule.resize:
        raise MembenchError(
            f"{name}: {width} x {height} pixels, expected {rule.width} x {rule.height} "
            "(width x height)"
        )
    if rule.height * width >= rule.width * height:  # height is the tighter one
        new = (int(rule.height * width / height), rule.height)
    else:
        new = (rule.width, int(rule.width * height / width))
    image = image.resize((max(new[0], rule.width), max(new[1], rule.height)), _FILTERS[rule.filter])
    return _centre(name, image, rule.height, rule.width)


def _centre(name: str, image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    if image.width < width or image.height < height:
        raise MembenchError(
            f"{name}: {image.width} x {image.height} pixels, too small for a crop of "
            f"{width} x {height}"
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def read(name: str, ref: Ref) -> bytes:
    """The bytes that a reference points to; a zip entry's checksum is checked."""
    try:
        if ref.kind == "file":
            with open(ref.path, "rb", buffering=0) as stream:
                return stream.read()
        file = _archive(ref.path)
        if ref.kind == "tar":
            content = os.pread(file, ref.size, ref.offset)
        else:
            content = _unzip(name, file, ref)
    except FileNotFoundError:
        raise MembenchError(f"{name}: missing ({ref.path})") from None
    except OSError as error:
        raise MembenchError(f"{name}: cannot be read from {ref.path} ({error.strerror})") from None
    if len(content) != ref.size:
        raise MembenchError(f"{name}: truncated: {len(content)} of {ref.size} bytes in {ref.path}")
    return content


def _unzip(name: str, file: int, ref: Ref) -> bytes:
    head = os.pread(file, 30, ref.offset)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise MembenchError(f"{name}: damaged entry in {ref.path}")
    names, extra = struct.unpack("<HH", head[26:30])
    content = os.pread(file, ref.packed, ref.offset + 30 + names + extra)
    if ref.method == _DEFLATED:
        stream = zlib.decompressobj(-15)
        try:
            content = stream.decompress(content, ref.size + 1)
        except zlib.error as error:
            raise MembenchError(f"{name}: damaged entry in {ref.path} ({error})") from None
    if len(content) > ref.size:
        raise MembenchError(f"{name}: decompression bomb: more bytes than {ref.path} announces")
    if len(content) == ref.size and zlib.crc32(content) != ref.crc:
        raise MembenchError(f"{name}: checksum differs from that in {ref.path}")
    return content


@functools.lru_cache(maxsize=16)
def _archive(path: str) -> int:
    return os.open(path, os.O_RDONLY)


class Target(NamedTuple):
    """An array file that is being filled: `offset` is where its pixels begin."""

    path: str
    offset: int


class Job(NamedTuple):
    """A batch of work: items of (target, position, name, payload)."""

    rule: Rule
    targets: tuple[Target, ...]
    items: list[tuple[int, int, str, Payload]]


def run_job(job: Job) -> int:
    """Decode a batch into its array files and return how many images it held."""
    files = [os.open(target.path, os.O_WRONLY) for target in job.targets]
    try:
        for which, position, name, payload in job.items:
            pixels = decode(name, payload, job.rule)
            place = job.targets[which].offset + position * job.rule.nbytes
            written = os.pwrite(files[which], pixels, place)
            while written < len(pixels):
                written += os.pwrite(files[which], pixels[written:], place + written)
    finally:
        for file in files:
            os.close(file)
    return len(job.items)
