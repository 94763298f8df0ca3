"""Memory maps give their pages back, lose nothing, and no search needs memory for them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from membench.similarity.pages import blocks, gather, release

linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc to count resident pages"
)


def mapped_bytes():
    """Resident bytes of file mappings of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (32, 2**20), np.uint8))
    return tmp_path / "x.npy"


@linux
@pytest.mark.parametrize(
    "view", [lambda x: x, np.asarray, lambda x: np.asarray(x)[:, ::-1], lambda x: x[::-1]]
)
def test_pages_are_given_back_and_read_again(path, view):
    x = view(np.load(path, mmap_mode="r"))
    before = mapped_bytes()
    total = int(x.sum())
    assert mapped_bytes() - before > 30 * 2**20
    release(x)
    assert mapped_bytes() - before < 2 * 2**20
    assert int(x.sum()) == total


@linux
def test_blocks_hold_one_block_of_pages(path):
    x = np.load(path, mmap_mode="r")
    before, most, total = mapped_bytes(), 0, 0
    for start, block in blocks(x, 3):
        np.testing.assert_array_equal(block[0, :9], x[start, :9])
        total += int(block.sum())
        most = max(most, mapped_bytes() - before)
    assert total == int(np.load(path).sum()) and most < 8 * 2**20


@linux
def test_scattered_rows_are_gathered_piece_by_piece(path):
    x = np.load(path, mmap_mode="r").reshape(2**15, 2**10)
    rows = np.sort(np.random.default_rng(0).choice(len(x), 5000, replace=False))
    before = mapped_bytes()
    found = gather(x, rows)
    assert mapped_bytes() - before < 4 * 2**20
    np.testing.assert_array_equal(found, np.load(path).reshape(x.shape)[rows])


def test_changes_are_kept(path):
    """Shared maps write through; private ones hold what is in no file, and are left alone."""
    for mode, on_disk in (("c", False), ("r+", True)):
        x = np.load(path, mmap_mode=mode)
        old = int(x[5, 5])
        x[5, 5] = old ^ 1
        release(x)
        assert x[5, 5] == old ^ 1
        assert (np.load(path)[5, 5] == old ^ 1) == on_disk


def test_plain_arrays_and_empty_views_are_left_alone(path):
    x = np.arange(10)
    release(x[2:5])
    release(np.load(path, mmap_mode="r")[:0])
    assert x.tolist() == list(range(10))


SEARCH = """
import sys
import numpy as np
from pathlib import Path
from membench.similarity import nearest, tally, within
from membench.similarity.pairs import compiled, compiled_for_floats
from membench.similarity.products import engines

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

queries, reference = (np.load(path, mmap_mode="r") for path in sys.argv[1:3])
nearest(np.asarray(queries[:2]), np.asarray(queries[:2]), 1)
engines()  # loads torch, which every run has loaded
kernel = {"uint8": compiled, "float32": compiled_for_floats}.get(queries.dtype.name, lambda: None)()
if kernel is not None:  # a compiler is loaded and run once
    kernel(queries, queries, np.zeros(1, np.int32), np.zeros(1, np.int32), np.empty(1))
before, bound = peak(), int(sys.argv[3])
found = nearest(queries, reference, 50, memory_bytes=bound)
radius = found.distance[:, 9]
pairs = sum(len(q) for q, _, _ in within(queries, reference, radius, memory_bytes=bound))
counted = int(tally(queries, reference, [radius], memory_bytes=bound).count.sum())
print(peak() - before, pairs, counted, reference.nbytes)
"""


def peak_of_search(tmp_path, rows, n_queries, dtype, bound):
    """Growth of the peak of resident memory, maps included, in a process of its own.

    `VmHWM` is what `getrusage` calls maxrss, but does not start with that of the parent process.
    """
    rng = np.random.default_rng(0)
    for name, n in (("queries", n_queries), ("reference", rows)):
        out = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, (n, 512))
        for _, block in blocks(out, 10_000):
            if dtype == np.uint8:
                block[:] = rng.integers(0, 256, block.shape, dtype)
            else:
                block[:] = rng.standard_normal(block.shape, np.float32)
        out.flush()
    arguments = [str(tmp_path / f"{name}.npy") for name in ("queries", "reference")]
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, *arguments, str(bound)],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(int(number) for number in done.stdout.split())


@linux
@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_a_large_map_needs_no_memory(tmp_path, dtype):
    rows = 160_000 if dtype == np.float16 else 320_000
    bound = 16 * 2**20
    peak, pairs, counted, size = peak_of_search(tmp_path, rows, 64, dtype, bound)
    assert size > 150 * 2**20 and pairs == counted >= 640
    assert peak < bound + 48 * 2**20, f"{peak / 2**20:.0f} MiB"


@linux
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_map_of_a_gigabyte_needs_no_memory(tmp_path, dtype):
    rows = 2**30 // (512 * np.dtype(dtype).itemsize)
    bound = 128 * 2**20
    peak, pairs, counted, size = peak_of_search(tmp_path, rows, 500, dtype, bound)
    assert size > 2**30 - 2**12 and pairs == counted >= 5000
    assert peak < bound + 64 * 2**20, f"{peak / 2**20:.0f} MiB"
