"""Small sweeps: a light data set, methods that fail on purpose, and ways to run them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from membench.contract import silent
from membench.registry import Registry
from membench.sweep.dispatch import create, go
from membench.sweep.folder import Sweep
from membench.sweep.inline import Inline
from membench.sweep.plan import Plan, plan
from membench.sweep.specs import load_sweep

GUIDED = '''"""A guided method whose labels come from the function below."""
import numpy as np
from membench.plugins import Lab, Surrogate, extraction

def label(images: np.ndarray) -> np.ndarray:
    {body}
    return np.arange(len(images)) % 2

@extraction(title="Guided", paper="unpublished")
def {name}(lab: Lab) -> Surrogate | None:
    """Labels by position."""
    {prepare}
    synthetic = lab.synthetic()
    labels = lab.label_by(synthetic, label, version=1)
    return lab.time_dependent(synthetic, labels)
'''


def write_plugins(folder: Path, **bodies: str) -> Path:
    """The data set `tiny` and a guided method for each body of its label function."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = Path(Registry().datasets["fashion_mini"].origin)
    text = origin.read_text().replace('"fashion_mini"', '"tiny"')
    for old, new in {
        "synthetic_images = 2048": "synthetic_images = 32",
        "steps = 200\n": "steps = 4\n",
        "steps = 1200": "steps = 4",
        "evaluate_every = 25\n": "evaluate_every = 2\n",
        "evaluate_every = 100\n": "evaluate_every = 2\n",
        "steps = 50, eta": "steps = 3, eta",
        "batch_size = 64 }": "batch_size = 8 }",
        "warmup_steps = 50": "warmup_steps = 0",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "tiny.toml").write_text(text)
    if not (folder / "tiny").exists():
        (folder / "tiny").symlink_to(origin.with_suffix(""))
    for name, body in bodies.items():
        write_method(folder, name, body)
    return folder


YOUNG = """
[targets.young]
extends = "ddpm"
title = "Still to be trained"

[targets.young.unet]
block_out_channels = [8, 8, 8]
norm_num_groups = 4

[targets.young.training]
steps = {steps}
stop_at = {steps}
batch_size = 4
warmup_steps = 1
checkpoint_every = 5
evaluate_every = {half}
evaluate_images = 8
snapshots = [{half}]
"""


def with_young(file: Path, steps: int = 12) -> Path:
    """Give the data set of a sweep file a target whose weights nobody has trained yet."""
    card = file.parent / "plugins" / "tiny.toml"
    text = card.read_text()
    if "[targets.young]" not in text:
        card.write_text(text + YOUNG.format(steps=steps, half=steps // 2))
    return file


def write_method(folder: Path, name: str, body: str = "pass", prepare: str = "pass") -> None:
    code = GUIDED.format(name=name, body=body, prepare=prepare)
    (folder / f"{name}.py").write_text(code)


BASE: dict[str, Any] = {
    "methods": ["random"],
    "datasets": ["tiny"],
    "targets": ["oracle:0.3"],
    "images": 28,
    "batch_size": 4,
    "steps": 3,
    "device": "cpu",
    "plugins": ["plugins"],
}


def write_file(folder: Path, **changes: Any) -> Path:
    """`sweep.toml` with `plugins/` beside it; values are JSON, which TOML reads too."""
    write_plugins(folder / "plugins")
    lines = [f"{name} = {_toml(value)}" for name, value in (BASE | changes).items()]
    (folder / "sweep.toml").write_text("\n".join(lines) + "\n")
    return folder / "sweep.toml"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def planned(file: Path, results: Path, executor: str = "inline") -> tuple[Plan, Registry]:
    spec = load_sweep(file)
    registry = Registry([file.parent / folder for folder in spec.plugins])
    return plan(spec, file, registry, results, silent, executor=executor), registry


def made(file: Path, results: Path) -> Sweep:
    """The sweep's folder, nothing run yet."""
    found, registry = planned(file, results)
    return create(found, file, registry, results, "inline")[0]


def run_inline(file: Path, results: Path) -> Sweep:
    sweep = made(file, results)
    go(sweep, Inline())
    return sweep


def records(sweep: Sweep) -> list[dict[str, Any]]:
    """The records of all cells, which must all be there."""
    return [
        json.loads((sweep.results / cell.folder / "record.json").read_text())
        for cell in sweep.manifest.cells
        if cell.folder is not None
    ]


def seals(sweep: Sweep) -> list[tuple[str, str]]:
    """Ids and hashes of the results: two runs of the same cells are the same if these are."""
    return [(record["id"], record["results_sha256"]) for record in records(sweep)]


class Watcher(threading.Thread):
    """Looks at the parts of images as they are made; calls `act(pid)` once, when there are some.

    seen: for each part, the files (inode and time) that were seen in its place.
    """

    def __init__(self, sweep: Sweep, act: Callable[[int], object], parts: int = 2):
        super().__init__(daemon=True)
        self.sweep, self.act, self.parts = sweep, act, parts
        self.seen: dict[str, set[tuple[int, int]]] = {}
        self.acted = False
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.002):
            found = list((self.sweep.results / "artifacts/images").glob("*.partial/parts/*.json"))
            for path in found:
                try:
                    file = path.stat()
                    self.seen.setdefault(str(path), set()).add((file.st_ino, file.st_mtime_ns))
                except FileNotFoundError:
                    continue
            if len(found) >= self.parts and not self.acted:
                self._act()

    def _act(self) -> None:
        for task in self.sweep.tasks.values():
            attempts = self.sweep.attempts(task) if task.stage == "images" else []
            if attempts and attempts[-1].state == "running":
                self.acted = True
                self.act(attempts[-1].pid)
                return

    def stop(self) -> None:
        self.over.set()
        self.join()

    @property
    def twice(self) -> dict[str, set[tuple[int, int]]]:
        """Parts in whose place more than one file was seen: each is renamed into it when whole."""
        return {p: files for p, files in self.seen.items() if len({ino for ino, _ in files}) > 1}


def kill(pid: int) -> None:
    """What no process can answer."""
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
