"""What may be among the k nearest, as a GPU finds it: float32 products and short lists of ranks.

For each query the device keeps the `kept` > k references of lowest computed rank

    rank = |b|^2 / 2 - a.b,        a = x - c,  b = y - c,

which differs from the true one by at most the margin of `filter`, whatever the order of its sums.
If the last of the list ranks above the k-th by more than two margins, whatever is not listed is
farther than k that are: the list is `sure`, and exact distances of its entries settle the order.

Products must be full float32: TF32 is switched off. The same code runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from membench.errors import MembenchError
from membench.similarity.filter import Array, U, flat_rows, margin_of, n_features
from membench.similarity.pages import blocks
from membench.similarity.products import gamma

if TYPE_CHECKING:
    from torch import Tensor

Q_ROWS = 4096
"""Queries of a block: the references are sent to the device once for each."""
TILE = 2**26
"""Most float32 values of a product, or of the rows of a block of references, on a device."""


@dataclass(frozen=True)
class Listed:
    """Likely neighbours of a block of queries: rank [Q, kept] ascending, index int32 [Q, kept].

    sure: bool [Q], whether all k nearest are listed.
    """

    rank: NDArray[np.float32]
    index: NDArray[np.int32]
    sure: NDArray[np.bool_]


def present() -> str:
    """What this machine has, as torch names it: `cpu, cuda:0, cuda:1`."""
    import torch

    return ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def check_devices(names: Sequence[str]) -> None:
    """Raises `MembenchError` for a device that is not there."""
    import torch

    for name in names:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError):  # of a build without CUDA
            raise MembenchError(
                f"--search-on: {name!r} is not there; this machine has: {present()}"
            ) from None


def listed_blocks(
    queries: Array,
    reference: Array,
    centre: Array,
    k: int,
    kept: int,
    devices: Sequence[str],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[Array, Listed]]:
    """Blocks of the queries, in order, with their likely neighbours; one block a device at a time.

    queries, reference, progress: as for `nearest`; centre: a point near the mean.
    """

    def likely(block: Array, device: str) -> Listed:
        return _listed(block, reference, centre, k, kept, device)

    def done(block: Array, future: Future[Listed]) -> tuple[Array, Listed]:
        found = future.result()
        if progress is not None:
            progress(len(block) * len(reference))
        return block, found

    waiting: list[tuple[Array, Future[Listed]]] = []
    with _full_float32(), ExitStack() as pools:
        workers = [pools.enter_context(ThreadPoolExecutor(1)) for _ in devices]
        for number, (_, block) in enumerate(blocks(queries, Q_ROWS)):
            if len(waiting) == len(devices):
                yield done(*waiting.pop(0))
            at = number % len(devices)
            block = np.ascontiguousarray(block)  # mirrored images are a view
            waiting.append((block, workers[at].submit(likely, block, devices[at])))
        for pending in waiting:
            yield done(*pending)


def _listed(
    queries: Array, reference: Array, centre: Array, k: int, kept: int, device: str
) -> Listed:
    import torch

    d, exact = n_features(reference), queries.dtype == np.uint8
    r_rows = max(1, TILE // max(d, len(queries)))
    with torch.inference_mode():
        middle = _float64(flat_rows(centre[None]), device)
        a = _centred(queries, middle, device)
        values = torch.empty((len(a), 0), device=device)
        indices = torch.empty((len(a), 0), dtype=torch.int64, device=device)
        largest = 0.0
        for start, rows in blocks(reference, r_rows):
            b = _centred(rows, middle, device)
            b_squared = (b * b).sum(dim=1)
            largest = max(largest, float(b_squared.max()))
            rank = torch.addmm((b_squared / 2)[None], a, b.T, alpha=-1)
            some, at = rank.topk(min(kept, len(b)), dim=1, largest=False, sorted=False)
            values = torch.cat([values, some], dim=1)
            indices = torch.cat([indices, at + start], dim=1)
            if values.shape[1] > kept:
                values, at = values.topk(kept, dim=1, largest=False, sorted=False)
                indices = indices.gather(1, at)
        values, at = values.sort(dim=1)
        ranks, index = values.cpu().numpy(), indices.gather(1, at).cpu().numpy()
        a_norm = (a.double() ** 2).sum(dim=1).sqrt().cpu().numpy()
    b_norm = (largest / (1 - gamma(d + 4))) ** 0.5
    margin = margin_of(a_norm, b_norm, d, exact=exact)
    sure = np.full(len(queries), ranks.shape[1] == len(reference))
    sure |= ranks[:, -1].astype(np.float64) > ranks[:, k - 1] + 2 * margin * (1 + U)
    return Listed(ranks, index.astype(np.int32), sure)


def _float64(rows: Array, device: str) -> Tensor:
    import torch

    return torch.from_numpy(np.array(rows)).to(device).double()


def _centred(rows: Array, centre: Tensor, device: str) -> Tensor:
    """x - c as float32 [n, D]: exact for uint8, else rounded once."""
    return (_float64(flat_rows(rows), device) - centre).float()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 in float32, in all threads, whatever was set before."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
