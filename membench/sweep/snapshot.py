"""The code as it was submitted: what workers run, whatever is edited later.

    code/membench/              the package
    code/membench_methods/      methods and descriptors that come with it
    code/membench_datasets/     cards; folders of arrays and weights are links, hashes pin them
    code/plugins-1/, ...        the user's plugin folders
    code/code.json              SHA-256 of all of it, and the commit

`code/` on PYTHONPATH comes before what is installed. Plugins of entry points belong to installed
packages and are not copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import membench
from membench.files import write_json
from membench.hashing import content_hash, file_hash
from membench.provenance import CODE_FILE, git_commit
from membench.registry import package_folder

COPIED = (".py", ".toml", ".json", ".csv", ".txt")
LARGEST = 1 << 20
"""Bytes above which a file beside a plugin is linked, not copied."""
Item = tuple[Path, Path]
"""Where something lies, and where it goes below `code/`."""


def items(plugins: Sequence[Path]) -> tuple[list[Item], list[Item]]:
    """What is copied and what is linked, in a fixed order."""
    copied: list[Item] = []
    linked: list[Item] = []
    package = Path(membench.__file__).parent
    for path in _files(package):
        copied.append((path, Path("membench") / path.relative_to(package)))
    methods = package_folder("membench_methods")
    for path in _files(methods):
        copied.append((path, Path("membench_methods") / path.relative_to(methods)))
    _cards(package_folder("membench_datasets"), Path("membench_datasets"), copied, linked)
    for number, folder in enumerate(plugins, 1):
        _cards(folder, Path(f"plugins-{number}"), copied, linked)
    return copied, linked


def describe(plugins: Sequence[Path]) -> dict[str, Any]:
    """SHA-256 over names and contents of what would be copied, and the commit it is."""
    copied, _ = items(plugins)
    parts = sorted((place.as_posix(), file_hash(path)) for path, place in copied)
    return {"sha256": content_hash(parts), "git": git_commit()}


def take(plugins: Sequence[Path], to: Path, code: dict[str, Any]) -> None:
    """Copy the code to the folder `to`, whole or not at all; one already there is kept."""
    if to.is_dir():
        return
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copied, linked = items(plugins)
    for path, place in copied:
        (partial / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / place)
    for path, place in linked:
        (partial / place).parent.mkdir(parents=True, exist_ok=True)
        (partial / place).symlink_to(path.resolve())
    for number in range(1, len(plugins) + 1):
        (partial / f"plugins-{number}").mkdir(exist_ok=True)
    write_json(partial / CODE_FILE, code)
    try:
        partial.rename(to)
    except OSError:
        if not to.is_dir():  # else another process was faster
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def _cards(folder: Path, place: Path, copied: list[Item], linked: list[Item]) -> None:
    """A folder of plugins or cards: small files and packages are copied, the rest is linked."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        if path.is_dir():
            if (path / "__init__.py").is_file():
                copied += [(p, place / p.relative_to(folder)) for p in _files(path)]
            else:
                linked.append((path, place / path.name))
        elif path.suffix in COPIED and path.stat().st_size <= LARGEST:
            copied.append((path, place / path.name))
        else:
            linked.append((path, place / path.name))
