"""What a plugin file needs: the decorator that turns a function into an extraction method.

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
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.errors import MembenchError

if TYPE_CHECKING:
    from membench.lab import Lab, Surrogate
else:
    Lab = Surrogate = Any

__all__ = ["Lab", "Method", "Surrogate", "extraction"]


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
