"""What new records would change on the boards: rows, ranks and places, before they are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from membench.errors import MembenchError
from membench.hashing import canonical_json
from membench.report.leaderboard import gather
from membench.report.ranking import Ranked
from membench.report.records import Record, Row, enters_board
from membench.report.summary import standings
from membench.report.table import MAIN_BAND, new_table, with_interval

Boards = Mapping[str, Sequence[Ranked]]


def diff(folder: Path, new: Sequence[Record]) -> dict[str, Any]:
    """The rows that change when records are added to the boards of `folder`, JSON-able.

    {"records": [{"id", "status"}], "rows": [...], "mean_ranks": [...]}. Every row whose numbers or
    rank change is listed with both; rows are followed by their records, since a new one may give
    its namesakes longer labels. Raises `MembenchError` for a limited or failed record.
    """
    for record in new:
        if not enters_board(record):
            why = "; ".join(map(str, record.get("limited_by") or ["limited or failed"]))
            raise MembenchError(f"record {record['id'][:12]} enters no board: {why}")
    old = gather(folder)
    known = {r["id"]: r["results_sha256"] for found in old.records.values() for r in found}
    before, after = old.ranked(), gather(folder, new).ranked()
    places = {
        when: {s.method: round(s.mean_rank, 6) for s in standings(boards)[0]}
        for when, boards in (("before", before), ("after", after))
    }
    changed = [
        {"method": method, **{when: places[when].get(method) for when in places}}
        for method in sorted(places["before"].keys() | places["after"].keys())
        if places["before"].get(method) != places["after"].get(method)
    ]
    return {
        "records": [{"id": r["id"], "status": _status(r, known)} for r in new],
        "rows": list(_changes(before, after)),
        "mean_ranks": changed,
    }


def _status(record: Record, known: Mapping[str, str]) -> str:
    if record["id"] not in known:
        return "new"
    same = known[record["id"]] == record["results_sha256"]
    return "there already" if same else "there already, with other results"


def _changes(before: Boards, after: Boards) -> Iterator[dict[str, Any]]:
    for dataset, found in after.items():
        old = {_key(ranked): ranked for ranked in before.get(dataset, ())}
        for ranked in found:
            then = old.get(_key(ranked))
            for row in ranked.rows:
                now = _facts(ranked, row)
                earlier = _predecessor(then, row)
                was = None if then is None or earlier is None else _facts(then, earlier)
                if was != now:
                    yield {
                        "dataset": dataset,
                        "target": ranked.section.target,
                        "mitigation": ranked.section.mitigation,
                        "change": "new row" if was is None else _kind(was, now),
                        "before": was,
                        "after": now,
                    }


def _key(ranked: Ranked) -> str:
    return canonical_json(ranked.section.identity)


def _predecessor(ranked: Ranked | None, row: Row) -> Row | None:
    mine = {record["id"] for record in row.records}
    for other in ranked.rows if ranked is not None else ():
        if mine & {record["id"] for record in other.records}:
            return other
    return None


def _kind(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if was["records"] != now["records"]:
        return "more runs"
    if was["rank"] != now["rank"]:
        return "rank only"
    return "label or UMS's N_G"


def _facts(ranked: Ranked, row: Row) -> dict[str, Any]:
    def estimate(side: str, metric: str = "ams") -> dict[str, Any] | None:
        found = row.band("calibrated", MAIN_BAND, side, metric)
        if found is None:
            return None
        interval = None if found.interval is None else list(found.interval)
        return {"value": found.value, "interval": interval}

    return {
        "method": row.label,
        "rank": ranked.main.shown(row.label),
        "seeds": row.seeds,
        "ams": estimate("members"),
        "heldout": estimate("heldout"),
        "excess": estimate("excess"),
        "ums": estimate("members", "ums"),
        "records": [record["id"] for record in row.records],
    }


def report(found: Mapping[str, Any]) -> RenderableType:
    """The same for people."""
    parts: list[RenderableType] = [
        Text("\n".join(f"{r['id'][:12]}: {r['status']}" for r in found["records"]))
    ]
    table = new_table(f"Rows that change, calibrated {MAIN_BAND} band, % of images")
    for name in ("target", "method", "change"):
        table.add_column(name)
    for name in ("rank", "excess AMS", "UMS", "seeds"):
        table.add_column(name, justify="right")
    for line in found["rows"]:
        was, now = line["before"], line["after"]
        target = f"{line['dataset']} / {line['target']}"
        if line["mitigation"]:
            target += f" with {line['mitigation']}"
        table.add_row(
            escape(target),
            escape(now["method"]),
            line["change"],
            _arrow(was, now, lambda facts: facts["rank"]),
            _arrow(was, now, lambda facts: _shown(facts["excess"])),
            _arrow(was, now, lambda facts: _shown(facts["ums"])),
            _arrow(was, now, lambda facts: " ".join(map(str, facts["seeds"]))),
        )
    if not found["rows"]:
        return Group(*parts, Text("No row changes."))
    parts += [Text(), table]
    for line in found["mean_ranks"]:
        ends = " -> ".join(
            "–" if line[k] is None else f"{line[k]:.2f}" for k in ("before", "after")
        )
        parts.append(Text(f"mean rank over all targets, {line['method']}: {ends}"))
    return Group(*parts)


def _shown(estimate: Mapping[str, Any] | None) -> str:
    return "–" if estimate is None else with_interval(estimate["value"], estimate["interval"])


def _arrow(was: Any, now: Any, show: Any) -> str:
    after = show(now)
    if was is None or show(was) == after:
        return escape(after)
    return escape(f"{show(was)} -> {after}")
