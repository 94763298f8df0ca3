"""The command line: parse, call, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membench import __version__
from membench.cost_cli import add_cost
from membench.errors import MembenchError
from membench.experiments.cli import experiment_app
from membench.options import AsJson, Data, Device, Plugins, Results, registry_of
from membench.submission_cli import add_commands
from membench.sweep.cli import register
from membench.targets_cli import targets_app

if TYPE_CHECKING:
    pass

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="How much of its training set can a diffusion model be made to give back?",
    context_settings={"help_option_names": ["-h", "--help"]},
)
board_app = typer.Typer(no_args_is_help=True, help="Boards made from saved records.")
new_app = typer.Typer(no_args_is_help=True, help="Write a working template.")
app.add_typer(board_app, name="leaderboard")
app.add_typer(new_app, name="new")
app.add_typer(experiment_app, name="experiment")
app.add_typer(targets_app, name="targets")
add_commands(app)
register(app)
add_cost(app)

TARGET_HELP = (
    "Target of the card, oracle:RATE, or a pretrained one: folder, hub id or TOML file "
    "[default: the card's]"
)
DescriptorWeights = Annotated[
    Path | None,
    typer.Option("--descriptor-weights", help="File of a descriptor that needs one (SSCD)."),
]
Flips = Annotated[
    bool, typer.Option("--flips", help="Compare every image mirrored too, whichever is nearer.")
]
Dedup = Annotated[
    bool,
    typer.Option("--dedup-reference", help="Of members that are near-duplicates keep the first."),
]
Boards = Annotated[Path, typer.Option("--dir", help="Folder of the boards and their records/.")]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        app()
    except MembenchError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes that train, the first one
            print(f"membench: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `membench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C in long work says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print("membench: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


def _version(show: bool) -> None:
    if show:
        print(f"membench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="methods, descriptors, datasets, targets or metrics.")
    ] = "all",
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """List what there is: methods, descriptors, data sets, targets, metrics.

    Example: `membench list methods`
    """
    from membench import catalogue

    rows = catalogue.rows(registry_of(plugins), what)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        catalogue.show(rows)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A plugin, data set, DATASET/TARGET or metric.")],
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Tell all about one method, descriptor, data set, target or metric.

    Example: `membench info fashion_mini`
    """
    from membench import catalogue

    found = catalogue.describe(registry_of(plugins), name)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        catalogue.show_one(found)


@app.command()
def run(
    method: Annotated[str, typer.Option(help="Extraction method; see `membench list methods`.")],
    dataset: Annotated[str, typer.Option(help="Data set; see `membench list datasets`.")],
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    guidance_scale: Annotated[
        str | None, typer.Option(help="One or more, as in 0.3,1 [default: the card's]")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images per scale [default: the card's]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps [default: the card's]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch [default: the card's]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of networks [default: the card's]")
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile networks first; needs g++ or so."),
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="One target label for every image [default: uniform]")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A method's parameter, as in n_clusters=50.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    attack_seed: Annotated[
        int, typer.Option(help="Seed of synthetic set, classifiers and clusters.")
    ] = 0,
    flips: Flips = False,
    dedup_reference: Dedup = False,
    device: Device = "auto",
    search_on: Annotated[
        str | None,
        typer.Option(help="GPUs that filter the search, as in cuda:0,cuda:1 [default: the CPU]"),
    ] = None,
    descriptor_weights: DescriptorWeights = None,
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, cache hits and model calls only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Attack a target with one method and write a record.

    Example: `membench run --method side_c --dataset fashion_mini`

    Example: `membench run --method random --dataset fashion_mini --target oracle:0.3 --images 256`
    """
    from rich.console import Console

    from membench.console import Stages
    from membench.specs import changed_similarity

    registry = registry_of(plugins, data)
    registry.method(method)  # a wrong name answers before torch is loaded
    own = registry.card(dataset).similarity
    similarity = changed_similarity(own, flips=flips, dedup_reference=dedup_reference)
    scales, changes = _scales(guidance_scale), _settings(settings)
    from membench import run as engine
    from membench.record import RECORD, SHEET
    from membench.report import table

    console = Console(stderr=as_json)
    cell = engine.prepare(
        registry,
        results,
        Stages(console, quiet=as_json),
        method=method,
        dataset=dataset,
        target=target,
        settings=changes,
        guidance_scales=scales,
        images=images,
        steps=steps,
        batch_size=batch_size,
        precision=precision,
        compile=compile_,
        label=label,
        seed=seed,
        attack_seed=attack_seed,
        device=device,
        descriptor_weights=descriptor_weights,
        similarity=similarity,
        search_on=tuple(search_on.split(",")) if search_on else (),
    )
    if dry_run:
        stages = [{"stage": s.stage, "cached": s.cached} | vars(s.work) for s in cell.plan()]
        if as_json:
            print(
                json.dumps({"id": cell.id, "identity": cell.identity, "stages": stages}, indent=1)
            )
        else:
            console.print(table.plan(stages))
        return
    with _resumable():
        record = engine.run(cell)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(table.report(record))
        print(f"record  {cell.folder / RECORD}")
        if (cell.folder / SHEET).is_file():
            print(f"picture {cell.folder / SHEET}")


def _scales(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MembenchError(
            f"--guidance-scale {text}: expected numbers, as in 0.3 or 0.3,1"
        ) from None


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise MembenchError(
            f"{option} {text}: expected whole numbers parted by commas, as in 1000,5000"
        ) from None


def _settings(texts: list[str] | None) -> dict[str, str]:
    changes = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise MembenchError(f"--set {text}: expected NAME=VALUE")
        changes[key.strip()] = value.strip()
    return changes


@app.command()
def diverge(
    dataset: Annotated[str, typer.Option(help="Data set; see `membench list datasets`.")],
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    estimator: Annotated[str, typer.Option(help="pf_ode, elbo or knn.")] = "pf_ode",
    epsilon: Annotated[str, typer.Option(help="Widths e of the kernels.")] = "0.05,0.1,0.2",
    images: Annotated[
        int | None, typer.Option(help="Members looked at [default: 128; knn: all]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps (pf_ode, 24) or timesteps (elbo, 64).")
    ] = None,
    probes: Annotated[int | None, typer.Option(help="Estimates of each log p [default: 2]")] = None,
    draws: Annotated[int, typer.Option(help="Draws of noise for each image.")] = 1,
    neighbours: Annotated[int | None, typer.Option(help="k of knn [default: 3]")] = None,
    marginal: Annotated[
        bool, typer.Option("--marginal", help="Of a conditional target p(x), not p(x | y).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of images, noise, probes and samples.")] = 0,
    device: Device = "auto",
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Measure how near a target's density is to its members, and to images it never saw.

    Memorization divergence, pointwise and semantic memorization, each beside its held-out twin.

    Example: `membench diverge --dataset fashion_mini --target ddpm --estimator elbo --images 64`
    """
    from rich.console import Console

    from membench.console import Stages

    registry = registry_of(plugins, data)
    registry.card(dataset)  # a wrong name answers before torch is loaded
    try:
        widths = tuple(float(part) for part in epsilon.split(","))
    except ValueError:
        raise MembenchError(f"--epsilon {epsilon}: expected numbers, as in 0.05,0.1") from None
    from membench import diverge as engine
    from membench.report.divergence import report

    console = Console(stderr=as_json)
    cell = engine.prepare(
        registry,
        results,
        Stages(console, quiet=as_json),
        dataset=dataset,
        target=target,
        estimator=estimator,
        epsilons=widths,
        images=images,
        steps=steps,
        probes=probes,
        draws=draws,
        neighbours=neighbours,
        marginal=marginal,
        seed=seed,
        device=device,
    )
    with _resumable():
        record = engine.run(cell)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(report(record))
        print(f"record  {cell.folder / engine.RECORD}")
        print(f"picture {cell.folder / engine.FIGURE}")


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="Data set; see `membench list datasets`.")],
    target: Annotated[str, typer.Option(help="Target of the card whose recipe is followed.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 [default: the recipe's, else float32]"),
    ] = None,
    snapshots: Annotated[
        str | None,
        typer.Option(help="Steps at which weights are kept, as in 1000,5000: targets NAME@STEP."),
    ] = None,
    device: Device = "auto",
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
) -> None:
    """Train a target model by its card's recipe.

    Writes weights, recipe, losses and memorised share over training (numbers and a picture)
    to RESULTS/targets/DATASET/NAME; after a kill, `--resume` gives the same weights as without one.

    Example: `membench train fashion_mini --target ddpm`

    On four GPUs: `accelerate launch --multi_gpu --num_processes 4 -m membench train celeba25k
    --target ddpm --precision bfloat16`
    """
    registry = registry_of(plugins, data)
    card = registry.card(dataset)
    if target not in card.targets:
        from membench.registry import unknown

        raise unknown(f"target of {dataset}", target, card.targets)
    from membench import training

    with _resumable():
        training.train_target(
            registry,
            card,
            target,
            results,
            device=device,
            resume=resume,
            precision=precision,
            snapshots=_whole_numbers("--snapshots", snapshots),
        )


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="Data set; see `membench list datasets`.")],
    source: Annotated[Path, typer.Option(help="Folder or archive with the official files.")],
    data: Data = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding processes [default: one a core]")
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Turn the official files of a data set into arrays; nothing is downloaded.

    Writes images, labels, source indices and a manifest to DATA/NAME; after a kill the same
    command goes on where it was. `membench info NAME` says where the files are published.

    Example: `membench prepare cifar10 --source cifar-10-binary.tar.gz`
    """
    from rich.console import Console

    from membench.console import Stages
    from membench.data.prepare import prepare as make

    registry = registry_of(plugins, data)
    card, folder = registry.card(dataset), registry.card_folder(dataset)
    with _resumable():
        done = make(card, folder, source, registry.data, Stages(Console()), workers=workers)
    counts = ", ".join(
        f"{part['count']:,} {name}" for name, part in done.manifest["splits"].items()
    )
    rate = done.decoded / done.seconds if done.seconds else 0.0
    print(f"{done.folder}: {counts}; {done.decoded:,} images decoded, {rate:,.0f} images/s")


@app.command()
def calibrate(
    dataset: Annotated[str, typer.Option(help="Data set; see `membench list datasets`.")],
    vary: Annotated[
        str,
        typer.Option(help="What else to try: any of the default's words, or nothing at all."),
    ] = "flips,members,resolution,preprocessing,duplicates",
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Score auxiliary images too, not only held-out ones.")
    ] = False,
    descriptor: Annotated[
        str | None, typer.Option(help="SSCD by this descriptor [default: the card's]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Its preprocessing.")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Its input, in the preset's place.")
    ] = None,
    flips: Flips = False,
    dedup_reference: Dedup = False,
    descriptor_weights: DescriptorWeights = None,
    device: Device = "auto",
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Score real images that nobody trained on: what chance alone reaches, and what moves it.

    Writes the false-match rate of every fixed band, thresholds at 5, 1 and 0.2 % with intervals,
    and how they change with mirroring, members, resolution and preprocessing.

    Example: `membench calibrate --dataset fashion_mini`
    """
    from rich.console import Console

    from membench.console import Stages
    from membench.specs import changed_similarity

    registry = registry_of(plugins, data)
    card = registry.card(dataset)
    similarity = changed_similarity(
        card.similarity,
        descriptor=descriptor,
        preset=preset,
        input_size=input_size,
        flips=flips,
        dedup_reference=dedup_reference,
    )
    from membench import calibrating
    from membench.report.variations import report
    from membench.run import resolve_device

    console = Console(stderr=as_json)
    found = calibrating.prepare(
        registry,
        results,
        Stages(console, quiet=as_json),
        dataset=dataset,
        similarity=similarity,
        vary=[word.strip() for word in vary.split(",") if word.strip()],
        everything_unseen=unseen,
        device=resolve_device(device),
        descriptor_weights=descriptor_weights,
    )
    with _resumable():
        record = calibrating.run(found)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(report(record))
        print(f"record  {found.folder / calibrating.RECORD}")
        print(f"picture {found.folder / calibrating.FIGURE}")


@app.command()
def score(
    images: Annotated[Path, typer.Option(help="Folder, zip, npz, npy or parquet file of images.")],
    dataset: Annotated[str, typer.Option(help="Data set whose members they may copy.")],
    name: Annotated[
        str | None, typer.Option(help="What to call them [default: the path's]")
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Bring them to the data set's size and mode.")
    ] = False,
    descriptor: Annotated[
        str | None, typer.Option(help="SSCD by this descriptor [default: the card's similarity]")
    ] = None,
    flips: Flips = False,
    dedup_reference: Dedup = False,
    descriptor_weights: DescriptorWeights = None,
    device: Device = "auto",
    results: Results = Path("results"),
    data: Data = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Score images that some other tool made: AMS, UMS and all the rest, without a target.

    Example: `membench score --images samples/ --dataset fashion_mini`
    """
    from rich.console import Console

    from membench.console import Stages
    from membench.specs import changed_similarity

    registry = registry_of(plugins, data)
    card = registry.card(dataset)
    from membench import external
    from membench.record import RECORD, SHEET
    from membench.report import table
    from membench.run import resolve_device

    console = Console(stderr=as_json)
    found = external.prepare(
        registry,
        results,
        Stages(console, quiet=as_json),
        images=images,
        dataset=dataset,
        name=name,
        resize=resize,
        similarity=changed_similarity(
            card.similarity, descriptor=descriptor, flips=flips, dedup_reference=dedup_reference
        ),
        device=resolve_device(device),
        descriptor_weights=descriptor_weights,
    )
    with _resumable():
        record = external.run(found)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(table.report(record))
        print(f"record  {found.folder / RECORD}")
        if (found.folder / SHEET).is_file():
            print(f"picture {found.folder / SHEET}")


@app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(help="record.json files or their folders.")],
    baseline: Annotated[
        str | None, typer.Option(help="Method the others are compared with [default: the first]")
    ] = None,
    band_mode: Annotated[
        str | None, typer.Option(help="calibrated, cumulative, ... [default: the card's first]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Compare at one scale [default: the mean over scales]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods image by image: who extracts more, and could a difference have been seen?

    Records that differ by seed alone are pooled; all methods need the same seeds.

    Example: `membench compare results/runs/fashion_mini/ddpm/*-seed*/ --baseline random`
    """
    from rich.console import Console

    from membench.compare import compare as by_pairs
    from membench.report.comparison import comparison

    found = by_pairs(records, baseline=baseline, mode=band_mode, scale=guidance_scale)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(comparison(found))


@app.command()
def extracted(
    record: Annotated[Path, typer.Argument(help="A record.json or the folder it lies in.")],
    band: Annotated[str, typer.Option(help="low, mid or high.")] = "mid",
    band_mode: Annotated[
        str | None, typer.Option(help="calibrated, cumulative, ... [default: the card's first]")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the whole table there.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Images to print.")] = 10,
    data: Data = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Name the training images that a run extracted: how often, at which scale, of which class.

    Example: `membench extracted results/runs/fashion_mini/ddpm/side_c-seed0-1234567890ab`
    """
    from rich.console import Console

    from membench.extraction import extraction, write_csv
    from membench.report.comparison import extraction as shown

    found = extraction(registry_of(plugins, data), record, mode=band_mode, band=band)
    if csv is not None:
        write_csv(csv, found["images"])
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(shown(found, top))


@new_app.command("method")
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method and of its file.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to write it.")] = Path(),
) -> None:
    """Write NAME.py, a working extraction method to start from.

    Example: `membench new method my_attack`
    """
    from membench.templates import write_method

    path = write_method(name, folder)
    print(
        f"wrote {path}\n"
        f"test it: membench test {name} --plugins {folder}\n"
        f"run it:  membench run --method {name} --dataset fashion_mini --plugins {folder}"
    )


@new_app.command("descriptor")
def new_descriptor(
    name: Annotated[str, typer.Argument(help="Name of the descriptor and of its file.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to write it.")] = Path(),
) -> None:
    """Write NAME.py, a working descriptor to start from.

    Example: `membench new descriptor my_descriptor`
    """
    from membench.templates import write_descriptor

    path = write_descriptor(name, folder)
    print(f"wrote {path}\ntest it: membench test {name} --plugins {folder}")


@new_app.command("sweep")
def new_sweep(
    name: Annotated[str, typer.Argument(help="Name of the sweep and of its file.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to write it.")] = Path(),
) -> None:
    """Write NAME.toml, a sweep of the five methods on fashion_mini with every option explained.

    Example: `membench new sweep my_sweep`
    """
    from membench.templates import write_sweep

    path = write_sweep(name, folder)
    print(f"wrote {path}\nlook: membench sweep {path} --dry-run\nrun:  membench sweep {path}")


@app.command("test")
def test_(
    name: Annotated[str | None, typer.Argument(help="Method or descriptor [default: all]")] = None,
    descriptor_weights: DescriptorWeights = None,
    plugins: Plugins = None,
) -> None:
    """Run the contract tests on a method or a descriptor: offline, in seconds.

    Example: `membench test my_attack --plugins .`
    """
    from membench.contract import check_plugins

    if not check_plugins(registry_of(plugins), name, descriptor_weights):
        raise typer.Exit(1)


@board_app.command("add")
def leaderboard_add(
    records: Annotated[list[Path], typer.Argument(help="record.json files or their folders.")],
    folder: Boards = Path("leaderboards"),
) -> None:
    """Verify records and copy them beside the boards; then `build`.

    Example: `membench leaderboard add results/runs/fashion_mini/*/*`
    """
    from membench.report.leaderboard import add
    from membench.verify import verify_any

    for path in records:
        print(add(verify_any(path), folder))


@board_app.command("build")
def leaderboard_build(folder: Boards = Path("leaderboards")) -> None:
    """Write every board from the records in `leaderboards/records`.

    Example: `membench leaderboard build`
    """
    from membench.report.leaderboard import build

    for path in build(folder):
        print(path)


@board_app.command("check")
def leaderboard_check(folder: Boards = Path("leaderboards")) -> None:
    """Fail when a board is not what its records say.

    Example: `membench leaderboard check`
    """
    from membench.report.leaderboard import check

    print(f"{folder}: {check(folder)} files are what their records say")


@board_app.command("diff")
def leaderboard_diff(
    records: Annotated[list[Path], typer.Argument(help="record.json files or their folders.")],
    folder: Boards = Path("leaderboards"),
    as_json: AsJson = False,
) -> None:
    """Show what records would change on the boards, without adding them.

    Example: `membench leaderboard diff results/runs/fashion_mini/ddpm/side_c-seed3-1234567890ab`
    """
    from rich.console import Console

    from membench.record import RECORD, read_record
    from membench.report.diff import diff, report

    files = [path / RECORD if path.is_dir() else path for path in records]
    found = diff(folder, [read_record(file) for file in files])
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(report(found))


@board_app.command("site")
def leaderboard_site(
    out: Annotated[Path, typer.Argument(help="Folder to write; an earlier site is replaced.")],
    folder: Boards = Path("leaderboards"),
    results: Annotated[
        Path | None,
        typer.Option(help="Where the runs lie: their contact sheets, where the card permits."),
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Write the boards as a static site: pages that load nothing from anywhere.

    Example: `membench leaderboard site site --results results`
    """
    from membench.report.site import build_site

    pages = build_site(folder, out, registry_of(plugins), results)
    print(f"wrote {len(pages)} pages; open {out / 'index.html'}")


if __name__ == "__main__":
    main()
