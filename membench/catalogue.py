"""What `membench list` and `membench info` show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from membench.plugins import Descriptor, Method
from membench.registry import Broken, Registry, Waiting, unknown
from membench.specs import DataCard, TargetRecipe
from membench.specs_pretrained import Pretrained

KINDS = ("methods", "descriptors", "datasets", "targets", "metrics")


def rows(registry: Registry, what: str) -> list[dict[str, Any]]:
    """One row per name: kind, name, title, origin; broken plugins carry their reason."""
    if what != "all" and what not in KINDS:
        raise unknown("list", what, KINDS)
    found: list[dict[str, Any]] = []
    if what in ("all", "methods"):
        found += [_plugin_row("method", method) for method in registry.all_methods()]
    if what in ("all", "descriptors"):
        found += [_plugin_row("descriptor", item) for item in registry.all_descriptors()]
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


def _plugin_row(kind: str, plugin: Method | Descriptor | Broken) -> dict[str, Any]:
    if isinstance(plugin, Broken):
        return _broken_row(kind, plugin)
    return {
        "kind": kind,
        "name": plugin.name,
        "title": plugin.summary,
        "origin": plugin.origin,
    }


def _card_row(card: DataCard | Broken | Waiting, registry: Registry) -> dict[str, Any]:
    if isinstance(card, Broken):
        return _broken_row("dataset", card)
    if isinstance(card, Waiting):
        title = card.reason.partition(": ")[2]
        return {"kind": "dataset", "name": card.name, "title": title, "origin": card.origin}
    origin = registry.datasets[card.name].origin
    return {"kind": "dataset", "name": card.name, "title": card.title, "origin": origin}


def _origin(card: DataCard, target: TargetRecipe | Pretrained) -> str:
    if isinstance(target, Pretrained):
        return f"pretrained: {target.pretrained}"
    return "shipped weights" if target.weights else f"membench train {card.name}"


def _target_rows(card: DataCard) -> list[dict[str, Any]]:
    found = [
        {
            "kind": "target",
            "name": f"{card.name}/{name}",
            "title": target.title,
            "origin": _origin(card, target),
        }
        for name, target in card.targets.items()
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
    from membench.metrics.catalogue import MODEL_METRICS

    return [
        {
            "kind": "metric",
            "name": metric.name,
            "title": metric.formula,
            "origin": metric.source,
            "version": metric.version,
        }
        for metric in [*METRICS.values(), *MODEL_METRICS.values()]
    ]


def describe(registry: Registry, name: str) -> dict[str, Any]:
    """Everything about one name; looks through plugins, data sets, targets and metrics."""
    if name in registry.plugins:
        return _describe_plugin(registry.plugin(name))
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
    known = [*registry.plugins, *registry.datasets, *(row["name"] for row in metrics)]
    raise unknown("plugin, data set, target or metric", name, known)


def _describe_plugin(plugin: Method | Descriptor) -> dict[str, Any]:
    if isinstance(plugin, Method):
        own: dict[str, Any] = {"parameters": plugin.parameters}
    else:
        weights = plugin.weights
        own = {
            "dimensions": plugin.dimensions or "by the size of the input",
            "preset": plugin.preset or "none: images as they are",
            "device": "cpu" if plugin.cpu_only else "any",
        }
        if weights is not None:
            names = ("file", "published", "size", "sha256")
            own["weights"] = {name: getattr(weights, name) for name in names}
    return {
        "kind": "method" if isinstance(plugin, Method) else "descriptor",
        "name": plugin.name,
        "title": plugin.title,
        "summary": plugin.summary,
        "paper": plugin.paper,
        "version": plugin.version,
        **own,
        "origin": plugin.origin,
        "source_sha256": plugin.source_sha256,
    }


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
