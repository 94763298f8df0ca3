"""What `membench list` and `membench info` show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from membench.plugins import Method
from membench.registry import Broken, Registry, unknown
from membench.specs import DataCard

KINDS = ("methods", "datasets", "targets", "metrics")


def rows(registry: Registry, what: str) -> list[dict[str, Any]]:
    """One row per name: kind, name, title, origin; broken plugins carry their reason."""
    if what != "all" and what not in KINDS:
        raise unknown("list", what, KINDS)
    found: list[dict[str, Any]] = []
    if what in ("all", "methods"):
        found += [_method_row(method) for method in registry.all_methods()]
    if what in ("all", "datasets", "targets"):
        for card in registry.all_cards():
            if what in ("all", "datasets"):
                found.append(_card_row(card, registry))
            if what in ("all", "targets") and isinstance(card, DataCard):
                found += _target_rows(card)
    if what in ("all", "metrics"):
        found += _metric_rows()
    return found


def _broken_row(kind: str, plugin: Broken) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": plugin.name,
        "title": "BROKEN: " + plugin.reason,
        "origin": plugin.origin,
        "broken": plugin.reason,
    }


def _method_row(method: Method | Broken) -> dict[str, Any]:
    if isinstance(method, Broken):
        return _broken_row("method", method)
    return {
        "kind": "method",
        "name": method.name,
        "title": method.summary,
        "origin": method.origin,
    }


def _card_row(card: DataCard | Broken, registry: Registry) -> dict[str, Any]:
    if isinstance(card, Broken):
        return _broken_row("dataset", card)
    origin = registry.datasets[card.name].origin
    return {"kind": "dataset", "name": card.name, "title": card.title, "origin": origin}


def _target_rows(card: DataCard) -> list[dict[str, Any]]:
    found = [
        {
            "kind": "target",
            "name": f"{card.name}/{name}",
            "title": recipe.title,
            "origin": "shipped weights" if recipe.weights else f"membench train {card.name}",
        }
        for name, recipe in card.targets.items()
    ]
    oracle = "copies a member at that rate, else a held-out image: the known answer"
    return [
        *found,
        {
            "kind": "target",
            "name": f"{card.name}/oracle:RATE",
            "title": oracle,
            "origin": "closed form",
        },
    ]


def _metric_rows() -> list[dict[str, Any]]:
    from membench.metrics import METRICS

    return [
        {
            "kind": "metric",
            "name": metric.name,
            "title": metric.formula,
            "origin": metric.source,
            "version": metric.version,
        }
        for metric in METRICS.values()
    ]


def describe(registry: Registry, name: str) -> dict[str, Any]:
    """Everything about one name; looks through methods, data sets, targets and metrics."""
    if name in registry.methods:
        method = registry.method(name)
        return {
            "kind": "method",
            "name": name,
            "title": method.title,
            "summary": method.summary,
            "paper": method.paper,
            "version": method.version,
            "parameters": method.parameters,
            "origin": method.origin,
            "source_sha256": method.source_sha256,
        }
    if name in registry.datasets:
        card = registry.card(name).model_dump(mode="json")
        return {"kind": "dataset", "origin": registry.datasets[name].origin} | card
    dataset, slash, target = name.partition("/")
    if slash and dataset in registry.datasets:
        card_ = registry.card(dataset)
        if target.startswith("oracle:"):
            return next(row for row in _target_rows(card_) if "oracle:" in row["name"])
        if target not in card_.targets:
            raise unknown(f"target of {dataset}", target, card_.targets)
        recipe = card_.targets[target].model_dump(mode="json")
        return {"kind": "target", "name": target, "dataset": dataset} | recipe
    metrics = _metric_rows()
    for row in metrics:
        if row["name"] == name:
            return row
    known = [*registry.methods, *registry.datasets, *(row["name"] for row in metrics)]
    raise unknown("method, data set, target or metric", name, known)


def show(found: Iterable[dict[str, Any]], console: Console | None = None) -> None:
    """One table per kind."""
    console = console or Console()
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        by_kind.setdefault(row["kind"], []).append(row)
    for kind, members in by_kind.items():
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column(kind, style="cyan", no_wrap=True)
        table.add_column("what it is", ratio=1)
        for row in members:
            style = "red" if "broken" in row else ""
            table.add_row(escape(row["name"]), escape(row["title"]), style=style)
        console.print(table)
        console.print()


def show_one(found: dict[str, Any], console: Console | None = None) -> None:
    """Fields as `name: value`, nested ones indented."""
    console = console or Console()
    for line in _lines(found, ""):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(value: dict[str, Any], indent: str) -> Iterable[str]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{indent}[cyan]{escape(str(key))}[/]"
            yield from _lines(item, indent + "  ")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
            yield f"{indent}[cyan]{escape(str(key))}[/] {escape(text)}"
