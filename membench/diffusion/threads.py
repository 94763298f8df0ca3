"""Threads of torch on the CPU: how a gradient is summed, and so its last bits, depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the body with `count` threads if it computes on the CPU; elsewhere nothing changes."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
