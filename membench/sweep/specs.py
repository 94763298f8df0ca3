"""The sweep file: which cells, in how many shards, with which resources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from membench.errors import MembenchError
from membench.specs_base import Spec, described

Setting = bool | int | float | str
STAGES = ("train", "plan", "check", "images", "classifier", "labels", "descriptors", "matches",
          "facts", "record", "board")  # fmt: skip
ON_DEVICE = ("train", "check", "images", "classifier", "labels", "descriptors")
"""Stages that compute on the sweep's device; the others never need a GPU."""


class Resources(Spec):
    """What one task of a stage asks for.

    gpus, cpus: of one task; a worker uses `cpus` threads. memory: in GiB. minutes: a task that
    takes longer is stopped at a batch boundary and goes on in another attempt. `train` uses one GPU
    at most, `matches` none unless it is asked for. concurrency: how many tasks of this stage run at
    a time. tasks_per_job: how many of them one Slurm job does, one after the other, for tasks that
    take less than a job does to start; minutes is then the limit of the job. extra: options of
    sbatch, as in { qos = "long" }. `local` starts no more tasks than have room in the machine's
    memory; only `slurm` looks at tasks_per_job, partition, account, constraint and extra.
    """

    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=1, gt=0)
    memory: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, gt=0)
    tasks_per_job: int = Field(default=1, gt=0)
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    extra: dict[str, Setting] = Field(default_factory=dict)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class MethodChoice(Spec):
    """A method and what it does differently from the rest of the sweep."""

    name: str
    parameters: dict[str, Setting] = Field(default_factory=dict)
    guidance_scales: tuple[float, ...] | None = None
    images: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None
    label: int | None = Field(default=None, ge=0)

    @property
    def settings(self) -> dict[str, str]:
        """The parameters as texts, as `--set` takes them."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.parameters.items()
        }


class DatasetChoice(Spec):
    """A data set and, if they are not the sweep's, its targets."""

    name: str
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)


class SimilarityChoice(Spec):
    """How images are compared, where it is not as the card says; as the options of `run`."""

    flips: bool = False
    dedup_reference: bool = False
    descriptor: str | None = None
    preset: str | None = None
    input_size: int | None = Field(default=None, gt=0)


class SweepSpec(Spec):
    """Methods x data sets x targets x mitigations x seeds, each at all guidance scales.

    What is left out is the data set's default. shards: in how many tasks the images of a cell are
    made. concurrency: tasks at a time, of all stages. retries: of a task that failed for a cause
    outside the code. plugins, data, descriptor_weights: paths relative to the sweep file.
    resources: by stage; `default` is what the others start from.
    """

    name: str = ""
    methods: tuple[Annotated[MethodChoice, BeforeValidator(_named)], ...] = Field(min_length=1)
    datasets: tuple[Annotated[DatasetChoice, BeforeValidator(_named)], ...] = Field(min_length=1)
    targets: tuple[str, ...] = ()
    mitigations: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    attack_seed: int = 0
    guidance_scales: tuple[float, ...] | None = None
    images: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None
    similarity: SimilarityChoice = SimilarityChoice()
    device: str = "auto"
    executor: Literal["inline", "local", "slurm"] = "local"
    shards: int = Field(default=1, gt=0)
    concurrency: int | None = Field(default=None, gt=0)
    retries: int = Field(default=2, ge=0)
    plugins: tuple[str, ...] = ()
    data: str | None = None
    descriptor_weights: str | None = None
    resources: dict[str, Resources] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _stages_start_from_the_default(cls, content: Any) -> Any:
        stages = content.get("resources") if isinstance(content, dict) else None
        if not isinstance(stages, dict):
            return content
        base = stages.get("default")
        merged = {
            name: {**base, **own} if isinstance(base, dict) and isinstance(own, dict) else own
            for name, own in stages.items()
        }
        return {**content, "resources": merged}

    @field_validator("mitigations")
    @classmethod
    def _no_mitigations_yet(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != ("none",):
            raise ValueError('expected ["none"]: this membench has no mitigations yet')
        return names

    @field_validator("resources")
    @classmethod
    def _stages_are_known(cls, stages: dict[str, Resources]) -> dict[str, Resources]:
        for name in stages:
            if name not in ("default", *STAGES):
                raise ValueError(f"no stage named {name!r}; there are default, {', '.join(STAGES)}")
        return stages

    @field_validator("seeds", "targets")
    @classmethod
    def _nothing_is_named_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice")
        return values

    def resources_of(self, stage: str, device: str = "cpu") -> Resources:
        """What a task of this stage asks for; on a CUDA device one GPU, if none is asked for."""
        asked = self.resources.get(stage) or self.resources.get("default") or Resources()
        gpus = asked.gpus
        if device.startswith("cuda") and stage in ON_DEVICE:
            gpus = max(1, gpus)
        if stage == "train":
            gpus = min(1, gpus)
        return asked.model_copy(update={"gpus": gpus})


def load_sweep(path: Path) -> SweepSpec:
    """Read and validate a sweep file; a `MembenchError` names the file and the field."""
    with described(path, "sweep file") as content:
        spec = SweepSpec.model_validate(content)
    name = spec.name or path.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise MembenchError(f"{path}: name: {name!r}, expected letters, digits, '-', '_' and '.'")
    return spec.model_copy(update={"name": name})
