"""What a plugin file needs: decorators that make a function an extraction method or a descriptor.

    \"\"\"One line that says what the method does.\"\"\"
    from membench.plugins import Lab, Surrogate, extraction

    @extraction(title="My attack", paper="Doe 2027")
    def my_attack(lab: Lab, *, n_clusters: int = 50) -> Surrogate | None:
        synthetic = lab.synthetic()
        labels = lab.clusters(synthetic, n_clusters=n_clusters, min_cohesion=0.5)
        return lab.time_dependent(synthetic, labels)

The file's name is the method's name. Keyword arguments are its parameters: their defaults are the
method's defaults, they are recorded, and `--set n_clusters=20` changes one. The function computes
nothing itself: it puts together artifacts (`membench.lab.Lab`), which the engine makes when they
are needed, once for all methods that ask for the same. `None` means plain sampling.

A descriptor is a file of its own too:

    \"\"\"One line that says what the descriptor sees.\"\"\"
    from membench.plugins import Describe, Setup, descriptor

    @descriptor(title="Mean colour", paper="unpublished", dimensions=3)
    def mean_colour(setup: Setup) -> Describe:
        return lambda images: images.mean(axis=(1, 2)) + 1.0

The function loads what it needs and returns a function of images; the engine resizes them, runs it
in batches, and L2-normalises what it returns. Similarity is the inner product of two descriptors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.errors import MembenchError

if TYPE_CHECKING:
    import numpy as np

    from membench.lab import Lab, Surrogate
    from membench.similarity.preprocessing import Preprocessing

    Describe = Callable[[np.ndarray], np.ndarray]
else:
    Describe = Lab = Preprocessing = Surrogate = Any

__all__ = [
    "Describe",
    "Descriptor",
    "Lab",
    "Method",
    "Setup",
    "Surrogate",
    "Weights",
    "descriptor",
    "extraction",
]


@dataclass(frozen=True)
class Method:
    """An extraction method: its description and the function that prepares it."""

    title: str
    paper: str
    version: int
    summary: str
    prepare: Callable[..., Any]
    name: str = ""
    origin: str = ""
    source_sha256: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        return self.prepare

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the function and their defaults."""
        signature = inspect.signature(self.prepare)
        return {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def settings(self, changes: dict[str, str]) -> dict[str, Any]:
        """The parameters with `changes` (texts, as typed) put in the place of defaults."""
        settings = self.parameters
        for key, text in changes.items():
            if key not in settings:
                known = ", ".join(settings) or "none"
                raise MembenchError(f"{self.name}: no parameter named {key!r}; it has: {known}")
            settings[key] = _parse(f"{self.name}: {key}", text, settings[key])
        return settings


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = text if default is None else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise MembenchError(f"{name}: {text!r}, expected {kind.__name__}") from None


def extraction(
    *, title: str, paper: str, version: int = 1
) -> Callable[[Callable[..., Any]], Method]:
    """Turn a function into an extraction method; raise `version` when its results change."""

    def wrap(function: Callable[..., Any]) -> Method:
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        return Method(title, paper, version, summary, function)

    return wrap


@dataclass(frozen=True)
class Weights:
    """A published file; its size (bytes) and SHA-256 are checked before it is loaded.

    published: where it can be had. find: where it lies if a package brings it along (raises
    ImportError where that is not installed); without it the user gives the path.
    """

    file: str
    published: str
    sha256: str
    size: int
    find: Callable[[], Path] | None = None


@dataclass(frozen=True)
class Setup:
    """What a descriptor is loaded with: its checked weights, the device, and how images are made
    ready (they arrive resized; `preprocessing.normalise` gives what a network takes)."""

    weights: Path | None
    device: str
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Descriptor:
    """A descriptor: its description and the function that loads it.

    load: `Setup` -> function of images uint8 [B, H, W, 3] -> [B, D]. dimensions: D, or None where
    it depends on the input. preset: what prepares images if the choice does not say; None leaves
    them as they are. cpu_only: it never runs on the GPU.
    """

    title: str
    paper: str
    version: int
    summary: str
    load: Callable[[Setup], Describe]
    dimensions: int | None = None
    weights: Weights | None = None
    preset: str | None = None
    cpu_only: bool = False
    name: str = ""
    origin: str = ""
    source_sha256: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        return self.load


def descriptor(
    *,
    title: str,
    paper: str,
    dimensions: int | None = None,
    weights: Weights | None = None,
    preset: str | None = None,
    cpu_only: bool = False,
    version: int = 1,
) -> Callable[[Callable[[Setup], Describe]], Descriptor]:
    """Turn a function into a descriptor; raise `version` when what it computes changes."""

    def wrap(function: Callable[[Setup], Describe]) -> Descriptor:
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        return Descriptor(
            title, paper, version, summary, function, dimensions, weights, preset, cpu_only
        )

    return wrap
