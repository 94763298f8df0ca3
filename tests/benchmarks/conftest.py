"""What a saved benchmark says of its machine, beside what pytest-benchmark finds out."""

from __future__ import annotations

import os
from typing import Any

import machine
import pytest

LOAD_AT_START = os.getloadavg()[0]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds cores, memory, load and versions; takes the machine's name out."""
    machine_info.pop("node", None)
    machine_info |= machine.added() | {"load_at_start": LOAD_AT_START}
