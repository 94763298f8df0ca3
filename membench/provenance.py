"""Where, when and by which code something was computed: beside results, never part of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from membench import __version__

CODE_FILE = "code.json"
"""Beside the package in a sweep's snapshot (`membench.sweep.snapshot`)."""


def provenance(started: datetime, device: str, **more: Any) -> dict[str, Any]:
    """Versions, machine, threads and times, JSON-able; `more` stands among them."""
    return {
        "membench": __version__,
        "git": git_commit(),
        **more,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def git_commit() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this code is from; None for an installed package.

    The snapshot that a sweep runs knows the checkout it was taken from.
    """
    here = Path(__file__).parent
    if (here.parent / CODE_FILE).is_file():
        commit: dict[str, Any] | None = json.loads((here.parent / CODE_FILE).read_text())["git"]
        return commit

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
