"""`membench targets ...`: parse, call, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from membench.options import AsJson, Data, Plugins, Results, registry_of

targets_app = typer.Typer(
    no_args_is_help=True, help="Models to attack: look at them, convert them."
)


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
    as_json: AsJson = False,
) -> None:
    """Read a model and tell its network, size, prediction, schedule, hash, and what it fits.

    Example: `membench targets show path/to/pipeline --dataset cifar10`
    """
    registry = registry_of(plugins, data)
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
    registry = registry_of(plugins, data)
    from membench import inspecting

    folder = inspecting.export(registry, target, results, out)
    print(f'{folder}: diffusers.DDPMPipeline.from_pretrained("{folder}") reads it')
