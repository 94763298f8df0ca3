"""What a saved benchmark says of its machine, beside what pytest-benchmark finds out."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

LOAD_AT_START = os.getloadavg()[0]
PACKAGES = ("membench", "torch", "numpy", "faiss-cpu", "numba", "scikit-learn", "diffusers")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds cores, memory, load and versions; takes the machine's name out."""
    machine_info.pop("node", None)
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine_info["load_at_start"] = LOAD_AT_START
    machine_info["versions"] = dict(filter(None, map(_version, PACKAGES)))


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None
