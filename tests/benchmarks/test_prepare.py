"""Speed and memory of `membench prepare`: python -m pytest tests/benchmarks/test_prepare.py -s

Against a plain Pillow loop over the same images, in turns, by the clock on the wall: `prepare`
decodes in several processes. On two idle cores the target is 1.6 times. Set MEMBENCH_TEST_DATA to a
folder with cifar10_jpg32.zip (60,000 JPEGs of CIFAR-10 in train|test/CLASS/NAME.jpg); without it
12,000 noisy images of the same kind are made.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from turns import Timed, take_turns

from membench.registry import Registry

CLASSES = ("airplane", "ship")
PREPARE = """
import json, multiprocessing, os, sys, threading, time
from pathlib import Path
from rich.console import Console
from membench.console import Stages
from membench.data.prepare import prepare
from membench.specs import load_card

def peak(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)

def watch(peaks):
    while True:
        for process in multiprocessing.active_children():
            try:
                peaks[process.pid] = peak(process.pid)
            except OSError:
                pass
        time.sleep(0.05)

if __name__ == "__main__":
    card, source, data = load_card(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    peaks = {}
    threading.Thread(target=watch, args=[peaks], daemon=True).start()
    started = time.perf_counter()
    done = prepare(card, data, source, data, Stages(Console(), quiet=True))
    seconds = time.perf_counter() - started
    kib = [peak(os.getpid()), *peaks.values()]
    found = {"seconds": seconds, "decoding": done.seconds, "images": done.images, "kib": kib}
    times = os.times()
    found |= {"cpu": sum(times[:4]), "own": times.user + times.system}
    print(json.dumps(found))
"""


def _made(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for part, share in (("train", count * 5 // 6), ("test", count // 6)):
            for i in range(share):
                small = rng.integers(0, 256, (8, 8, 3), np.uint8)
                image = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
                stream = io.BytesIO()
                image.save(stream, "JPEG", quality=90)
                archive.writestr(f"{part}/{CLASSES[i % 2]}/{i:05d}.jpg", stream.getvalue())
    return path


def _card(folder: Path, count: int) -> Path:
    """The card of cifar10, with counts of its own where the archive is made here."""
    text = Path(Registry().datasets["cifar10"].origin).read_text()
    if count != 60_000:
        lines = [line for line in text.splitlines() if not line.startswith("index_sha256")]
        text = "\n".join(lines).replace("count = 60000", f"count = {count}")
        text = text.replace("count = 50000", f"count = {count * 5 // 6}")
        text = text.replace("count = 8000", f"count = {count // 6 - 100}")
        text = text.replace("count = 2000", "count = 100")
    path = folder / "cifar10.toml"
    path.write_text(text)
    return path


def _plain_loop(source: Path) -> np.ndarray:
    """What a few lines with Pillow do: every image of the archive, uint8 [N, 32, 32, 3]."""
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for i, name in enumerate(names):
            images[i] = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
    return images


def test_prepare_against_a_plain_pillow_loop(benchmark: Any, tmp_path: Path) -> None:
    given = Path(os.environ.get("MEMBENCH_TEST_DATA", "/nowhere")) / "cifar10_jpg32.zip"
    source = given if given.is_file() else _made(tmp_path / "made.zip", 12_000)
    with zipfile.ZipFile(source) as archive:
        count = len(archive.namelist())
    script, card = tmp_path / "script.py", _card(tmp_path, count)
    script.write_text(PREPARE)

    def ours() -> Timed:
        with tempfile.TemporaryDirectory(dir=tmp_path) as data:
            call = [sys.executable, script, card, source, data]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        return Timed(result["seconds"], result)

    what = f"prepare {count:,} JPEGs of 32 x 32, checked and hashed"
    loop, cores = "a plain Pillow loop", len(os.sched_getaffinity(0))
    peers = {loop: lambda: _plain_loop(source)}
    found = take_turns(benchmark, what, ours, peers, clock="wall", threads=cores)

    result = found["ours"]
    assert result["images"] == len(found[loop]) == count
    mib = [kib / 1024 for kib in result["kib"]]
    print(
        f"{count / result['decoding']:,.0f} images/s decoding, processor time {result['cpu']:.1f} "
        f"s, {result['own']:.1f} s of it in the parent; peak memory of all processes "
        f"{' + '.join(f'{part:.0f}' for part in mib)} = {sum(mib):.0f} MiB"
    )
    assert sum(mib) < 500
    if cores >= 2 and benchmark.extra_info.get("load", 1.0) < 0.5:
        assert benchmark.extra_info["ratios"][loop]["median"] > 1.6
