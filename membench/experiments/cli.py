"""`membench experiment ...`: parse, call, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from membench.errors import MembenchError
from membench.options import AsJson, Device, Plugins, Results, registry_of

if TYPE_CHECKING:
    from membench.experiments.common import Result, Setting
    from membench.run import Cell

experiment_app = typer.Typer(
    no_args_is_help=True,
    help="The papers' experiments: each writes a table (CSV), a figure (SVG) and what it rests on.",
)

Dataset = Annotated[str, typer.Option(help="Data set; see `membench list datasets`.")]
Target = Annotated[
    str | None,
    typer.Option(
        help="Target of the card, oracle:RATE, or where a model lies [default: the card's]"
    ),
]
Images = Annotated[int | None, typer.Option(min=1, help="Images per scale [default: the card's]")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps [default: the card's]")]
Seeds = Annotated[str, typer.Option(help="Seeds of the images, as in 0,1,2.")]
Band = Annotated[str, typer.Option(help="low, mid or high; another mode as in cumulative:mid.")]
AttackSeed = Annotated[int, typer.Option(help="Seed of synthetic set, classifiers and clusters.")]
Out = Annotated[
    Path | None, typer.Option(help="Where to write [default: RESULTS/experiments/NAME-...]")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print stages, cache hits and model calls only.")
]
Published = Annotated[
    str | None,
    typer.Option(help="Draw this data set's published figures beside [default: its own, if any]"),
]


@dataclass(frozen=True)
class _Desk:
    """How a command ends: plan, or result on paper and on screen."""

    setting: Setting
    out: Path | None
    dry_run: bool
    as_json: bool

    def finish(self, name: str, cells: list[Cell], compute: Callable[[], Result]) -> None:
        from rich.console import Console

        from membench.experiments.common import plan
        from membench.report import table

        console = Console(stderr=self.as_json)
        if self.dry_run:
            stages = [{"stage": s.stage, "cached": s.cached} | vars(s.work) for s in plan(cells)]
            if self.as_json:
                print(json.dumps({"experiment": name, "stages": stages}, indent=1))
            else:
                console.print(table.plan(stages))
            return
        try:
            result = compute()
        except KeyboardInterrupt:
            console.print("membench: interrupted; run the same command again to go on")
            raise typer.Exit(130) from None
        spec = cells[0].spec
        target = spec.target.replace(":", "-").replace("/", "-")
        place = f"{name}-{spec.dataset}-{target}-{spec.method}"
        folder = self.out or self.setting.results / "experiments" / place
        paths = result.write(folder)
        if self.as_json:
            print(json.dumps(result.facts | {"rows": result.rows}, indent=1))
            return
        for line in result.reading:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for path in paths:
            print(path)


def _desk(
    *, out: Path | None, dry_run: bool, as_json: bool, plugins: list[Path] | None, seeds: str,
    method: str, dataset: str, **options: Any,
) -> _Desk:  # fmt: skip
    from rich.console import Console

    from membench.console import Stages

    registry = registry_of(plugins)
    registry.method(method), registry.card(dataset)  # a wrong name answers before torch is loaded
    numbers = tuple(_integers("--seeds", seeds))
    from membench.experiments.common import Setting

    progress = Stages(Console(stderr=True), quiet=as_json)
    setting = Setting(
        registry=registry, progress=progress, method=method, dataset=dataset, seeds=numbers,
        **options,
    )  # fmt: skip
    return _Desk(setting, out, dry_run, as_json)


@experiment_app.command()
def guidance(
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="A method with guidance.")] = "side_c",
    target: Target = None,
    guidance_scale: Annotated[
        str | None, typer.Option(help="The sweep, as in 0,0.3,1 [default: 0 to 10]")
    ] = None,
    band: Band = "mid",
    published: Published = None,
    images: Images = None,
    steps: Steps = None,
    seeds: Seeds = "0",
    attack_seed: AttackSeed = 0,
    device: Device = "auto",
    results: Results = Path("results"),
    out: Out = None,
    plugins: Plugins = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Sweep the guidance scale: AMS, UMS and top-percent means against lambda.

    Each has its held-out twin and a 95 % interval.

    Example: `membench experiment guidance --dataset fashion_mini --images 256`
    """
    desk = _desk(
        method=method, dataset=dataset, target=target, images=images, steps=steps, seeds=seeds,
        attack_seed=attack_seed, device=device, results=results, out=out, plugins=plugins,
        dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    scales = None if guidance_scale is None else _numbers("--guidance-scale", guidance_scale)
    from membench.experiments import guidance as experiment
    from membench.experiments.common import parse_band

    cells = experiment.cells(desk.setting, scales or experiment.SCALES)
    mode, level = parse_band(band, cells[0].similarity.band_modes)
    desk.finish(experiment.NAME, cells, lambda: experiment.guidance(cells, mode, level, published))


@experiment_app.command()
def unique(
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="Extraction method.")] = "random",
    target: Target = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="One scale, if the method has guidance.")
    ] = None,
    band: Band = "mid",
    images: Images = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    attack_seed: AttackSeed = 0,
    device: Device = "auto",
    results: Results = Path("results"),
    out: Out = None,
    plugins: Plugins = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Count unique matches against the number of images: measured, rarefied, and extrapolated.

    Example: `membench experiment unique --dataset fashion_mini --images 2048`
    """
    desk = _desk(
        method=method, dataset=dataset, target=target, images=images, steps=steps, seeds=str(seed),
        attack_seed=attack_seed, device=device, results=results, out=out, plugins=plugins,
        dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    from membench.experiments import unique as experiment
    from membench.experiments.common import parse_band

    cells = experiment.cells(desk.setting, guidance_scale)
    mode, level = parse_band(band, cells[0].similarity.band_modes)
    desk.finish(experiment.NAME, cells, lambda: experiment.unique(cells, mode, level))


@experiment_app.command()
def classes(
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="A method with a classifier.")] = "side_c",
    target: Target = None,
    parameter: Annotated[
        str, typer.Option(help="The method's parameter that sets the number of classes.")
    ] = "n_clusters",
    values: Annotated[
        str | None, typer.Option(help="Its values, as in 5,10,20 [default: 2 to 200]")
    ] = None,
    guidance_scale: Annotated[
        str | None, typer.Option(help="One or more, averaged over [default: the card's]")
    ] = None,
    band_mode: Annotated[
        str | None, typer.Option(help="calibrated, cumulative, ... [default: the card's first]")
    ] = None,
    published: Published = None,
    images: Images = None,
    steps: Steps = None,
    seeds: Seeds = "0",
    attack_seed: AttackSeed = 0,
    device: Device = "auto",
    results: Results = Path("results"),
    out: Out = None,
    plugins: Plugins = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fit AMS and UMS to the number of classes or clusters: coefficient, intercept, R2, errors.

    Each value trains a classifier of its own.

    Example: `membench experiment classes --dataset fashion_mini --images 256 --values 5,20,100`
    """
    desk = _desk(
        method=method, dataset=dataset, target=target, images=images, steps=steps, seeds=seeds,
        attack_seed=attack_seed, device=device, results=results, out=out, plugins=plugins,
        dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    chosen = None if values is None else _integers("--values", values)
    scales = None if guidance_scale is None else _numbers("--guidance-scale", guidance_scale)
    from membench.experiments import classes as experiment
    from membench.experiments.common import parse_band

    groups = experiment.cells(desk.setting, parameter, chosen or experiment.VALUES, scales)
    mode = band_mode or groups[0][0].similarity.band_modes[0]
    parse_band(f"{mode}:mid", groups[0][0].similarity.band_modes)
    desk.finish(
        experiment.NAME,
        [cell for group in groups for cell in group],
        lambda: experiment.classes(groups, parameter, mode, published),
    )


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MembenchError(f"{option} {text}: expected numbers, as in 0.3 or 0.3,1") from None


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise MembenchError(f"{option} {text}: expected whole numbers, as in 0 or 0,1,2") from None


@experiment_app.command()
def theorem(
    dataset: Dataset = "fashion_mini",
    images: Annotated[
        int, typer.Option(min=2, help="Members and held-out images whose density is estimated.")
    ] = 64,
    seeds: Seeds = "0,1",
    estimators: Annotated[str, typer.Option(help="elbo, pf_ode or both.")] = "elbo,pf_ode",
    device: Device = "auto",
    results: Results = Path("results"),
    out: Out = None,
    plugins: Plugins = None,
) -> None:
    """Check Theorem 1 on a small scale: does a U-Net memorise more when it is told labels?

    The same recipe and members, unconditionally, with true labels and with random labels:
    divergence, AMS and UMS of each, beside their held-out twins.

    Example: `membench experiment theorem --images 64`
    """
    from rich.console import Console

    from membench.console import Stages

    registry = registry_of(plugins)
    registry.card(dataset)
    chosen = tuple(word.strip() for word in estimators.split(",") if word.strip())
    drawn = _integers("--seeds", seeds)
    from membench.experiments import theorem as experiment

    folder = experiment.theorem(
        registry, results, Stages(Console()), out=out, images=images, seeds=drawn,
        device=device, dataset=dataset, estimators=chosen,
    )  # fmt: skip
    print("\n".join(json.loads((folder / f"{experiment.NAME}.json").read_text())["reading"]))
    print(f"written {folder}")
