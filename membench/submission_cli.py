"""`membench submit` and `membench verify`: parse, call, print. Heavy imports wait inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from membench.errors import MembenchError
from membench.options import AsJson, Data, Plugins, registry_of


def add_commands(app: typer.Typer) -> None:
    app.command()(submit)
    app.command()(verify)


def submit(
    record: Annotated[Path, typer.Argument(help="A record.json or the folder it lies in.")],
    out: Annotated[Path, typer.Option(help="Empty folder to write.")],
    source: Annotated[
        bool, typer.Option("--source", help="Put the method's source text in too.")
    ] = False,
    plugins: Plugins = None,
) -> None:
    """Bundle a run to hand in: record, matches and hashes, no image; verified before it is packed.

    Example: `membench submit results/runs/fashion_mini/ddpm/side_c-seed0-1234567890ab --out mine`
    """
    from membench.record import RECORD
    from membench.submission import SUBMISSION, pack
    from membench.verify import verify as check

    path = record / RECORD if record.is_dir() else record
    if (path.parent / SUBMISSION).is_file():
        raise MembenchError(f"{path.parent}: a submission already")
    found = check(path)
    written = pack(found, path.parent, out, registry_of(plugins), with_source=source)
    print(f"wrote {written.parent}: {len(list(written.parent.iterdir()))} files, no images")
    for reason in found.get("limited_by") or ():
        print(f"it enters no board: {reason}")
    print(f"check it: membench verify {out}")


def verify(
    record: Annotated[
        Path, typer.Argument(help="A record.json, the folder it lies in, or a submission.")
    ],
    rerun: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many random images again and compare them."),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Where trained targets and classifiers lie.")
    ] = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every number of a record from its saved matches; fail on any difference.

    Says what it checked and what it could not. `--rerun` exits with 1 if an image differs.

    Example: `membench verify results/runs/fashion_mini/ddpm/side_c-seed0-1234567890ab --rerun 8`
    """
    from membench.checks import check
    from membench.record import RECORD

    report = check(record, registry_of(plugins, data), results)
    found = report.to_dict()
    if rerun is not None:
        from membench.rerun import lines
        from membench.rerun import rerun as draw

        if report.cell is None:
            why = report.not_checked.get("identity", "not a run of an extraction method")
            raise MembenchError(f"{record}: --rerun: {why}")
        folder = record if (record / RECORD).is_file() else record.parent
        found["rerun"] = draw(report.cell, folder, rerun)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{record}: every number recomputed, all equal (id {found['id'][:12]})")
        for text in report.checked:
            print(f"checked      {text}")
        for part, why in sorted(report.not_checked.items()):
            print(f"not checked  {part}: {why}")
        if rerun is not None:
            print("\n".join(f"rerun        {text}" for text in lines(found["rerun"])))
    if rerun is not None and not found["rerun"]["equal"]:
        raise typer.Exit(1)
