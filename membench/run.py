"""The main road: cards -> target -> attack -> images -> matches -> scores -> record."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from membench import limits
from membench.allocator import keep_freed_memory
from membench.data.imageset import Dataset, load_dataset
from membench.diffusion.arithmetic import Arithmetic, check_compiler
from membench.diffusion.sampler import ddim_times
from membench.diffusion.targets import Target, computed
from membench.errors import MembenchError
from membench.files import link_or_copy, locked, write_json, writing
from membench.hashing import canonical_json, content_hash, file_hash
from membench.lab import IMAGES, Generated, Lab, Progress, Surrogate
from membench.matching import FACTS, MATCHES, Facts
from membench.metrics import METRIC_VERSIONS
from membench.plugins import Method
from membench.provenance import provenance
from membench.record import NULL, RECORD, SCHEMA, SHEET, seal
from membench.registry import Registry
from membench.report import table
from membench.report.contact_sheet import contact_sheet
from membench.scoring import calibrate_from, incidence, null_facts, per_image, score_all
from membench.similarity.devices import check_devices, present
from membench.similarity.matches import Matches
from membench.specs import DataCard, RunSpec, Sampling, Similarity, explain
from membench.store import Artifact, Stage, Store
from membench.targets import origin_of, resolve_target


@dataclass(frozen=True)
class Cell:
    """A run whose names are resolved and whose artifacts are described, but not computed."""

    spec: RunSpec
    method: Method
    lab: Lab
    surrogate: Surrogate | None
    images: dict[float, Artifact[Generated]]
    matches: dict[float, Artifact[Matches]]
    null: Artifact[Matches]
    facts: Artifact[Facts]

    @property
    def card(self) -> DataCard:
        return self.lab.dataset.card

    @property
    def similarity(self) -> Similarity:
        return self.lab.matcher.similarity

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that could change a number of the record."""
        spec = self.spec.identity()
        return {
            "schema": SCHEMA,
            "dataset": {
                "name": self.card.name,
                "revision": self.card.revision,
                "splits": self.card.splits.identity(),
            },
            "target": {"name": self.lab.target.name} | self.lab.target.identity,
            "method": {
                "name": self.method.name,
                "version": self.method.version,
                "parameters": spec["parameters"],
            },
            "mitigation": spec["mitigation"],
            "seed": spec["seed"],
            "attack_seed": spec["attack_seed"],
            "guidance_scales": list(self.images),
            "images_per_scale": spec["images_per_scale"],
            "label": spec["label"],
            "sampling": spec["sampling"],
            "shape": list(self.card.images.shape),
            **self.lab.matcher.identity(),
            "attack": self.card.attack.identity(),
            "compute": self.lab.compute(),
            "metrics": dict(METRIC_VERSIONS),
            "artifacts": {f"{scale:g}": images.key for scale, images in self.images.items()},
        }

    @property
    def id(self) -> str:
        return content_hash(self.identity)

    @property
    def folder(self) -> Path:
        """Where the record goes: named for people, told apart by the record's id."""
        target = self.lab.target.name.replace(":", "-").replace("/", "-")
        name = f"{self.method.name}-seed{self.spec.seed}-{self.id[:12]}"
        return self.lab.store.root / "runs" / self.card.name / target / name

    @property
    def artifacts(self) -> list[Artifact[Any]]:
        """What a record is made of, besides what goes into these."""
        return [self.facts, self.null, *self.matches.values()]

    def plan(self) -> list[Stage]:
        return self.lab.store.plan(self.artifacts)


def resolve_device(name: str) -> str:
    """`auto` is the GPU if there is one; a device that is not there is an error."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise ValueError(name)
        torch.empty(1, device=torch.device(name))
    except Exception:
        raise MembenchError(f"--device {name}: not there; this machine has: {present()}") from None
    return name


class Loaded:
    """Data sets and targets that one process has opened: cells of a sweep share them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}

    def dataset(self, registry: Registry, name: str) -> Dataset:
        """The data set of that name, checked when it is first asked for."""
        folder = registry.data_folder(name)
        return self._keep((name, folder), lambda: load_dataset(registry.card(name), folder))

    def target(self, registry: Registry, data: Dataset, name: str, *more: Any) -> Target:
        """A target of a data set, as `resolve_target` gives it; more: results, device."""
        key = (data.card.name, name, *more)
        return self._keep(key, lambda: resolve_target(name, data.card, data, registry, *more))

    def _keep(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = load()
        return self._kept[key]


def prepare(
    registry: Registry,
    results: Path,
    progress: Progress,
    *,
    method: str,
    dataset: str,
    target: str | None = None,
    settings: Mapping[str, str] | None = None,
    guidance_scales: tuple[float, ...] | None = None,
    images: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    compile: bool | None = None,
    label: int | None = None,
    seed: int = 0,
    attack_seed: int = 0,
    device: str = "auto",
    descriptor_weights: Path | None = None,
    similarity: Similarity | None = None,
    search_on: tuple[str, ...] = (),
    here: bool = True,
    loaded: Loaded | None = None,
) -> Cell:
    """Resolve names and defaults into a cell; nothing is computed or written yet.

    here: False only describes the cell for a `device` that another machine has; what needs none
    (matches of pixels, the record) can be computed. search_on: GPUs that filter the exact search.
    loaded: what other cells have opened.
    """
    plugin = registry.method(method)
    loaded = loaded or Loaded()
    data = loaded.dataset(registry, dataset)
    card = data.card  # with what a prepared data set's manifest says
    defaults = card.extraction
    try:
        changes = {
            "steps": steps, "batch_size": batch_size, "precision": precision, "compile": compile
        }  # fmt: skip
        sampling = Sampling.model_validate(
            defaults.sampling.model_dump() | {k: v for k, v in changes.items() if v is not None}
        )
        spec = RunSpec(
            method=method,
            parameters=plugin.settings(dict(settings or {})),
            dataset=dataset,
            target=target or card.default_target,
            seed=seed,
            attack_seed=attack_seed,
            guidance_scales=guidance_scales or defaults.guidance_scales,
            images_per_scale=images or defaults.images_per_scale,
            label=label,
            sampling=sampling,
            device=resolve_device(device) if here else device,
        )
    except ValidationError as error:
        raise MembenchError(explain(error)) from None
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the record says
    torch.backends.cudnn.deterministic = True
    place = spec.device if here else "cpu"
    model = loaded.target(registry, data, spec.target, results, place)
    spec = spec.model_copy(update={"target": model.name})  # a place has a name of its own
    try:
        ddim_times(spec.sampling.steps, len(model.abar))
    except ValueError as error:
        raise MembenchError(f"--steps: {error}") from None
    computed(model, Arithmetic(sampling.precision, sampling.compile))  # or it says why not
    check_devices(search_on)
    if sampling.compile and here:
        check_compiler(spec.device)

    store, seed = Store(results), spec.attack_seed
    lab = Lab(
        data,
        model,
        store,
        progress,
        spec.device,
        seed,
        registry,
        descriptor_weights,
        similarity,
        search_on,
    )
    return build_cell(spec, plugin, lab)


def build_cell(spec: RunSpec, plugin: Method, lab: Lab) -> Cell:
    """Let the method put its artifacts together; nothing is computed."""
    surrogate = plugin.prepare(lab, **spec.parameters)
    if surrogate is not None and not isinstance(surrogate, Surrogate):
        raise MembenchError(
            f"{plugin.origin}: method {plugin.name!r} returned {type(surrogate).__name__}, "
            "expected a Surrogate or None"
        )
    images = {
        scale: lab.images(
            surrogate,
            scale,
            count=spec.images_per_scale,
            seed=spec.seed,
            sampling=spec.sampling,
            label=spec.label if surrogate else None,
        )
        for scale in ((0.0,) if surrogate is None else spec.guidance_scales)
    }
    matcher = lab.matcher
    matches = {s: matcher.matches(found, title=f"matches at {s:g}") for s, found in images.items()}
    return Cell(spec, plugin, lab, surrogate, images, matches, matcher.null(), matcher.facts())


def run(cell: Cell) -> dict[str, Any]:
    """Compute a cell, write its folder and return its record.

    What is in the store already is taken from there; a killed run goes on where it was.
    """
    started = datetime.now(UTC)
    store = cell.lab.store
    generated = {scale: store.get(images) for scale, images in cell.images.items()}
    matches = {scale: store.get(found) for scale, found in cell.matches.items()}
    null, similarity = store.get(cell.null), cell.similarity
    keep = store.get(cell.facts).null_rows(similarity)
    calibration = calibrate_from(null, keep, similarity)
    scores = score_all(matches, calibration, similarity)
    attack = _attack(cell, generated)

    folder = cell.folder
    with writing(folder), locked(folder.with_name(f".{folder.name}.lock")):
        link_or_copy(store.folder(cell.null) / MATCHES, folder / NULL)
        link_or_copy(store.folder(cell.facts) / FACTS, folder / FACTS)
        for scale in cell.images:
            images_folder = store.folder(cell.images[scale])
            matches_folder = store.folder(cell.matches[scale])
            link_or_copy(images_folder / IMAGES, folder / f"images-{scale:g}.npy")
            link_or_copy(matches_folder / MATCHES, folder / f"matches-{scale:g}.npz")
        files = {
            path.name: file_hash(path)
            for path in sorted(folder.iterdir())
            if path.suffix in (".npy", ".npz") and not path.name.startswith(".")
        }
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "id": cell.id,
            "limited": bool(departs := departures(cell)),
            "limited_by": departs,
            "identity": cell.identity,
            "calibration": calibration.to_dict(),
            "null": null_facts(null, keep, similarity),
            "scores": scores,
            "per_image": per_image(matches, calibration, similarity),
            "incidence": incidence(matches, calibration, similarity),
            "attack": attack,
            "files": files,
        }
        record = json.loads(canonical_json(record))  # as it will be read: lists, no tuples
        record["results_sha256"] = seal(record)
        record["cost"] = cost_of(store.bill(cell.artifacts))
        record["provenance"] = provenance(
            started,
            cell.spec.device,
            method_source_sha256=cell.method.source_sha256,
            **origin_of(cell.lab.target),
        )
        if cell.card.show_images:
            contact_sheet(
                folder / SHEET,
                {scale: images.images for scale, images in generated.items()},
                matches,
                cell.lab.dataset.members.images,
                title=table.title(record),
            )
        write_json(folder / RECORD, record)
    return record


def departures(cell: Cell) -> list[str]:
    """Where a run departs from its card: such records are marked and never enter a board."""
    return limits.departures(cell.identity, cell.card, guided=cell.surrogate is not None)


def _attack(cell: Cell, generated: Mapping[float, Generated]) -> dict[str, Any]:
    """What is needed to tell a bad attack from a bad classifier."""
    attack: dict[str, Any] = {
        "surrogate": None if cell.surrogate is None else cell.surrogate.title,
        "guidance_ratio": {f"{s:g}": images.report for s, images in generated.items()},
    }
    if cell.surrogate is not None and any(scale > 0 for scale in cell.images):
        attack["classifier"] = cell.lab.report(cell.surrogate.classifier)
    return attack


def cost_of(stages: list[Stage]) -> dict[str, Any]:
    """Model calls and seconds of every stage when it was made; `cached`: made by an earlier run."""
    lines = [{"stage": s.stage, "cached": s.cached} | vars(s.work) for s in stages]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "stages": lines,
        "unet_calls": sum(s.work.unet_calls for s in stages),
        "classifier_calls": sum(s.work.classifier_calls for s in stages),
        "seconds": round(sum(s.work.seconds for s in stages), 3),
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }
