"""Where a pretrained model lies: a file or folder of the user's, or a snapshot of a hub's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from membench.errors import MembenchError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXT_AND_TENSORS = ("*.json", "*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Place:
    """path: of a file or folder; commit: the hub's, if it came from there."""

    path: Path
    commit: str | None = None


def names_place(text: str) -> bool:
    """Whether a `--target` names a place on disk or a hub id, and not a target of a card."""
    path = Path(text).expanduser()
    return "/" in text or path.exists() or path.suffix in (".toml", ".safetensors", ".pt")


def locate(
    text: str, folders: Sequence[Path], revision: str | None = None, pickles: bool = False
) -> Place:
    """Find `text` below one of `folders` (or where it says, if absolute), else ask the hub.

    revision: of a hub id; pickles: fetch pickled weights too. Raises `MembenchError` when it is
    nowhere.
    """
    path = Path(text).expanduser()
    for folder in folders:
        if (folder / path).exists():
            if revision is not None:
                raise MembenchError(f"{folder / path}: revision is for hub ids, this is a folder")
            return Place(folder / path)
    if path.is_absolute() or text.startswith((".", "~")) or not HUB_ID.fullmatch(text):
        looked = ", ".join(str(folder / path) for folder in folders)
        raise MembenchError(f"{text}: no such file or folder (looked for {looked})")
    return _snapshot(text, revision, pickles)


def _snapshot(repository: str, revision: str | None, pickles: bool) -> Place:
    """A hub's files of one commit; those that are in the local cache need no network."""
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_AND_TENSORS, *(PICKLES if pickles else ())]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # of the network, of the hub, or of its cache: many classes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        at = f" at {revision}" if revision else ""
        raise MembenchError(
            f"{repository}{at}: no such folder, and not to be had from the hub ({reason}); "
            "without a network, give the folder of a downloaded copy"
        ) from None
    return Place(Path(folder), Path(folder).name)
