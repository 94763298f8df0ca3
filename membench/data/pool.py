"""Decoding on all cores into array files, in constant memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from membench.data.decode import Job, Payload, Ref, Rule, Target, run_job
from membench.errors import MembenchError
from membench.specs import Images, Resize

BATCH = 256
"""Images in one job, at most."""
BATCH_BYTES = 4 << 20
"""Bytes in one job, about: what is streamed from a packed archive travels with it."""
FEW = 2 * BATCH
"""So many are decoded in this process: starting others would take longer."""

Work = tuple[int, int, str, Payload]
"""Which array, which position in it, the image's name, its bytes or where they lie."""


def rule_of(images: Images, resize: Resize | None) -> Rule:
    """What decoding needs to know; resize None: every image must have the size already."""
    if resize is None:
        return Rule(images.height, images.width, images.channels, resize=False)
    return Rule(
        images.height,
        images.width,
        images.channels,
        True,
        resize.source_sizes,
        resize.crop,
        resize.filter,
        resize.convert,
    )


def create_array(path: Path, shape: tuple[int, ...]) -> Target:
    """A .npy file of uint8 zeros whose space is taken at once, so that a full disk shows now."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        offset = stream.tell()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, offset + int(np.prod(shape)))
        else:
            stream.truncate(offset + int(np.prod(shape)))
    return Target(str(path), offset)


def existing_array(path: Path) -> Target:
    """The array file that an interrupted run was filling."""
    with open(path, "rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return Target(str(path), stream.tell())


def decode_all(
    work: Iterable[Work],
    targets: tuple[Target, ...],
    rule: Rule,
    *,
    total: int,
    workers: int | None = None,
    skip: frozenset[int] = frozenset(),
    finished: Callable[[int, int], None] = lambda number, count: None,
) -> None:
    """Decode every image into its place.

    Work is cut into numbered batches; `finished(number, count)` is told of each as it is done, and
    those in `skip` are passed over. workers: processes, by default one a core. Raises the first
    complaint of any of them.
    """
    workers = workers or len(os.sched_getaffinity(0))
    jobs = (
        (number, Job(rule, targets, items))
        for number, items in enumerate(_batches(work))
        if number not in skip
    )
    if workers == 1 or total <= FEW:
        for number, job in jobs:
            finished(number, run_job(job))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    waiting: dict[Future[int], int] = {}
    try:
        for number, job in jobs:
            waiting[pool.submit(run_job, job)] = number
            if len(waiting) >= 2 * workers + 8:
                _collect(waiting, finished)
        while waiting:
            _collect(waiting, finished)
    except BrokenProcessPool:
        raise MembenchError(
            "a decoding process was killed (out of memory?); run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: end with the parent, even a killed one, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_its_end, daemon=True).start()


def _batches(work: Iterable[Work]) -> Iterator[list[Work]]:
    batch: list[Work] = []
    size = 0
    for item in work:
        batch.append(item)
        payload = item[3]
        size += _in_job(payload)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_job(payload: Payload) -> int:
    if isinstance(payload, Ref):
        return 0
    return len(payload) if isinstance(payload, bytes) else payload.nbytes


def _collect(waiting: dict[Future[int], int], finished: Callable[[int, int], None]) -> None:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        number = waiting.pop(future)
        finished(number, future.result())
