"""The one registry: names of plugins and data sets, where they come from, and what is broken.

Names are file names, so that looking one up imports nothing else. Sources, in this order: the
folders that come with membench, the entry-point group `membench.plugins`, and the folders a user
names with `--plugins`. Whether a user's file is a method or a descriptor is known when it is
loaded. Two plugins of one name are an error that names both.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from membench.errors import MembenchError
from membench.hashing import content_hash, file_hash
from membench.plugins import Descriptor, Method
from membench.specs import DataCard, NotYet, load_card

ENTRY_POINTS = "membench.plugins"
Kind = Literal["method", "descriptor"]
Plugin = Method | Descriptor
FOLDERS: dict[str, Kind] = {"extraction": "method", "descriptor": "descriptor"}
"""Sub-folders of `methods/` that hold plugins."""


@dataclass(frozen=True)
class Source:
    """A plugin that has a name and a place, but is not imported yet; kind: if its place says it."""

    name: str
    origin: str
    path: Path | None = None
    module: str | None = None
    entry_point: importlib.metadata.EntryPoint | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Broken:
    """A plugin that cannot be used, and why; `kind` is what it seems to have been meant for."""

    name: str
    origin: str
    reason: str
    kind: Kind = "method"


@dataclass(frozen=True)
class Waiting:
    """A data set that membench cannot run yet, and what it waits for."""

    name: str
    origin: str
    reason: str


def package_folder(package: str) -> Path:
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
    """All plugins and data sets that can be named; `folders` are the user's `--plugins`.

    data: where `membench prepare` leaves its arrays; by default the environment's MEMBENCH_DATA,
    else `data` in the current folder.
    """

    def __init__(self, folders: Iterable[Path] = (), data: Path | None = None):
        self.folders = tuple(folders)
        self.data = data or Path(os.environ.get("MEMBENCH_DATA") or "data")
        for folder in self.folders:
            if not folder.is_dir():
                raise MembenchError(f"{folder}: --plugins expects a folder")
        self.plugins = self._plugin_sources()
        self.datasets = self._dataset_sources()
        self._loaded: dict[str, Plugin | Broken] = {}

    def _plugin_sources(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for folder_name, kind in FOLDERS.items():
            package = f"membench_methods.{folder_name}"
            for path in _plugin_files(package_folder(package), "*.py"):
                module = f"{package}.{path.stem}"
                _add(found, Source(path.stem, str(path), path, module, kind=kind))
        for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS)):
            _add(found, Source(entry.name, f"entry point {entry.value}", entry_point=entry))
        for folder in self.folders:
            for path in _plugin_files(folder, "*.py"):
                _add(found, Source(path.stem, str(path), path))
        return found

    def _dataset_sources(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for folder in (package_folder("membench_datasets"), *self.folders):
            for path in _plugin_files(folder, "*.toml"):
                _add(found, Source(path.stem, str(path), path))
        return found

    @property
    def methods(self) -> dict[str, Source]:
        """What is, or may turn out to be, an extraction method."""
        return {n: s for n, s in self.plugins.items() if s.kind in ("method", None)}

    @property
    def descriptors(self) -> dict[str, Source]:
        """What is, or may turn out to be, a descriptor."""
        return {n: s for n, s in self.plugins.items() if s.kind in ("descriptor", None)}

    def plugin(self, name: str, kind: str = "plugin") -> Plugin:
        """The plugin of that name; `MembenchError` if there is none or it is broken."""
        source = self.plugins.get(name)
        if source is None:
            known = {"method": self.methods, "descriptor": self.descriptors}
            raise unknown(kind, name, known.get(kind, self.plugins))
        result = self._load(source)
        if isinstance(result, Broken):
            kind = source.kind or kind
            raise MembenchError(f"{result.origin}: {kind} {name!r} is broken: {result.reason}")
        return result

    def method(self, name: str) -> Method:
        """The method of that name; `MembenchError` if there is none or it is broken."""
        found = self.plugin(name, "method")
        if not isinstance(found, Method):
            raise MembenchError(f"{found.origin}: {name!r} is a descriptor, not a method")
        return found

    def descriptor(self, name: str) -> Descriptor:
        """The descriptor of that name; `MembenchError` if there is none or it is broken."""
        found = self.plugin(name, "descriptor")
        if not isinstance(found, Descriptor):
            raise MembenchError(f"{found.origin}: {name!r} is a method, not a descriptor")
        return found

    def _load(self, source: Source) -> Plugin | Broken:
        if source.name not in self._loaded:
            self._loaded[source.name] = _load_plugin(source)
        return self._loaded[source.name]

    def card(self, name: str) -> DataCard:
        """The data card of that name; `MembenchError` if there is none or it is not valid."""
        return load_card(self._card_path(name))

    def data_folder(self, name: str) -> Path:
        """Where the arrays of a data set lie: beside its card if shipped, else where prepared."""
        beside = self.card_folder(name)
        shipped = (beside / "members.images.npy").is_file() or self.card(name).preparation is None
        return beside if shipped else self.data / name

    def card_folder(self, name: str) -> Path:
        """The folder of a data set's name beside its card: shipped arrays, lists and weights."""
        return self._card_path(name).with_suffix("")

    def _card_path(self, name: str) -> Path:
        source = self.datasets.get(name)
        if source is None or source.path is None:
            raise unknown("data set", name, self.datasets)
        return source.path

    def all_methods(self) -> list[Method | Broken]:
        """Every method, the broken ones with their reason."""
        loaded = [self._load(source) for _, source in sorted(self.methods.items())]
        return [
            item
            for item in loaded
            if isinstance(item, Method) or (isinstance(item, Broken) and item.kind == "method")
        ]

    def all_descriptors(self) -> list[Descriptor | Broken]:
        """Every descriptor, the broken ones with their reason."""
        loaded = [self._load(source) for _, source in sorted(self.descriptors.items())]
        return [
            item
            for item in loaded
            if isinstance(item, Descriptor)
            or (isinstance(item, Broken) and item.kind == "descriptor")
        ]

    def all_cards(self) -> list[DataCard | Broken | Waiting]:
        """Every data card, those that wait for something and the invalid ones with their reason."""
        cards: list[DataCard | Broken | Waiting] = []
        for name, source in sorted(self.datasets.items()):
            try:
                cards.append(self.card(name))
            except NotYet as error:
                cards.append(Waiting(name, source.origin, str(error)))
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


def _load_plugin(source: Source) -> Plugin | Broken:
    try:
        return _described(source, _import(source))
    except (Exception, SystemExit) as error:  # a plugin may fail in any way at all
        reason = f"{type(error).__name__}: {error}"
        return Broken(source.name, source.origin, reason, _meant_as(source))


def _described(source: Source, loaded: Any) -> Plugin | Broken:
    plugins = [loaded] if isinstance(loaded, Plugin) else _plugins_of(loaded)
    if len(plugins) != 1:
        wanted = {"method": "@extraction", "descriptor": "@descriptor"}
        under = wanted[source.kind] if source.kind else " or ".join(wanted.values())
        reason = f"expected one function under {under}, found {len(plugins)}"
        return Broken(source.name, source.origin, reason, _meant_as(source))
    plugin = plugins[0]
    code = plugin.function.__code__
    return replace(
        plugin,
        name=source.name,
        origin=f"{code.co_filename}:{code.co_firstlineno}",
        source_sha256=_source_hash(code.co_filename),
    )


def _plugins_of(module: Any) -> list[Plugin]:
    return [value for value in vars(module).values() if isinstance(value, Plugin)]


def _meant_as(source: Source) -> Kind:
    """The kind of a plugin that could not be loaded, by its text."""
    if source.kind is None and source.path is not None:
        text = source.path.read_bytes()
        return "descriptor" if b"@descriptor" in text else "method"
    return source.kind or "method"


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
