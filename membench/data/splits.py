"""Who is a member, who is auxiliary, who is held out: a deterministic draw (version 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.hashing import derive_seed
from membench.specs import SPLITS, Draw


def draw_splits(
    rule: Draw, parts: NDArray[np.integer], names: Sequence[str], persons: NDArray[np.integer]
) -> dict[str, NDArray[np.int32]]:
    """Source rows of every split, int32, each in random order, so that any prefix is a sample.

    parts: [N], the number in `names` of the part of the source that each image belongs to.
    persons: [N], who is on it; read only if the rule deals out persons. Rows of a part (or its
    persons, in the order of their numbers) are permuted by a generator seeded with the rule's seed
    and the part's name, then dealt to the splits with a count, in the order members, auxiliary,
    heldout; the split without a count gets the rest. Raises `MembenchError` where a part has too
    few units, or does not exist.
    """
    shares = {split: getattr(rule, split) for split in SPLITS}
    found: dict[str, NDArray[np.int32]] = {}
    for part in sorted({share.part for share in shares.values()}, key=lambda name: name or ""):
        if part is not None and part not in names:
            there = ", ".join(sorted(names)) or "none"
            raise MembenchError(f"the source has no part {part!r}; it has: {there}")
        mine = {split: share for split, share in shares.items() if share.part == part}
        in_part = (
            np.arange(len(parts)) if part is None else np.flatnonzero(parts == names.index(part))
        )
        generator = np.random.default_rng(derive_seed(rule.seed, "draw", part or ""))
        rows = generator.permutation(in_part)
        units = generator.permutation(np.unique(persons[rows])) if rule.unit == "person" else rows
        start = 0
        for split, share in sorted(mine.items(), key=lambda item: item[1].count is None):
            count = len(units) - start if share.count is None else share.count
            if count < 1 or start + count > len(units):
                where = f" in part {part!r}" if part else ""
                raise MembenchError(
                    f"{split}: the card draws {share.count or 'the rest'} of {len(units)} "
                    f"{rule.unit}s{where}, {len(units) - start} are left"
                )
            chosen = units[start : start + count]
            start += count
            taken = chosen if rule.unit == "image" else rows[np.isin(persons[rows], chosen)]
            found[split] = taken.astype(np.int32)
    return {split: found[split] for split in SPLITS}
