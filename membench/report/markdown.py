"""Markdown that GitHub shows as meant, whatever a plugin calls itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tabulate import tabulate

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_KEPT = re.compile(r"(?<=\w)[_.-](?=\w)|[ ,;'\"%/=]")  # `side_c`, `0.3`, `side-a`: nothing to mark


def escaped(text: object, longest: int = 200) -> str:
    """Any text as one line of plain words: no markup, link, HTML or hidden character survives.

    Punctuation is backslashed as CommonMark allows; what HTML needs becomes an entity.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    out = []
    for position, character in enumerate(line):
        if character in _ENTITIES:
            out.append(_ENTITIES[character])
        elif character.isalnum() or not character.isascii() or _KEPT.match(line, position):
            out.append(character)
        else:
            out.append("\\" + character)
    return re.sub(r"(?i)(www)\.", r"\1\\.", "".join(out))  # a bare address would become a link


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A GitHub table whose first `left` columns are aligned left, the others right."""
    alignment = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(
        list(rows), list(headers), tablefmt="pipe", disable_numparse=True, colalign=alignment
    )
