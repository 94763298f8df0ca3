"""What the options of several commands are called, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from membench.registry import Registry

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugins", help="Folder with your own methods, descriptors (*.py) and cards (*.toml)."
    ),
]
Results = Annotated[Path, typer.Option(help="Folder of everything that is computed.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of prepared data sets [default: $MEMBENCH_DATA, else data]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def registry_of(plugins: list[Path] | None, data: Path | None = None) -> Registry:
    """The registry that --plugins and --data ask for."""
    from membench.registry import Registry

    return Registry(plugins or (), data)
