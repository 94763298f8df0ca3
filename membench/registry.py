"""The one registry: names of methods and data sets, where they come from, and what is broken.

Names are file names, so that looking one up imports nothing else. Sources, in this order: the
folders that come with membench, the entry-point group `membench.plugins`, and the folders a user
names with `--plugins`. Two plugins of one name are an error that names both.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from membench.errors import MembenchError
from membench.hashing import content_hash, file_hash
from membench.plugins import Method
from membench.specs import DataCard, load_card

ENTRY_POINTS = "membench.plugins"


@dataclass(frozen=True)
class Source:
    """A plugin that has a name and a place, but is not imported yet."""

    name: str
    origin: str
    path: Path | None = None
    module: str | None = None
    entry_point: importlib.metadata.EntryPoint | None = None


@dataclass(frozen=True)
class Broken:
    """A plugin that cannot be used, and why."""

    name: str
    origin: str
    reason: str


def _package_folder(package: str) -> Path:
    """Where `membench_methods.extraction` or `membench_datasets` lies (no `__init__.py` there)."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    checkout = Path(__file__).parent.parent / package.removeprefix("membench_").replace(".", "/")
    if checkout.is_dir():  # never installed: the names exist only as folders
        return checkout
    raise MembenchError(f"{package}: not installed; install membench again")


class Registry:
    """All methods and data sets that can be named; `folders` are the user's `--plugins`."""

    def __init__(self, folders: Iterable[Path] = ()):
        self.folders = tuple(folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise MembenchError(f"{folder}: --plugins expects a folder")
        self.methods = self._method_sources()
        self.datasets = self._dataset_sources()

    def _method_sources(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for path in _plugin_files(_package_folder("membench_methods.extraction"), "*.py"):
            module = f"membench_methods.extraction.{path.stem}"
            _add(found, Source(path.stem, str(path), path, module))
        for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS)):
            _add(found, Source(entry.name, f"entry point {entry.value}", entry_point=entry))
        for folder in self.folders:
            for path in _plugin_files(folder, "*.py"):
                _add(found, Source(path.stem, str(path), path))
        return found

    def _dataset_sources(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for folder in (_package_folder("membench_datasets"), *self.folders):
            for path in _plugin_files(folder, "*.toml"):
                _add(found, Source(path.stem, str(path), path))
        return found

    def method(self, name: str) -> Method:
        """The method of that name; `MembenchError` if there is none or it is broken."""
        source = self.methods.get(name)
        if source is None:
            raise unknown("method", name, self.methods)
        result = _load_method(source)
        if isinstance(result, Broken):
            raise MembenchError(f"{result.origin}: method {name!r} is broken: {result.reason}")
        return result

    def card(self, name: str) -> DataCard:
        """The data card of that name; `MembenchError` if there is none or it is not valid."""
        return load_card(self._card_path(name))

    def data_folder(self, name: str) -> Path:
        """Where the prepared arrays of a data set lie: a folder of its name beside its card."""
        return self._card_path(name).with_suffix("")

    def _card_path(self, name: str) -> Path:
        source = self.datasets.get(name)
        if source is None or source.path is None:
            raise unknown("data set", name, self.datasets)
        return source.path

    def all_methods(self) -> list[Method | Broken]:
        """Every method, the broken ones with their reason."""
        return [_load_method(source) for _, source in sorted(self.methods.items())]

    def all_cards(self) -> list[DataCard | Broken]:
        """Every data card, the invalid ones with their reason."""
        cards: list[DataCard | Broken] = []
        for name, source in sorted(self.datasets.items()):
            try:
                cards.append(self.card(name))
            except MembenchError as error:
                cards.append(Broken(name, source.origin, str(error)))
        return cards


def _plugin_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(("_", ".")))


def _add(found: dict[str, Source], source: Source) -> None:
    other = found.get(source.name)
    if other is not None:
        raise MembenchError(
            f"two plugins are named {source.name!r}: {other.origin} and {source.origin}; rename one"
        )
    found[source.name] = source


def unknown(kind: str, name: str, known: Iterable[str]) -> MembenchError:
    """`no method named 'side-c'; did you mean 'side_c'?`"""
    names = sorted(known)
    close = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names) or 'none'}"
    return MembenchError(f"no {kind} named {name!r}; {hint}")


def _load_method(source: Source) -> Method | Broken:
    try:
        return _described(source, _import(source))
    except (Exception, SystemExit) as error:  # a plugin may fail in any way at all
        return Broken(source.name, source.origin, f"{type(error).__name__}: {error}")


def _described(source: Source, loaded: Any) -> Method | Broken:
    methods = [loaded] if isinstance(loaded, Method) else _methods_of(loaded)
    if len(methods) != 1:
        reason = f"expected one function under @extraction, found {len(methods)}"
        return Broken(source.name, source.origin, reason)
    method = methods[0]
    code = method.prepare.__code__
    return replace(
        method,
        name=source.name,
        origin=f"{code.co_filename}:{code.co_firstlineno}",
        source_sha256=_source_hash(code.co_filename),
    )


def _methods_of(module: Any) -> list[Method]:
    return [value for value in vars(module).values() if isinstance(value, Method)]


def _source_hash(filename: str) -> str:
    path = Path(filename)
    return file_hash(path) if path.is_file() else content_hash(filename)


def _import(source: Source) -> ModuleType | Any:
    if source.entry_point is not None:
        return source.entry_point.load()
    assert source.path is not None
    if source.module is not None:
        try:
            return importlib.import_module(source.module)
        except ModuleNotFoundError as error:
            if not source.module.startswith(error.name or "?"):
                raise
    name = f"membench_plugin_{content_hash(str(source.path.resolve()))[:12]}_{source.path.stem}"
    spec = importlib.util.spec_from_file_location(name, source.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
