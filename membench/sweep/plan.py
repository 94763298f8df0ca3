"""From a sweep file to cells, and from cells to a graph of tasks that share what they can.

The identities of tasks are those of artifacts (`Artifact.key`): what five methods need of one
target is one task, and what the results folder holds already is done.

Identities hold the hash of the target's weights. So the cells of a target that is still to be
trained only wait at first: its graph is a `train` and a `plan` task, and the latter plans the sweep
again (`membench.sweep.growth`).
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from membench.diffusion.train import WEIGHTS
from membench.errors import MembenchError
from membench.hub import names_place
from membench.lab import Progress
from membench.record import RECORD
from membench.registry import Registry, unknown
from membench.run import Cell, Loaded, prepare, resolve_device
from membench.specs import Similarity, changed_similarity
from membench.store import Artifact, with_inputs
from membench.sweep.folder import TAIL, needed_of, product_is_there
from membench.sweep.specs import ON_DEVICE, DatasetChoice, MethodChoice, SweepSpec
from membench.sweep.tasks import CellPlan, Product, Task
from membench.targets import to_train, trained_folder

FUSED = ("labels", "descriptors")
"""Made by the task of whatever needs them, if that is one task: a job each would be too small."""
Work = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What a sweep file comes to on this machine; nothing is written.

    device: as workers will name it. needed: ids of tasks that missing records rest on. prepared:
    by the index of their row in `cells`, without those that failed or wait for a training.
    artifacts: by key, each once. trainings: steps of those to do, by data set and recipe.
    """

    spec: SweepSpec
    device: str
    cells: tuple[CellPlan, ...]
    tasks: tuple[Task, ...]
    needed: frozenset[str] = frozenset()
    prepared: dict[int, Cell] = field(default_factory=dict)
    artifacts: dict[str, Artifact[Any]] = field(default_factory=dict)
    trainings: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def calls(self) -> Work:
        """Model calls of the whole sweep in an empty results folder: (U-Net, classifier)."""
        work = [artifact.planned for artifact in self.artifacts.values()]
        return sum(w.unet_calls for w in work), sum(w.classifier_calls for w in work)

    @property
    def calls_apart(self) -> Work:
        """The same if every cell were run in a results folder of its own."""
        return sum(c.calls[0] for c in self.cells), sum(c.calls[1] for c in self.cells)


def device_of(spec: SweepSpec, executor: str) -> tuple[str, bool]:
    """The device of workers, and whether it is this machine's."""
    if executor == "slurm":
        auto = "cuda" if spec.resources_of("images").gpus else "cpu"
        return (auto if spec.device == "auto" else spec.device), False
    return resolve_device(spec.device), True


def plan(
    spec: SweepSpec,
    file: Path,
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    executor: str,
    device: str | None = None,
) -> Plan:
    """Resolve every name and put the graph together.

    executor: decides about the device, unless `device` names it, which this machine need not have.
    A mistake in the file is a `MembenchError` naming file and field; a method whose code fails is a
    failed row, and the others are planned.
    """
    device, here = device_of(spec, executor) if device is None else (device, False)
    weights = None if spec.descriptor_weights is None else file.parent / spec.descriptor_weights
    loaded, seen = Loaded(), set[str]()
    rows: list[CellPlan] = []
    prepared: dict[int, Cell] = {}
    trainings: dict[tuple[str, str], int] = {}
    for dataset, target, method, seed in _combinations(spec, file, registry):
        options = _options(spec, file, registry, dataset, target, method, seed, device)
        card = registry.card(dataset)
        recipe = to_train(card, target, results)
        if recipe is not None:
            row = _waiting_row(file, registry, results, progress, options, recipe, loaded, weights)
            if row.waits is not None:
                trainings[dataset, recipe] = card.recipe(recipe).training.last_step
            rows.append(row)
            continue
        made = _prepare(file, registry, results, progress, options, here, loaded, weights)
        if isinstance(made, Cell):
            if made.id in seen:
                continue  # scales of a method without guidance, for one, change nothing
            seen.add(made.id)
            prepared[len(rows)] = made
        rows.append(_row(options, made, results))
    first = [task for pair in trainings for task in _training(spec, device, registry, *pair)]
    tasks, artifacts = _graph(spec, device, results, prepared, first)
    needed = frozenset(
        needed_of({task.id: task for task in tasks}, lambda t: _is_there(results, t))
    )
    rows = told_apart(rows)
    return Plan(spec, device, tuple(rows), tuple(tasks), needed, prepared, artifacts, trainings)


def _is_there(results: Path, task: Task) -> bool:
    return task.product is not None and product_is_there(results, task.product)


def _combinations(
    spec: SweepSpec, file: Path, registry: Registry
) -> Iterable[tuple[str, str, MethodChoice, int]]:
    for choice in spec.methods:
        if choice.name not in registry.methods:
            error = unknown("method", choice.name, registry.methods)
            raise MembenchError(f"{file}: methods: {error}")
    for dataset in spec.datasets:
        for target in _targets(spec, file, registry, dataset):
            for method, seed in itertools.product(spec.methods, spec.seeds):
                yield dataset.name, target, method, seed


def _targets(
    spec: SweepSpec, file: Path, registry: Registry, dataset: DatasetChoice
) -> tuple[str, ...]:
    try:
        card = registry.card(dataset.name)
    except MembenchError as error:
        raise MembenchError(f"{file}: datasets: {error}") from None
    names = dataset.targets or spec.targets or (card.default_target,)
    return tuple(_place(name, file) for name in names)


def _place(name: str, file: Path) -> str:
    """The name of a target; a folder or file beside the sweep file gets its whole path."""
    beside = file.resolve().parent / name
    return str(beside) if names_place(name) and beside.exists() else name


def _options(
    spec: SweepSpec,
    file: Path,
    registry: Registry,
    dataset: str,
    target: str,
    method: MethodChoice,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Arguments of `membench.run.prepare`, JSON-able."""

    def chosen(name: str) -> Any:
        own = getattr(method, name)
        return getattr(spec, name) if own is None else own

    try:
        similarity = changed_similarity(
            registry.card(dataset).similarity, **spec.similarity.model_dump()
        )
    except MembenchError as error:
        raise MembenchError(f"{file}: similarity: {error}") from None
    options = {
        "method": method.name,
        "dataset": dataset,
        "target": target,
        "settings": method.settings,
        "guidance_scales": chosen("guidance_scales"),
        "images": chosen("images"),
        "steps": chosen("steps"),
        "batch_size": chosen("batch_size"),
        "precision": chosen("precision"),
        "compile": chosen("compile"),
        "label": method.label,
        "seed": seed,
        "attack_seed": spec.attack_seed,
        "device": device,
        "similarity": None if similarity is None else similarity.model_dump(mode="json"),
    }
    return {name: value for name, value in options.items() if value is not None}


def prepare_cell(
    registry: Registry,
    results: Path,
    progress: Progress,
    options: dict[str, Any],
    *,
    here: bool,
    loaded: Loaded,
    descriptor_weights: Path | None = None,
    search_on: tuple[str, ...] = (),
) -> Cell:
    """The cell of a row's options, as a plan or a worker sees it."""
    options = dict(options)
    if "guidance_scales" in options:
        options["guidance_scales"] = tuple(options["guidance_scales"])
    if "similarity" in options:
        options["similarity"] = Similarity.model_validate(options["similarity"])
    return prepare(
        registry, results, progress, **options, descriptor_weights=descriptor_weights, here=here,
        loaded=loaded, search_on=search_on,
    )  # fmt: skip


def _prepare(
    file: Path,
    registry: Registry,
    results: Path,
    progress: Progress,
    options: dict[str, Any],
    here: bool,
    loaded: Loaded,
    weights: Path | None,
) -> Cell | tuple[str, tuple[str, ...]]:
    """A cell, or why its method's code cannot make one."""
    try:
        return prepare_cell(
            registry, results, progress, options, here=here, loaded=loaded,
            descriptor_weights=weights,
        )  # fmt: skip
    except MembenchError as error:
        if f"{options['method']!r} is broken" in str(error):
            return str(error), ()
        where = f"{options['method']} on {options['dataset']}/{options['target']}"
        raise MembenchError(f"{file}: {where}: {error}") from None
    except Exception as error:
        lines = traceback.format_exc().splitlines()[-TAIL:]
        return f"{type(error).__name__}: {error}", tuple(lines)


STAND_IN = "oracle:0.5"


def _waiting_row(
    file: Path,
    registry: Registry,
    results: Path,
    progress: Progress,
    options: dict[str, Any],
    recipe: str,
    loaded: Loaded,
    weights: Path | None,
) -> CellPlan:
    """A cell that is planned once `recipe` is trained; mistakes in it are found now.

    For that it is prepared with a target that needs no training, and has no network.
    """
    trial = {k: v for k, v in options.items() if k not in ("precision", "compile")}
    trial |= {"target": STAND_IN}
    made = _prepare(file, registry, results, progress, trial, False, loaded, weights)
    if not isinstance(made, Cell):
        return _row(options, made, results)
    waits = _training_ids(options["dataset"], recipe)[1]
    return CellPlan(options=options, title=_title(options, options["target"]), waits=waits)


def _title(options: dict[str, Any], target: str) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in options["settings"].items())
    method = options["method"] + (f"({settings})" if settings else "")
    return f"{method} on {options['dataset']}/{target}, seed {options['seed']}"


def _row(
    options: dict[str, Any], made: Cell | tuple[str, tuple[str, ...]], results: Path
) -> CellPlan:
    title = _title(options, made.spec.target if isinstance(made, Cell) else options["target"])
    if not isinstance(made, Cell):
        return CellPlan(options=options, title=title, failed=made[0], log=made[1])
    work = [artifact.planned for artifact in with_inputs(made.artifacts)]
    return CellPlan(
        options=options,
        title=title,
        id=made.id,
        record=f"record-{made.id[:12]}",
        folder=made.folder.relative_to(results).as_posix(),
        calls=(sum(w.unet_calls for w in work), sum(w.classifier_calls for w in work)),
    )


def told_apart(rows: Sequence[CellPlan]) -> list[CellPlan]:
    """Rows of one title also name the options in which they differ."""
    same: dict[str, list[CellPlan]] = {}
    for row in rows:
        same.setdefault(row.title, []).append(row)

    def full(row: CellPlan) -> str:
        others = [other.options for other in same[row.title]]
        differ = [n for n, v in row.options.items() if any(o.get(n) != v for o in others)]
        return ", ".join([row.title, *(f"{name} {_said(row.options[name])}" for name in differ)])

    return [row.model_copy(update={"title": full(row)}) for row in rows]


def _said(value: Any) -> str:
    return "+".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)


# -- the graph ----------------------------------------------------------------------------------


def _training_ids(dataset: str, recipe: str) -> tuple[str, str]:
    return f"train-{dataset}-{recipe}", f"plan-{dataset}-{recipe}"


def _training(
    spec: SweepSpec, device: str, registry: Registry, dataset: str, recipe: str
) -> list[Task]:
    """A target's training, and the planning of what rests on it."""
    train, then = _training_ids(dataset, recipe)
    weights = trained_folder(registry.card(dataset), recipe, Path()) / WEIGHTS
    return [
        Task(
            id=train,
            stage="train",
            title=f"training of {dataset}/{recipe}",
            target=(dataset, recipe),
            product=Product(path=weights.as_posix()),
            resources=spec.resources_of("train", device),
        ),
        Task(
            id=then,
            stage="plan",
            title=f"plan for {dataset}/{recipe}, once it is trained",
            target=(dataset, recipe),
            needs=(train,),
            resources=spec.resources_of("plan", device),
        ),
    ]


def _graph(
    spec: SweepSpec,
    device: str,
    results: Path,
    cells: dict[int, Cell],
    trainings: Sequence[Task],
) -> tuple[list[Task], dict[str, Artifact[Any]]]:
    first: dict[str, int] = {}
    artifacts: dict[str, Artifact[Any]] = {}
    users: dict[str, set[str]] = {}
    for number, cell in cells.items():
        for artifact in with_inputs(cell.artifacts):
            key = artifact.key
            first.setdefault(key, number)
            artifacts.setdefault(key, artifact)
            for item in artifact.inputs:
                users.setdefault(item.key, set()).add(key)
        for artifact in cell.artifacts:
            users.setdefault(artifact.key, set()).add(cell.id)

    def fused(artifact: Artifact[Any]) -> bool:
        names = users[artifact.key]
        if artifact.kind not in FUSED or artifact.kind in spec.resources or len(names) > 1:
            return False
        user = artifacts.get(next(iter(names)))
        return user is not None and (user.kind in ON_DEVICE or device == "cpu")

    made_by: dict[str, tuple[str, ...]] = {}

    def makers(needed: Iterable[Artifact[Any]]) -> tuple[str, ...]:
        """Tasks that make these, or what goes into those that are made on the way."""
        found: dict[str, None] = {}
        for artifact in needed:
            found |= dict.fromkeys(made_by.get(artifact.key) or makers(artifact.inputs))
        return tuple(found)

    tasks = list(trainings)
    for number, cell in cells.items():
        check = _check(spec, device, number, cell)
        if all(task.id != check.id for task in tasks):
            tasks.append(check)
        for artifact in with_inputs(cell.artifacts):
            if artifact.key in made_by or fused(artifact):
                continue
            needs = makers(artifact.inputs) or (check.id,)
            title = artifact.title
            if len(users[artifact.key]) == 1:  # else it is nobody's in particular
                title += f" of {_whose(cell)}"
            made = _tasks_of(
                spec, device, results, cell, artifact, first[artifact.key], title, needs
            )
            made_by[artifact.key] = tuple(task.id for task in made)
            tasks += made
        tasks.append(
            Task(
                id=f"record-{cell.id[:12]}",
                stage="record",
                title=f"record of {_whose(cell)}, seed {cell.spec.seed}",
                cell=number,
                product=Product(path=(cell.folder / RECORD).relative_to(results).as_posix()),
                needs=makers(cell.artifacts),
                resources=spec.resources_of("record", device),
            )
        )
    return with_board(spec, device, tasks), artifacts


def with_board(spec: SweepSpec, device: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks and a board after all records, and after all plans, which may add more."""
    last = tuple(task.id for task in tasks if task.stage in ("plan", "record"))
    if not last:
        return list(tasks)
    board = spec.resources_of("board", device)
    return [*tasks, Task(id="board", stage="board", title="board", after=last, resources=board)]


def _tasks_of(
    spec: SweepSpec,
    device: str,
    results: Path,
    cell: Cell,
    artifact: Artifact[Any],
    number: int,
    title: str,
    needs: tuple[str, ...],
) -> Sequence[Task]:
    """One task, or one for each shard: who finishes last joins the parts."""
    path = cell.lab.store.folder(artifact).relative_to(results).as_posix()
    name = f"{artifact.kind}-{artifact.key[:12]}"
    planned = artifact.planned
    shards = 1 if artifact.parts is None else min(spec.shards, artifact.parts.count)

    def task(
        name: str, title: str, parts: tuple[int, int] | None, share: Callable[[int], int]
    ) -> Task:
        return Task(
            id=name,
            stage=artifact.kind,
            title=title,
            cell=number,
            key=artifact.key,
            product=Product(path=path, parts=parts),
            needs=needs,
            resources=spec.resources_of(artifact.kind, device),
            unet_calls=share(planned.unet_calls),
            classifier_calls=share(planned.classifier_calls),
        )

    if artifact.parts is None or shards == 1:
        return [task(name, title, None, lambda calls: calls)]
    count = artifact.parts.count
    edges = [i * count // shards for i in range(shards + 1)]

    def share_of(start: int, stop: int) -> Callable[[int], int]:
        return lambda calls: calls * stop // count - calls * start // count

    return [
        task(f"{name}-{i + 1}of{shards}", f"{title}, shard {i + 1} of {shards}", (start, stop),
             share_of(start, stop))
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
    ]  # fmt: skip


def _check(spec: SweepSpec, device: str, number: int, cell: Cell) -> Task:
    """The first task of a target: its data and weights can be read where workers run."""
    name = f"{cell.spec.dataset}-{cell.spec.target}"
    clean = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return Task(
        id=f"check-{clean}",
        stage="check",
        title=f"check of {cell.spec.dataset}/{cell.spec.target}",
        cell=number,
        resources=spec.resources_of("check", device),
    )


def _whose(cell: Cell) -> str:
    return f"{cell.method.name} on {cell.spec.dataset}/{cell.spec.target}"
