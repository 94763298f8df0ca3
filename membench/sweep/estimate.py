"""How long a sweep will take, by what the same kind of work took before in this results folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.files import read_json
from membench.store import MANIFEST, Artifact

Like = tuple[Any, ...]


@dataclass(frozen=True)
class Line:
    """One kind of work: how much is to do, and at what rate it was done before.

    units: model calls of `images` and `labels`, training images of a `classifier`, else artifacts.
    seconds: of all of it, None without an earlier record. earlier: artifacts the rate comes from.
    """

    kind: str
    device: str
    artifacts: int
    units: int
    unit: str
    seconds: float | None
    earlier: int


def estimate(results: Path, artifacts: Iterable[Artifact[Any]], device: str) -> list[Line]:
    """Lines for all artifacts given, those of one kind together."""
    rates = _Rates(results)
    sums: dict[str, list[Any]] = {}
    for artifact in artifacts:
        units, unit = _units(artifact.kind, artifact.identity, vars(artifact.planned))
        rate, earlier = rates.of(artifact)
        line = sums.setdefault(artifact.kind, [0, 0, unit, 0.0, 0])
        line[0] += 1
        line[1] += units
        line[3] = None if rate is None or line[3] is None else line[3] + units * rate
        line[4] = max(line[4], earlier)
    return [Line(kind, device, *line) for kind, line in sums.items()]


class _Rates:
    """Seconds a unit of finished artifacts: of the most similar work that was done before."""

    def __init__(self, results: Path):
        self.known: dict[Like, list[float]] = {}
        for path in sorted((results / "artifacts").glob(f"*/*/{MANIFEST}")):
            manifest = read_json(path)
            kind, identity, work = manifest["kind"], manifest["identity"], manifest["work"]
            units, _ = _units(kind, identity, work)
            for like in _like(kind, identity):
                entry = self.known.setdefault(like, [0.0, 0.0, 0])
                entry[0] += work["seconds"]
                entry[1] += units
                entry[2] += 1

    def of(self, artifact: Artifact[Any]) -> tuple[float | None, int]:
        for like in _like(artifact.kind, artifact.identity):
            if like in self.known and self.known[like][1]:
                seconds, units, count = self.known[like]
                return seconds / units, int(count)
        return None, 0


def _like(kind: str, identity: Mapping[str, Any]) -> list[Like]:
    """What work is compared with: the very same model first, then anything on the same device."""
    device = (identity.get("compute") or {}).get("device")
    if kind == "images":
        guided = "guidance" in identity
        target = repr(sorted(identity["target"].items(), key=lambda item: item[0]))
        return [(kind, device, guided, target), (kind, device, guided), (kind, device)]
    if kind == "classifier":
        return [(kind, device, repr(identity.get("network")), identity.get("timed"))]
    pixels = identity.get("members") or identity.get("images")
    return [(kind, device, pixels), (kind, device)]


def _units(kind: str, identity: Mapping[str, Any], work: Mapping[str, Any]) -> tuple[int, str]:
    if kind == "images":
        return work["unet_calls"], "model calls"
    if kind == "classifier":
        training = identity["training"]
        return training["steps"] * training["batch_size"], "training images"
    return 1, "artifacts"
