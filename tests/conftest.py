"""Shared by all tests: the registry, the embedded data set, a small lab, and the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: each, and what it starts, on one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from membench.contract import silent, small_dataset
from membench.data.imageset import Dataset, load_dataset
from membench.diffusion.targets import OracleTarget
from membench.lab import Lab
from membench.registry import Registry
from membench.store import Store

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="session")
def fashion_mini(registry: Registry) -> Dataset:
    return load_dataset(registry.card("fashion_mini"), registry.data_folder("fashion_mini"))


@pytest.fixture(scope="session")
def small(registry: Registry) -> Dataset:
    """The 64 members of the contract tests, with light settings."""
    return small_dataset(registry)


@pytest.fixture
def lab(small: Dataset, tmp_path: Path) -> Lab:
    """`oracle:0.5` over the small data set, nothing computed yet."""
    return Lab(small, OracleTarget(small, 0.5), Store(tmp_path / "results"), silent)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `membench ARGUMENTS` in an empty folder and return what it printed."""

    def call(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "membench.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in result.stderr, result.stderr
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return call
