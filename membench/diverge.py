"""`membench diverge`: model-level metrics of one target, as a record that can be recomputed.

A record is `results/divergence/DATASET/TARGET/ESTIMATOR-ID12/divergence.json`, with every number it
was made from in `values.npz` and a figure beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from membench import overlap
from membench.allocator import keep_freed_memory
from membench.data.imageset import Dataset, load_dataset
from membench.diffusion import likelihood
from membench.diffusion.targets import OracleTarget
from membench.errors import MembenchError
from membench.files import link_or_copy, locked, read_json, replace_atomically, write_json, writing
from membench.hashing import canonical_json, content_hash, file_hash
from membench.lab import Generated, Lab, Progress
from membench.metrics import divergence
from membench.metrics.catalogue import MODEL_METRIC_VERSIONS
from membench.metrics.divergence import Floats
from membench.overlap import SIDES, DivergenceSpec, Side, Values
from membench.provenance import provenance
from membench.record import seal
from membench.registry import Registry
from membench.report.divergence import draw_divergence
from membench.run import resolve_device
from membench.specs import explain
from membench.store import PARTS, Artifact, Store, Work
from membench.targets import origin_of, resolve_target
from membench.verify import differences

SCHEMA = 1
RECORD, VALUES, FIGURE = "divergence.json", "values.npz", "divergence.svg"
STEPS = {"pf_ode": 24, "elbo": 64}
PROBES = {"pf_ode": 2, "elbo": 2}
IMAGES = 128
NEIGHBOURS = 3
VERSION = 1
"""Of the code that makes values: raise it when they change."""


@dataclass(frozen=True)
class Cell:
    """One estimate whose names are resolved and whose artifacts are described, not computed."""

    spec: DivergenceSpec
    lab: Lab
    labels: dict[Side, np.ndarray] | None
    samples: Artifact[Generated]
    values: Artifact[Values]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that could change a number of the record."""
        return {"schema": SCHEMA, "metrics": MODEL_METRIC_VERSIONS} | self.values.identity

    @property
    def id(self) -> str:
        return content_hash(self.identity)

    @property
    def folder(self) -> Path:
        target = self.lab.target.name.replace(":", "-").replace("/", "-")
        name = f"{self.spec.estimator}-{self.id[:12]}"
        return self.lab.store.root / "divergence" / self.lab.dataset.card.name / target / name


def prepare(
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    dataset: str,
    target: str | None = None,
    estimator: str = "pf_ode",
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2),
    images: int | None = None,
    steps: int | None = None,
    probes: int | None = None,
    draws: int = 1,
    neighbours: int | None = None,
    marginal: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> Cell:
    """Resolve names and defaults; nothing is computed or written yet."""
    card = registry.card(dataset)
    data = load_dataset(card, registry.data_folder(dataset))
    spec = settle(
        len(data.members),
        estimator=estimator,
        epsilons=epsilons,
        images=images,
        steps=steps,
        probes=probes,
        draws=draws,
        neighbours=neighbours,
        marginal=marginal,
        seed=seed,
    )
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the record says
    device = resolve_device(device)
    model = resolve_target(target or card.default_target, card, data, registry, results, device)
    lab = Lab(data, model, Store(results), progress, device, registry=registry)
    return build_cell(spec, lab)


def settle(members: int, **settings: Any) -> DivergenceSpec:
    """A spec with the defaults of its estimator; a `MembenchError` names a setting that is wrong.

    members: how many there are. Settings: those of `DivergenceSpec`; None takes the default.
    """
    estimator = str(settings["estimator"])
    likely, knn = estimator in STEPS, estimator == "knn"
    for name, used in (("steps", likely), ("probes", likely), ("neighbours", knn)):
        if settings.get(name) is not None and not used:
            raise MembenchError(f"--{name}: the estimator {estimator} does not use it")
    if knn and settings.get("marginal"):
        raise MembenchError("--marginal: knn sees samples only, which are those of p(x) already")
    defaults = {
        "images": min(IMAGES, members) if likely else members,
        "steps": STEPS.get(estimator),
        "probes": PROBES.get(estimator),
        "neighbours": NEIGHBOURS if knn else None,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        spec = DivergenceSpec.model_validate(defaults | given)
    except ValidationError as error:
        raise MembenchError(f"--{explain(error)}") from None
    if spec.images > members:
        raise MembenchError(f"--images {spec.images}: there are {members} members")
    return spec


def build_cell(spec: DivergenceSpec, lab: Lab) -> Cell:
    """Describe the artifacts of one estimate; nothing is computed."""
    card, target = lab.dataset.card, lab.target
    if spec.estimator != "knn" and not hasattr(target, "mixture"):
        raise MembenchError(f"target {target.name} has no likelihood; take --estimator knn")
    condition = target.identity.get("condition")
    known: np.ndarray | None = getattr(target, "labels", None)
    if spec.marginal and known is None:
        raise MembenchError(f"--marginal: target {target.name} is not told any labels")
    asked = spec.estimator != "knn" and not spec.marginal  # for p(x | y)
    if condition == "uniform" and asked:
        raise MembenchError(
            f"target {target.name} knows other classes than {card.name}, so its members have no "
            "label: take --marginal, or --estimator knn"
        )
    uniform = condition == "uniform"
    labels = None if uniform else overlap.set_labels(condition, known, lab.dataset, spec.seed)
    samples = lab.images(
        None,
        0.0,
        count=card.extraction.images_per_scale,
        seed=spec.seed,
        sampling=card.extraction.sampling,
        title="samples",
    )
    descriptor = card.attack.cluster_descriptor
    described: tuple[Artifact[np.ndarray], ...] = ()
    if not isinstance(descriptor, str):
        described = (
            lab.descriptors_of("members", descriptor),
            lab.descriptors_of("heldout", descriptor),
            lab.descriptors_of_images(samples, descriptor),
        )
    versions = {"values": VERSION} | likelihood.VERSIONS
    identity = {
        "dataset": {
            "name": card.name,
            "revision": card.revision,
            "splits": card.splits.identity(),
            "heldout_rows": len(lab.dataset.heldout_twin),
        },
        "target": {"name": target.name} | target.identity,
        "divergence": spec.identity(),
        "descriptor": descriptor if isinstance(descriptor, str) else descriptor.identity(),
        "shape": list(card.images.shape),
        "sigma_0": likelihood.smallest_noise(target.abar),
        "conditional": known is not None and not spec.marginal and spec.estimator != "knn",
        "samples": samples.key,
        "versions": versions,
        "compute": lab.compute(),
    }
    calls = _calls(spec, target, samples.identity["count"])

    def make(folder: Path, work: Work) -> None:
        generated = lab.store.get(samples).images
        count = min(spec.images, len(generated))
        if spec.estimator == "knn":
            count = len(generated)
            total = 2 * len(spec.epsilons)
            with lab.progress(f"knn of {target.name}", total, "searches") as advance:
                values = overlap.knn_values(generated, lab.dataset, spec, None, advance)
        else:
            total = 2 * len(spec.epsilons) * spec.images * spec.draws + count
            with lab.progress(f"{spec.estimator} of {target.name}", total, "points") as advance:
                values = overlap.density_values(
                    spec,
                    lab.dataset,
                    target,  # type: ignore[arg-type]
                    labels,
                    generated,
                    folder / PARTS,
                    advance,
                )
            work.seconds = float(values.pop("seconds")[0])
        groups = overlap.sample_groups(spec, target, labels, count)  # type: ignore[arg-type]
        if isinstance(descriptor, str):
            z = overlap.set_descriptors(np.asarray(generated[:count]), lab.dataset, descriptor)
        else:
            z = [lab.store.get(item) for item in described]
            z = [z[0], z[1][: len(lab.dataset.heldout_twin)], z[2][:count]]
        values |= overlap.semantic_values(z, groups)
        work.unet_calls = calls
        overlap.save_arrays(folder / VALUES, values)

    artifact = Artifact(
        "divergence",
        spec.estimator,
        identity,
        make,
        lambda folder: overlap.load_arrays(folder / VALUES),
        (samples, *described),
        Work(calls),
    )
    return Cell(spec, lab, labels, samples, artifact)


def _calls(spec: DivergenceSpec, target: Any, samples: int) -> int:
    """Evaluations of eps, each for one image; backward passes are not counted."""
    if spec.estimator == "knn":
        return 0
    points = 2 * len(spec.epsilons) * spec.images * spec.draws + min(spec.images, samples)
    parts = len(np.unique(target.labels)) if spec.marginal else 1
    parts *= len(target.sides) if isinstance(target, OracleTarget) else 1
    each = likelihood.CALLS[spec.estimator] * (spec.steps or 1)
    return parts * points * each * (1 if spec.estimator == "pf_ode" else spec.probes or 1)


def run(cell: Cell) -> dict[str, Any]:
    """Compute an estimate, write its folder and return its record; a killed run goes on."""
    started = datetime.now(UTC)
    store = cell.lab.store
    values = store.get(cell.values)
    folder = cell.folder
    with writing(folder), locked(folder.with_name(f".{folder.name}.lock")):
        link_or_copy(store.folder(cell.values) / VALUES, folder / VALUES)
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "divergence",
            "id": cell.id,
            "identity": cell.identity,
            "results": summarise(values, cell.identity),
            "files": {VALUES: file_hash(folder / VALUES)},
        }
        record = json.loads(canonical_json(record))
        record["results_sha256"] = seal(record)
        stages = [stage for stage in store.stages.values() if stage.key == cell.values.key]
        record["cost"] = {
            "unet_calls": sum(stage.work.unet_calls for stage in stages),
            "seconds": round(sum(stage.work.seconds for stage in stages), 3),
        }
        record["provenance"] = provenance(started, cell.lab.device, **origin_of(cell.lab.target))
        figure = draw_divergence(record)
        replace_atomically(folder / FIGURE, lambda path: path.write_text(figure, "utf-8"))
        write_json(folder / RECORD, record)
    return record


def summarise(values: Values, identity: dict[str, Any]) -> dict[str, Any]:
    """Every number of a record from its values: pure, so that `verify_divergence` can repeat it.

    {"epsilons": [{"epsilon", "memorization_divergence": {"members", "heldout", "gap"},
      "pointwise_memorization": the same, not for knn, "solver": pf_ode only}],
     "semantic_memorization": the same and "descriptor"}; gap = held-out - members.
    """
    spec = DivergenceSpec.model_validate(identity["divergence"])
    size, count = int(np.prod(identity["shape"])), identity["dataset"]["heldout_rows"]
    rows = []
    for e, epsilon in enumerate(spec.epsilons):
        row: dict[str, Any] = {"epsilon": epsilon}
        if spec.estimator == "knn":
            sides, found = _knn(values, e)
        else:
            sides = {
                s: divergence.memorization_divergence(
                    values[f"{s}_log_q_{e}"], values[f"{s}_log_p_{e}"]
                )
                for s in SIDES
            }
            row["pointwise_memorization"] = _pointwise(values, epsilon, size, count)
            if f"members_log_p_half_{e}" in values:
                row["solver"] = {s: _solver(values, s, e) for s in SIDES}
            found = divergence.gap(sides["members"], sides["heldout"])
        row["memorization_divergence"] = sides | {"gap": found}
        rows.append(row)
    descriptor = identity["descriptor"]
    members, heldout = (values[f"{side}_semantic"] for side in SIDES)
    semantic = {
        "descriptor": descriptor if isinstance(descriptor, str) else descriptor["name"],
        "members": divergence.semantic_memorization(members, count),
        "heldout": divergence.semantic_memorization(heldout, count),
        "gap": divergence.paired_gap(members, heldout),
    }
    return {"epsilons": rows, "semantic_memorization": semantic}


def _knn(values: Values, e: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides and their gap."""
    jackknives = (values[f"members_jackknife_{e}"], values[f"heldout_jackknife_{e}"])
    sides: dict[str, Any] = {
        side: divergence.knn_divergence(values[f"{side}_terms_{e}"], jackknife)
        for side, jackknife in zip(SIDES, jackknives, strict=True)
    }
    return sides, divergence.knn_gap(sides["members"], sides["heldout"], jackknives)


def _pointwise(values: Values, epsilon: float, size: int, count: int) -> dict[str, Any]:
    log_p = values["samples_log_p"]
    squares = {side: values[f"{side}_squares"] for side in SIDES}
    sides = {
        side: divergence.pointwise_memorization(log_p, squares[side], epsilon, size, count)
        for side in SIDES
    }
    found = divergence.paired_gap(*(squares[side] / (2 * epsilon) for side in SIDES))
    return {"members": sides["members"], "heldout": sides["heldout"], "gap": found}


def _solver(values: Values, side: str, e: int) -> dict[str, float]:
    """log p with all steps minus that with half of them, the same probes: mean and largest."""
    half = values[f"{side}_log_p_half_{e}"]
    log_p = values[f"{side}_log_p_{e}"]
    whole = log_p.reshape(-1, log_p.shape[2])[: len(half)]
    change = (whole - half).mean(1)
    return {"mean": float(change.mean()), "largest": float(np.abs(change).max()), "n": len(half)}


def verify_divergence(path: Path) -> dict[str, Any]:
    """Check a divergence record (its JSON file or its folder), recomputing it from its values.

    Raises `MembenchError` naming the first thing that differs.
    """
    path = path / RECORD if path.is_dir() else path
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != "divergence":
        raise MembenchError(f"{path}: not a divergence record")
    try:
        if record["schema"] != SCHEMA:
            raise MembenchError(
                f"{path}: schema {record['schema']!r}, this membench reads {SCHEMA}"
            )
        if record["id"] != content_hash(record["identity"]):
            raise MembenchError(f"{path}: id is not the hash of identity: the record was edited")
        if record["results_sha256"] != seal(record):
            raise MembenchError(f"{path}: results_sha256 is not the hash of the results: edited")
        if record["identity"]["metrics"] != MODEL_METRIC_VERSIONS:
            raise MembenchError(
                f"{path}: made with metric versions {record['identity']['metrics']}, this membench "
                f"has {MODEL_METRIC_VERSIONS}; use the membench that made it, or run again"
            )
        file = path.parent / VALUES
        if not file.is_file() or file_hash(file) != record["files"][VALUES]:
            raise MembenchError(f"{file}: missing or changed: its SHA-256 is not the record's")
        values = overlap.load_arrays(file)
        results = json.loads(canonical_json(summarise(values, record["identity"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MembenchError(f"{path}: not a whole record ({error!r})") from None
    for field, old, new in differences("results", record["results"], results):
        raise MembenchError(f"{path}: {field} is {old!r}, recomputed {new!r}")
    return record


def knn_of_images(
    images: np.ndarray,
    dataset: Dataset,
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2),
    *,
    neighbours: int = NEIGHBOURS,
    draws: int = 1,
    seed: int = 0,
    space: str = "pixels",
    describe: Callable[[np.ndarray], Floats] | None = None,
) -> dict[str, Any]:
    """`knn` for a bare array of images that some tool made: uint8 [M, H, W, C], no target needed.

    {"space", "neighbours", "generated", "epsilons": [{"epsilon", "memorization_divergence":
    {"members", "heldout", "gap"}}]}; space: the name of what `describe` maps images to, if given
    (uint8 [N, H, W, C] -> float [N, D], row by row: the same map for every set).
    """
    spec = settle(
        len(dataset.members),
        estimator="knn",
        epsilons=epsilons,
        neighbours=neighbours,
        draws=draws,
        seed=seed,
    )
    values = overlap.knn_values(images, dataset, spec, describe)
    rows = []
    for e, epsilon in enumerate(spec.epsilons):
        sides, found = _knn(values, e)
        rows.append({"epsilon": epsilon, "memorization_divergence": sides | {"gap": found}})
    return {
        "space": space,
        "neighbours": neighbours,
        "generated": len(images),
        "metric_versions": MODEL_METRIC_VERSIONS,
        "epsilons": rows,
    }
