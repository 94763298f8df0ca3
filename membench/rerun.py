"""Draw some images of a record again, from their seeds, and compare: what no hash can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.diffusion.threads import torch_threads
from membench.hashing import array_hash
from membench.lab import draw_labels
from membench.matching import FACTS, Facts
from membench.record import NULL
from membench.run import Cell
from membench.similarity.matches import Matches
from membench.submission import PIXELS, row_hashes

SIDES = ("members", "heldout")


def rerun(cell: Cell, folder: Path, count: int, entropy: int | None = None) -> dict[str, Any]:
    """`count` random images of the cell, drawn again and compared with what `folder` keeps.

    Whole batches of the grid are drawn, since an image depends on its batch; a guided method's
    classifier is trained first unless the store has it. entropy: of the choice, the system's if
    None, so that nobody can know which images will be looked at. Returns, JSON-able: which rows,
    the share whose pixels are equal and the largest difference (where the images or their hashes
    are here), the same of neighbours and distances, and whether the null of real images, computed
    again, is the saved one.
    """
    spec = cell.spec
    scales, size = list(cell.images), spec.sampling.batch_size
    total = spec.images_per_scale * len(scales)
    picks = np.random.default_rng(entropy).choice(total, min(count, total), replace=False)
    rows: dict[float, list[int]] = defaultdict(list)
    for pick in sorted(picks.tolist()):
        rows[scales[pick // spec.images_per_scale]].append(pick % spec.images_per_scale)
    pixels, near, batches = _Tally(), _Tally(), 0
    null = _same_null(cell, folder)
    for scale, chosen in rows.items():
        drawn = _draw(cell, scale, chosen)
        batches += len({row // size for row in chosen})
        _compare_pixels(folder, scale, chosen, drawn, pixels)
        saved = Matches.load(folder / f"matches-{scale:g}.npz")
        artifact = cell.lab.matcher.matches_of(drawn, array_hash(drawn), title="matches again")
        _compare_matches(saved, cell.lab.store.get(artifact), chosen, near)
    return {
        "images": len(picks),
        "of": total,
        "batches": batches,
        "rows": {f"{scale:g}": chosen for scale, chosen in rows.items()},
        "pixels": pixels.to_dict(),
        "neighbours": near.to_dict(),
        "null": null,
        "equal": pixels.all_equal and near.all_equal and null,
    }


def _same_null(cell: Cell, folder: Path) -> bool:
    """Whether near-duplicates and real held-out images' matches come out as saved."""
    store = cell.lab.store
    facts, null = store.get(cell.facts), store.get(cell.null)
    saved = Matches.load(folder / NULL)
    mine, theirs = vars(facts), vars(Facts.load(folder / FACTS))
    return (
        all(np.array_equal(mine[name], theirs[name]) for name in mine)
        and np.array_equal(null.members.listed.index, saved.members.listed.index)
        and np.array_equal(null.members.listed.distance, saved.members.listed.distance)
    )


class _Tally:
    """How many of the images compared were equal, and the largest difference of any."""

    def __init__(self) -> None:
        self.equal: list[bool] = []
        self.largest: float | None = None

    def add(self, equal: NDArray[np.bool_], largest: float | None = None) -> None:
        self.equal += equal.tolist()
        if largest is not None:
            self.largest = max(largest, self.largest or 0)

    @property
    def all_equal(self) -> bool:
        return all(self.equal)

    def to_dict(self) -> dict[str, Any]:
        share = sum(self.equal) / len(self.equal) if self.equal else None
        return {"compared": len(self.equal), "equal": share, "largest_difference": self.largest}


@torch_threads(1)
def _draw(cell: Cell, scale: float, rows: list[int]) -> NDArray[np.uint8]:
    """The images of some rows, uint8 [n, H, W, C]; on one CPU thread, as a run draws them."""
    lab, spec = cell.lab, cell.spec
    surrogate = cell.surrogate if scale != 0 else None
    condition = None if surrogate is None else lab.store.get(surrogate.classifier)
    label = spec.label if surrogate else None
    labels = draw_labels(spec.seed, spec.images_per_scale, condition, label)
    size, drawn = spec.sampling.batch_size, []
    with lab.progress(f"images at {scale:g} again", len(rows), "images") as advance:
        for batch in sorted({row // size for row in rows}):
            span = range(batch * size, min((batch + 1) * size, spec.images_per_scale))
            images, _ = lab.sample(
                span, labels[span.start : span.stop], surrogate, condition, scale, spec.seed,
                spec.sampling,
            )  # fmt: skip
            mine = [row for row in rows if row in span]
            drawn.append(images[[row - span.start for row in mine]])
            advance(len(mine))
    return np.concatenate(drawn)


def _compare_pixels(
    folder: Path, scale: float, rows: list[int], drawn: NDArray[np.uint8], tally: _Tally
) -> None:
    """Against the images where they are, else against their hashes, else not at all."""
    name = f"images-{scale:g}"
    if (folder / f"{name}.npy").is_file():
        saved = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)[rows]
        gap = np.abs(saved.astype(np.int16) - drawn).reshape(len(rows), -1).max(axis=1)
        tally.add(gap == 0, int(gap.max()))
    elif (folder / PIXELS).is_file():
        with np.load(folder / PIXELS, allow_pickle=False) as file:
            hashes = file[name][rows]
        tally.add((hashes == row_hashes(drawn)).all(axis=1))


def _compare_matches(saved: Matches, again: Matches, rows: list[int], tally: _Tally) -> None:
    """The listed neighbours of both sides, in order, and their distances."""
    equal, largest = np.ones(len(rows), np.bool_), 0.0
    for side in SIDES:
        old, new = saved.side(side).listed, again.side(side).listed
        gap = np.abs(old.distance[rows].astype(np.float64) - new.distance)
        equal &= (old.index[rows] == new.index).all(axis=1) & (gap == 0).all(axis=1)
        largest = max(largest, float(gap.max()))
    tally.add(equal, largest)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    head = f"drew {found['images']} of {found['of']:,} images again, in {found['batches']} batches"
    said = []
    for key, unit in (("pixels", " of 255"), ("neighbours", "")):
        part = found[key]
        if part["equal"] is None:
            said.append(f"{key}: neither the images nor their hashes are here")
            continue
        text = f"{key}: {100 * part['equal']:.1f} % of {part['compared']} images equal"
        if part["largest_difference"] is not None:
            text += f", largest difference {part['largest_difference']:g}{unit}"
        said.append(text)
    said.append("null of real held-out images: " + ("equal" if found["null"] else "NOT equal"))
    if not found["equal"]:
        said.append(
            "not equal: another kind of machine rounds differently; beyond a few levels of 255 or "
            "in most nearest neighbours it does not"
        )
    return [head, *said]
