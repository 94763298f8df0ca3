"""Files of weights that others wrote: safetensors, or pickled tensors for whoever insists."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from membench.errors import MembenchError
from membench.hashing import file_hash

SAFE = ".safetensors"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; `MembenchError` where it is missing or damaged."""
    if not path.is_file():
        raise MembenchError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, stream.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise MembenchError(f"{path}: truncated or not a safetensors file ({error})") from None


def read_weights(
    path: Path, sha256: str | None, allow_pickle: bool
) -> tuple[dict[str, Tensor], str]:
    """Tensors by name and the file's SHA-256, which is compared before anything is unpickled.

    Raises `MembenchError` naming the file when it is missing, damaged, another one than `sha256`
    says, pickled without `allow_pickle`, or holds anything but tensors.
    """
    if not path.is_file():
        raise MembenchError(f"{path}: no such weights file")
    pickled = path.suffix != SAFE
    if pickled and not allow_pickle:
        raise MembenchError(
            f"{path}: not a .safetensors file, and a pickle could run code when it is read; turn "
            "it into one (membench targets convert), or say allow_pickle = true with weights_sha256"
        )
    digest = file_hash(path)
    if sha256 not in (None, digest):
        raise MembenchError(f"{path}: SHA-256 is {digest}, expected {sha256}")
    return (read_pickled(path) if pickled else read_safetensors(path)[0]), digest


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file written by `torch.save`; only tensors are unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MembenchError(
            f"{path}: truncated, or holds more than tensors, which is not read ({reason})"
        ) from None
    if not isinstance(content, dict):
        raise MembenchError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise MembenchError(
                f"{path}: {name!r} is a {type(value).__name__}, expected tensors by name and "
                "nothing else"
            )
    return content
