"""What every reader of a source offers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from membench.data.decode import Payload


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: its name there, its part, its label and who is on it, if known."""

    name: str
    part: str = "all"
    label: str | None = None
    person: str | None = None


class Reader:
    """A source in a fixed order: `items` lists it, `payloads` streams (row, name, payload)."""

    source: Path

    def items(self) -> Iterator[Item]:
        raise NotImplementedError

    def payloads(self) -> Iterator[tuple[int, str, Payload]]:
        """Rows are those of `items`; they may come in another order."""
        raise NotImplementedError
