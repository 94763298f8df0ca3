"""`membench cost`: parse, call, print. Heavy imports wait inside."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from membench.errors import MembenchError
from membench.options import AsJson


def add_cost(app: typer.Typer) -> None:
    app.command()(cost)


def cost(
    queries: Annotated[int, typer.Option(min=1, help="Generated images.")],
    references: Annotated[int, typer.Option(min=1, help="Training images.")],
    dimensions: Annotated[
        int, typer.Option(min=1, help="Values of a row: 512 of SSCD, 12288 of 64 x 64 x 3 pixels.")
    ],
    stored: Annotated[
        str, typer.Option(help="As what values are kept: float32, float16 or uint8.")
    ] = "float32",
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours of each query.")] = 50,
    directions: Annotated[
        int | None,
        typer.Option(min=1, help="Directions of a sketch [default: none, the full product]"),
    ] = None,
    survivors: Annotated[
        int | None,
        typer.Option(min=1, help="References a query that the directions leave to compare."),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu/--no-cpu", help="Measure this machine's processor too.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say what an exact search will cost: FLOPs, bytes, memory, seconds by hardware.

    By a model (`membench/similarity/cost.py`). Seconds on a GPU follow from its data sheet's peaks:
    a lower bound. Held is what lies in memory if only queries are streamed; the search of membench
    runs on the CPU and streams references too, within 512 MiB.

    Example: `membench cost --queries 1000000 --references 1281167 --dimensions 512`

    Example: `membench cost --queries 50000 --references 50000 --dimensions 3072 --stored uint8
    --directions 256 --survivors 300`
    """
    from membench.similarity import cost as model

    if stored not in model.STORED:
        raise MembenchError(f"--stored {stored}: expected one of {', '.join(model.STORED)}")
    search = model.Search(
        queries,
        references,
        dimensions,
        model.STORED[stored],
        neighbours,
        directions,
        survivors,
    )
    rows = [
        _row(search, hardware, precision)
        for hardware in ([model.H100, model.this_cpu()] if cpu else [model.H100])
        for precision in hardware.products
    ]
    if as_json:
        print(json.dumps({"search": vars(search), "hardware": rows}, indent=1))
    else:
        _show(rows)


def _row(search: Any, hardware: Any, precision: str) -> dict[str, Any]:
    from membench.similarity import cost as model

    found = model.steps(search, hardware, precision)
    whole = model.total(found)
    return {
        "hardware": hardware.name,
        "precision": precision,
        "flops": whole.flops,
        "bytes": whole.bytes,
        "memory_bytes": model.memory(search, hardware, precision),
        "available_bytes": hardware.memory,
        "seconds": {step.name: step.seconds for step in found},
        "total_seconds": whole.seconds,
        "source": hardware.source,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), title="seconds by step")
    table.add_column("hardware", no_wrap=True)
    table.add_column("product", no_wrap=True)
    for name in ("FLOPs", "moved", "held", "filter", "compare", "rest", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        held, seconds = _bytes(row["memory_bytes"]), row["seconds"]
        table.add_row(
            "" if row["hardware"] == before else row["hardware"],
            row["precision"],
            f"{row['flops']:.1e}",
            _bytes(row["bytes"]),
            held if row["memory_bytes"] <= row["available_bytes"] else f"[red]{held}[/red]",
            _short(seconds["filter"]),
            _short(seconds["compare"]),
            _short(sum(seconds[step] for step in ("features", "select", "refine"))),
            f"[bold]{_short(row['total_seconds'])}[/bold]",
        )
        before = row["hardware"]
    console = Console()
    console.print(table)
    for name, source in {row["hardware"]: row["source"] for row in rows}.items():
        console.print(f"{name}: {source}", style="dim", highlight=False)


def _short(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.2g}"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
