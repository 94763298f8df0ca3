"""HTML that is escaped by construction: text becomes markup only through `el`."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


_VOID = {"img", "input", "link", "meta"}


def clean(text: object) -> str:
    """Text without control, bidi or other unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. Children are escaped unless they are `Markup`; None and "" are left out.

    `class_` is class, `data_value` is data-value; an attribute of True stands without a value, one
    of None or False is left out.
    """
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        spelt = key.rstrip("_").replace("_", "-")
        parts.append(f" {spelt}" if value is True else f' {spelt}="{html.escape(clean(value))}"')
    start = f"<{name}{''.join(parts)}>"
    return Markup(start if name in _VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(clean(child), quote=False)
            for child in children
            if child is not None
        )
    )


def block(text: str) -> Markup:
    """Preformatted ASCII text (JSON), its line breaks kept."""
    return Markup(f'<pre tabindex="0">{html.escape(text, quote=False)}</pre>')


def data_block(value: Any) -> Markup:
    """JSON for a script to read: a `<` inside cannot end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json">{text}</script>')


@dataclass(frozen=True)
class Cell:
    """What a cell shows and, if that is not it, by what it sorts."""

    shown: object
    value: object = None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A heading. text: aligned left and sorted from A; up: numbers of which the lowest is best."""

    title: str
    text: bool = False
    up: bool = False


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[object]],
    *,
    caption: str,
    sortable: bool = True,
    keys: Sequence[Mapping[str, object]] = (),
) -> Markup:
    """A table in a region that scrolls by itself; the first cell of a row is its heading.

    keys: per row, what filters look at (`data-KEY`).
    """
    heads = [
        el("th", column.title, scope="col", class_="text" if column.text else None,
           data_first="up" if column.up else None)
        for column in columns
    ]  # fmt: skip
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for place, (column, item) in enumerate(zip(columns, row, strict=True)):
            cell = item if isinstance(item, Cell) else Cell(item)
            kinds = " ".join(k for k in ("text" if column.text else "", cell.kind) if k) or None
            name, scope = ("td", None) if place else ("th", "row")
            cells.append(el(name, cell.shown, scope=scope, class_=kinds, data_value=cell.value))
        data = {f"data_{k}": v for k, v in keys[number].items()} if keys else {}
        lines.append(el("tr", *cells, **data))
    found = el(
        "table",
        el("caption", caption, class_="visually-hidden"),
        el("thead", el("tr", *heads)),
        el("tbody", *lines),
        class_="sortable" if sortable else None,
    )
    return el("div", found, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values."""
    return el("dl", *(part for k, v in pairs for part in (el("dt", k), el("dd", v))),
              class_="facts")  # fmt: skip


@cache
def asset(name: str) -> str:
    return (resources.files("membench.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, body: Sequence[object], nav: Sequence[tuple[str, str, bool]], up: str) -> str:
    """A whole page that loads nothing: style and script stand in it, and its policy allows no more.

    nav: (name, address, whether it is this page); up: the way to the site's root, `` or `../`.
    """
    style, script = asset("site.css"), asset("site.js")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    links = [
        el("a", name, href=up + address, aria_current="page" if here else None)
        for name, address, here in nav
    ]
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        Markup(f"<style>{style}</style>"),
    ]
    content = [
        el("a", "Skip to the content", href="#content", class_="skip"),
        el("header", el("div",
            el("a", "membench", href=f"{up}index.html", class_="name"),
            el("nav", *links, aria_label="Boards"),
            el("button", "Theme", type="button", class_="theme", hidden=True),
            class_="wrap"), class_="site"),
        el("main", *body, id="content", class_="wrap", tabindex="-1"),
        el("footer", el("div",
            "Generated by membench from committed records. Percentages are of generated images; "
            "brackets and ranges are 95 % intervals.", class_="wrap")),
        Markup(f"<script>{script}</script>"),
    ]  # fmt: skip
    document = el("html", el("head", *head), el("body", *content), lang="en")
    return f"<!doctype html>\n{document}\n"
