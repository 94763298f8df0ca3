"""A card may be superseded by its next revision, never edited: released ones are held by hash.

`python tests/test_card_hashes.py` adds the hashes of revisions that are not in the list yet.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from membench.hashing import content_hash
from membench.registry import Registry

RELEASED = Path(__file__).with_name("card_hashes.json")


def described() -> dict[str, str]:
    """`NAME, revision N` -> hash of what the card says; comments and layout do not count."""
    found = {}
    for name, entry in Registry().datasets.items():
        content = tomllib.loads(Path(entry.origin).read_text(encoding="utf-8"))
        found[f"{name}, revision {content['revision']}"] = content_hash(content)
    return found


@pytest.mark.parametrize("card", described())
def test_no_released_card_is_edited(card: str) -> None:
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    assert card in released, f"{card} is new: run python {Path(__file__).name} to add its hash"
    assert described()[card] == released[card], (
        f"{card} was edited after its release: raise its revision, and add the new hash"
    )


if __name__ == "__main__":
    old = json.loads(RELEASED.read_text(encoding="utf-8")) if RELEASED.exists() else {}
    merged = {**described(), **old}
    RELEASED.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n", encoding="utf-8")
