"""Artifacts on disk: found by the hash of what went in, made once, written whole or not at all.

An artifact lives in `ROOT/artifacts/KIND/KEY/` with a manifest that names its inputs and the
SHA-256 of every file. While it is made its folder ends in `.partial`; whoever makes it holds an
advisory lock, which the operating system drops when the process dies, and finds there what a
killed process had finished. A rename makes it whole.

Some artifacts are made of parts that do not depend on each other (batches of images). Several
processes can make them at a time, each under a lock of its own; whoever finishes last joins them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from membench.errors import MembenchError
from membench.files import claimed, locked, read_json, write_json, writing
from membench.hashing import content_hash, file_hash

T = TypeVar("T")
MakePart = Callable[[Path, int], None]
MANIFEST = "artifact.json"
PARTS = "parts"
"""Sub-folder for what a killed process leaves to the next; gone when the artifact is whole."""


@dataclass
class Work:
    """What making something cost: model calls count images, so a batch of 64 is 64 calls.

    seconds: of all batches added up, also of those that were made side by side.
    """

    unet_calls: int = 0
    classifier_calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Parts:
    """How an artifact's parts 0 .. count - 1 are made, in any order and by any process.

    begin: loads what all parts need and returns a function that computes part i into a folder's
    `PARTS` and writes `part_marker(folder, i)` last. session: what holds while parts are made; says
    how many may be made at a time, by threads.
    """

    count: int
    begin: Callable[[], MakePart]
    session: Callable[[], AbstractContextManager[int]] = lambda: nullcontext(1)

    def make_all(self, folder: Path, make: MakePart) -> Iterator[int]:
        """Make the parts that are not there; all come out in order, as soon as they are there."""

        def one(i: int) -> None:
            if not part_marker(folder, i).is_file():
                make(folder, i)

        with self.session() as at_a_time:
            for i, _ in _each(range(self.count), one, at_a_time):
                yield i


def _each(
    numbers: Iterable[int], work: Callable[[int], T], at_a_time: int
) -> Iterator[tuple[int, T]]:
    """Work on numbers, several at a time; results in order, and no more is begun after an error."""
    if at_a_time == 1:
        yield from ((i, work(i)) for i in numbers)
        return
    with ThreadPoolExecutor(at_a_time) as pool:
        futures = [(i, pool.submit(work, i)) for i in numbers]
        try:
            yield from ((i, future.result()) for i, future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def part_marker(folder: Path, i: int) -> Path:
    """The file that says that part `i` is whole; `folder` is the artifact's partial one."""
    return folder / PARTS / f"batch-{i:06d}.json"


@dataclass(frozen=True)
class Artifact(Generic[T]):
    """Something computed once: a recipe, not yet a result.

    identity: everything that could change the result, JSON-able; `inputs` enter it by their keys.
    make: computes it into a folder, which may hold what a killed process left, and adds the model
    calls it took to the `Work` it is given (and the seconds, if it knows better than the clock).
    load: reads the value from the finished folder. planned: the calls it will take (`--dry-run`).
    parts: how several processes can make it together; `make` takes what they left.
    """

    kind: str
    title: str
    identity: dict[str, Any]
    make: Callable[[Path, Work], None]
    load: Callable[[Path], T]
    inputs: tuple[Artifact[Any], ...] = ()
    planned: Work = field(default_factory=Work)
    parts: Parts | None = None

    @property
    def key(self) -> str:
        inputs = [artifact.key for artifact in self.inputs]
        return content_hash({"kind": self.kind, "identity": self.identity, "inputs": inputs})


@dataclass(frozen=True)
class Stage:
    """One line of a plan or of a bill."""

    stage: str
    key: str
    cached: bool
    work: Work


class Store:
    """The folder of all results; `root` is made when something is first written."""

    def __init__(self, root: Path):
        self.root = root
        self.stages: dict[str, Stage] = {}

    def folder(self, artifact: Artifact[Any]) -> Path:
        return self.root / "artifacts" / artifact.kind / artifact.key[:32]

    def partial(self, artifact: Artifact[Any]) -> Path:
        """Where it is being made, if it is."""
        return self.folder(artifact).with_suffix(".partial")

    def has(self, artifact: Artifact[Any]) -> bool:
        return (self.folder(artifact) / MANIFEST).is_file()

    def get(self, artifact: Artifact[T]) -> T:
        """The artifact's value: read if it is there, else computed, its inputs first."""
        return artifact.load(self.ensure(artifact))

    def ensure(self, artifact: Artifact[Any]) -> Path:
        """The artifact's folder, whole and checked: made, its inputs first, if it was not there."""
        folder = self.folder(artifact)
        cached = self.has(artifact)
        if not cached:
            for item in artifact.inputs:
                self.ensure(item)
            with writing(folder.parent), locked(folder.with_suffix(".lock")):
                cached = self.has(artifact)
                if not cached:
                    self._make(artifact, folder)
        if artifact.key not in self.stages:
            work = Work(**self.check(folder)["work"])
            self.stages[artifact.key] = Stage(artifact.title, artifact.key, cached, work)
            self._tidy(folder)
        return folder

    def make_parts(
        self, artifact: Artifact[Any], which: range, progress: Callable[[int], None]
    ) -> None:
        """Make parts `which` of an artifact beside other processes; whoever is last joins all.

        `progress(1)` after each part, also those that are there or made by another process.
        """
        assert artifact.parts is not None, f"{artifact.title} is not made of parts"
        folder, partial = self.folder(artifact), self.partial(artifact)
        if not self.has(artifact):
            for item in artifact.inputs:
                self.ensure(item)
        with writing(folder.parent), locked(folder.with_suffix(".lock"), shared=True):
            if not self.has(artifact):  # nobody makes it whole while the lock is held
                (partial / PARTS).mkdir(parents=True, exist_ok=True)
                self._make_parts(artifact.parts, partial, which, progress)
        if all(part_marker(partial, i).is_file() for i in range(artifact.parts.count)):
            self.ensure(artifact)

    def _make_parts(
        self, parts: Parts, partial: Path, which: range, progress: Callable[[int], None]
    ) -> None:
        left = [i for i in which if not part_marker(partial, i).is_file()]
        progress(len(which) - len(left))
        if not left:
            return
        make = parts.begin()

        def one(i: int) -> bool:
            marker = part_marker(partial, i)
            with claimed(marker.with_suffix(".lock")) as mine:
                if mine and not marker.is_file():
                    make(partial, i)
            return mine or marker.is_file()

        with parts.session() as at_a_time:
            while left:
                others = []  # made by another process right now
                for i, there in _each(left, one, at_a_time):
                    if there:
                        progress(1)
                    else:
                        others.append(i)
                left = others
                if left:
                    time.sleep(0.2)

    def _make(self, artifact: Artifact[Any], folder: Path) -> None:
        partial = self.partial(artifact)
        (partial / PARTS).mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a process killed before its rename
        work = Work()
        started = time.monotonic()
        artifact.make(partial, work)
        work.seconds = round(work.seconds or time.monotonic() - started, 3)
        for leftover in partial.glob(".*.partial"):  # of a process killed while it wrote
            leftover.unlink()
        files = sorted(path for path in partial.iterdir() if path.is_file())
        manifest = {
            "kind": artifact.kind,
            "title": artifact.title,
            "key": artifact.key,
            "identity": artifact.identity,
            "inputs": [item.key for item in artifact.inputs],
            "files": {path.name: file_hash(path) for path in files},
            "work": vars(work),
        }
        write_json(partial / MANIFEST, manifest)
        partial.rename(folder)

    def _tidy(self, folder: Path) -> None:
        """Remove the parts of an artifact that is whole."""
        if (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS, ignore_errors=True)

    def check(self, folder: Path) -> dict[str, Any]:
        """The manifest of a finished artifact, after comparing every file with its hash."""
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file() or file_hash(path) != expected:
                raise MembenchError(
                    f"{path}: missing, truncated or changed since it was written; "
                    f"delete {folder} and run again to recompute it"
                )
        return manifest

    def plan(self, artifacts: list[Artifact[Any]]) -> list[Stage]:
        """What `get` would do for these and their inputs, inputs first, each once."""
        return [
            Stage(artifact.title, artifact.key, self.has(artifact), artifact.planned)
            for artifact in with_inputs(artifacts)
        ]

    def bill(self, artifacts: list[Artifact[Any]]) -> list[Stage]:
        """What these, which are there, and their inputs cost when they were made, each once.

        Inputs that were not read, since what was made of them was there, are on it too: a run
        costs the same whichever run came first.
        """
        found = []
        for artifact in with_inputs(artifacts):
            stage = self.stages.get(artifact.key)
            if stage is None and self.has(artifact):
                work = Work(**read_json(self.folder(artifact) / MANIFEST)["work"])
                stage = Stage(artifact.title, artifact.key, True, work)
            if stage is not None:
                found.append(stage)
        return found


def with_inputs(artifacts: list[Artifact[Any]]) -> list[Artifact[Any]]:
    """Artifacts and all that goes into them, inputs first, each once."""
    seen: dict[str, Artifact[Any]] = {}

    def visit(artifact: Artifact[Any]) -> None:
        if artifact.key in seen:
            return
        for item in artifact.inputs:
            visit(item)
        seen[artifact.key] = artifact

    for artifact in artifacts:
        visit(artifact)
    return list(seen.values())
