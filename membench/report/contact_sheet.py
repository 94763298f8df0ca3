"""The best matches of a run beside their training images, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from membench.similarity.matches import Matches
from membench.similarity.measures import NL2

Pixels = NDArray[np.uint8]

_TILE = 112  # an image's shorter side on the sheet, at least
_LARGEST = 192  # images above this are shrunk
_MARGIN, _INNER, _GAP = 28, 4, 22
_PAPER, _INK, _QUIET, _RULE = "#ffffff", "#1b1f24", "#6a737d", "#d0d7de"


@dataclass(frozen=True)
class Pair:
    """A generated image [H, W, C] and the training image nearest to it."""

    generated: Pixels
    member: Pixels
    score: float
    distance: float
    scale: float
    row: int
    index: int
    symbol: str = NL2.symbol


def best_pairs(
    images: Mapping[float, Pixels],
    matches: Mapping[float, Matches],
    members: Pixels,
    count: int = 24,
) -> list[Pair]:
    """The `count` best matches over all guidance scales, nearest first.

    Only the best image of each training image is kept: otherwise a handful of training images
    that come back often would fill the sheet.

    images: uint8 [N_G, H, W, C] by guidance scale; members: uint8 [N, H, W, C].
    """
    measure = next(iter(matches.values())).measure
    far = np.concatenate([measure.far(found.scores()[:, 0]) for found in matches.values()])
    scale = np.repeat([float(scale) for scale in matches], [len(m) for m in matches.values()])
    row = np.concatenate([np.arange(len(found)) for found in matches.values()])
    chosen: dict[int, Pair] = {}
    for i in np.lexsort((row, scale, far)):
        of_scale, of_row = float(scale[i]), int(row[i])
        listed = matches[of_scale].members.listed
        index = int(listed.index[of_row, 0])
        if index not in chosen:
            chosen[index] = Pair(
                np.asarray(images[of_scale][of_row]), np.asarray(members[index]),
                float(measure.far(far[i])), float(listed.distance[of_row, 0]), of_scale, of_row,
                index, measure.symbol,
            )  # fmt: skip
        if len(chosen) == count:
            break
    return list(chosen.values())


def draw(pairs: Sequence[Pair], *, title: str, note: str, columns: int = 6) -> Image.Image:
    """A sheet of pairs, row by row: generated on the left, training image on the right."""
    if not pairs:
        raise ValueError("a contact sheet needs at least one pair")
    title_font, text_font, small_font = (ImageFont.load_default(size) for size in (24, 14, 13))
    width, height = _enlarged(pairs[0].generated).size
    cell_width, caption = 2 * width + _INNER, 38
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)

    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    grid_width = columns * cell_width + (columns - 1) * _GAP
    lines = _wrapped(measure, note, text_font, max(grid_width, 640))
    text_width = max(
        measure.textlength(title, title_font),
        *(measure.textlength(line, text_font) for line in lines),
    )
    head = _MARGIN + 34 + 20 * len(lines) + 16
    sheet = Image.new(
        "RGB",
        (
            round(max(grid_width, text_width)) + 2 * _MARGIN,
            head + rows * (height + caption) + (rows - 1) * _GAP + _MARGIN,
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 6), title, _INK, title_font)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 30 + 20 * number), line, _QUIET, text_font)

    for position, pair in enumerate(pairs):
        left = _MARGIN + position % columns * (cell_width + _GAP)
        top = head + position // columns * (height + caption + _GAP)
        for offset, pixels in ((0, pair.generated), (width + _INNER, pair.member)):
            sheet.paste(_enlarged(pixels), (left + offset, top))
            corner = (left + offset + width - 1, top + height - 1)
            pen.rectangle(((left + offset, top), corner), outline=_RULE)
        below = top + height + 4
        pen.text((left, below), f"{pair.symbol} {pair.score:.3f}", _INK, text_font)
        right = left + cell_width
        pen.text((right, below), f"d = {pair.distance:.3f}", _QUIET, text_font, anchor="ra")
        pen.text((left, below + 18), f"scale {pair.scale:g}, no. {pair.row}", _QUIET, small_font)
        pen.text((right, below + 18), f"training {pair.index}", _QUIET, small_font, anchor="ra")
    return sheet


def contact_sheet(
    path: Path,
    images: Mapping[float, Pixels],
    matches: Mapping[float, Matches],
    members: Pixels,
    *,
    title: str,
    count: int = 24,
) -> None:
    """Write the best matches of a run beside their training images as a PNG."""
    pairs = best_pairs(images, matches, members, count)
    total = sum(len(part) for part in images.values())
    nearer = "lower" if next(iter(matches.values())).measure.sign == 1 else "higher"
    note = (
        f"Left: generated; right: the training image nearest to it. The {len(pairs)} closest of "
        f"{total:,} images by {pairs[0].symbol} ({nearer} is closer), one per training image: the "
        "best cases, not typical ones."
    )
    draw(pairs, title=title, note=note).save(path, format="PNG", optimize=True)


def _enlarged(pixels: Pixels) -> Image.Image:
    """[H, W, C] to at least the tile, pixel by pixel; large images are shrunk."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        return image
    factor = -(-_TILE // min(image.size))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def _wrapped(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
