"""`membench targets ...`: parse, call, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from membench.registry import Registry

targets_app = typer.Typer(
    no_args_is_help=True, help="Models to attack: look at them, convert them."
)

Results = Annotated[Path, typer.Option(help="Folder of everything that is computed.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugins", help="Folder with your own data cards (*.toml)."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of prepared data sets [default: $MEMBENCH_DATA, else data]"
    ),
]


def _registry(plugins: list[Path] | None, data: Path | None = None) -> Registry:
    from membench.registry import Registry

    return Registry(plugins or (), data)


@targets_app.command()
def show(
    target: Annotated[
        str,
        typer.Argument(help="A diffusers folder, hub id (ID@COMMIT), TOML file, DATASET/TARGET."),
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Does it fit this data set? [default: which ones does it]")
    ] = None,
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Read a model and tell its network, size, prediction, schedule, hash, and what it fits.

    Example: `membench targets show path/to/pipeline --dataset cifar10`
    """
    registry = _registry(plugins, data)
    from membench import catalogue, inspecting

    found = inspecting.show(registry, target, results, dataset)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        catalogue.show_one(found)


@targets_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of tensors written by torch.save.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    sha256: Annotated[
        str | None, typer.Option(help="SHA-256 of the checkpoint, as its publisher says.")
    ] = None,
) -> None:
    """Turn pickled weights into safetensors, with the same names of tensors.

    Nothing but tensors is unpickled, and nothing at all before the hash is compared.

    Example: `membench targets convert model.pt --sha256 HASH --out model.safetensors`
    """
    from membench import inspecting

    print(f"{out}: SHA-256 {inspecting.convert(source, sha256, out)}")


@targets_app.command()
def export(
    target: Annotated[str, typer.Argument(help="DATASET/TARGET that membench trained.")],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
) -> None:
    """Write a target as a diffusers pipeline folder, for use elsewhere.

    Example: `membench targets export fashion_mini/ddpm --out ddpm`
    """
    registry = _registry(plugins, data)
    from membench import inspecting

    folder = inspecting.export(registry, target, results, out)
    print(f'{folder}: diffusers.DDPMPipeline.from_pretrained("{folder}") reads it')
