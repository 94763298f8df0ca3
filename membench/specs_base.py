"""The base of every description, and how a file of one is read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from membench.errors import MembenchError


class Spec(BaseModel):
    """Base of every description: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def identity(self) -> dict[str, Any]:
        """Everything in it, JSON-able: what goes into hashes."""
        return self.model_dump(mode="json")


@contextmanager
def described(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """The content of a TOML file, to be validated in the body.

    Raises `MembenchError` naming the file, and the field that pydantic complains of.
    """
    try:
        with open(path, "rb") as stream:
            content = tomllib.load(stream)
        yield content
    except OSError as error:
        raise MembenchError(f"{path}: {what} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MembenchError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise MembenchError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Pydantic's first complaint as `field: what is wrong`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{field}: {message}" if field else message
