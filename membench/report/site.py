"""`membench leaderboard site`: the boards as a folder of static pages that load nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from membench.errors import MembenchError
from membench.files import read_json, replace_atomically, write_json, writing
from membench.record import RECORD, SHEET
from membench.registry import Registry
from membench.report.html import page
from membench.report.leaderboard import gather
from membench.report.records import Record
from membench.report.site_pages import dataset_page, overview, slug
from membench.report.site_record import record_page

MARK = ".membench-site"
"""Lies in a folder that an earlier call wrote: only such a folder is written over."""


def build_site(
    folder: Path, out: Path, registry: Registry, results: Path | None = None
) -> list[Path]:
    """Write the site of the boards in `folder` to `out`; returns its pages.

    results: where the runs lie whose contact sheets may be shown: only those of the very record,
    and only where the data set's card says `show_images`. Raises `MembenchError` for a folder that
    holds something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise MembenchError(f"{out}: holds something else; name an empty folder or a new one")
    found = gather(folder)
    boards = found.ranked()
    others = [name for name in found.datasets if name not in boards]
    sheets = _sheets(results) if results is not None else {}
    names = [*sorted(boards), *sorted(others)]

    def nav(here: str) -> list[tuple[str, str, bool]]:
        pages = [("Overview", "index.html")]
        pages += [(name, f"data/{slug(name)}.html") for name in names]
        return [(name, address, address == here) for name, address in pages]

    pages = {
        "index.html": page("membench: boards", overview(boards, others), nav("index.html"), "")
    }
    for name in names:
        address = f"data/{slug(name)}.html"
        body = dataset_page(
            name,
            boards.get(name, []),
            calibration=found.calibrations.get(name),
            divergences=found.divergences.get(name, []),
            published=found.published.get(name, []),
        )
        pages[address] = page(f"{name}: membench", body, nav(address), "../")
    records = [record for name in boards for record in found.entering(name)]
    for record in records:
        short = record["id"][:16]
        body = record_page(record, _sheet(record, sheets, registry))
        pages[f"record/{short}.html"] = page(f"Record {short}: membench", body, nav(""), "../")

    with writing(out, "OUT"):
        (out / MARK).write_text("Written by membench leaderboard site.\n", encoding="utf-8")
        for place in ("data", "record"):
            (out / place).mkdir(exist_ok=True)
            for old in (out / place).iterdir():
                if old.suffix in (".html", ".json") and f"{place}/{old.name}" not in pages:
                    old.unlink()
        for address, text in pages.items():
            _write(out / address, text)
        for record in records:
            write_json(out / "record" / f"{record['id'][:16]}.json", record)
    return [out / address for address in pages]


def _write(path: Path, text: str) -> None:
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _sheets(results: Path) -> dict[str, Path]:
    """Contact sheets below a results folder, by the results they show."""
    found = {}
    for path in sorted(results.glob(f"runs/*/*/*/{SHEET}")):
        try:
            found[str(read_json(path.with_name(RECORD))["results_sha256"])] = path
        except (MembenchError, KeyError, TypeError):
            continue  # half a run: no sheet of any record
    return found


def _sheet(record: Record, sheets: Mapping[str, Path], registry: Registry) -> str | None:
    """The contact sheet of a record as a data address, if there is one and it may be shown."""
    path = sheets.get(record["results_sha256"])
    try:
        card = registry.card(str(record["identity"]["dataset"]["name"]))
    except MembenchError:
        return None  # nobody here knows what its owner permits
    if path is None or not card.show_images:
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
