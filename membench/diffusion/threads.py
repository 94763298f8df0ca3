"""Threads of torch on the CPU: how a gradient is summed, and so its last bits, depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body, or a decorated function, with `count` CPU threads; GPUs are not concerned."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
