"""Every card from its official layout to arrays, by the same code as the whole data sets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sources
from PIL import Image

from membench.contract import silent
from membench.data import pool
from membench.data import prepare as preparing
from membench.data.imageset import Dataset, load_dataset
from membench.data.prepare import Prepared, prepare
from membench.data.splits import draw_splits
from membench.errors import MembenchError
from membench.hashing import array_file_hash, array_hash
from membench.registry import Registry
from membench.specs import SPLITS, DataCard, Draw

Source = Callable[[Path], Path]


def make(card: DataCard, source: Path, tmp_path: Path, **options) -> Prepared:
    beside = sources.lfw_list(tmp_path / "beside")
    return prepare(card, beside, source, tmp_path / "data", silent, **options)


LAYOUTS: dict[str, tuple[str, Source]] = {
    "cifar10 binary tar.gz": (
        "cifar10",
        lambda p: sources.write_tar(sources.cifar10_binary(), p / "cifar-10-binary.tar.gz").parent,
    ),
    "cifar10 binary unpacked": (
        "cifar10",
        lambda p: sources.write_folder(sources.cifar10_binary(), p / "x"),
    ),
    "cifar10 class folders zip": (
        "cifar10",
        lambda p: sources.write_zip(sources.cifar10_folders(), p / "c.zip"),
    ),
    "cifar10 class folders": (
        "cifar10",
        lambda p: sources.write_folder(sources.cifar10_folders(), p / "x"),
    ),
    "celeba zip": ("celeba", sources.celeba),
    "celeba25k official tree": (
        "celeba25k",
        lambda p: sources.celeba(p, unpacked=True, official_tree=True),
    ),
    "celebahq_fi zip": (
        "celebahq_fi",
        lambda p: sources.write_zip(sources.celebahq_fi(), p / "c.zip", packed=True),
    ),
    "imagenette tgz": (
        "imagenet",
        lambda p: sources.write_tar(sources.imagenet(imagenette=True), p / "imagenette2.tgz"),
    ),
    "ILSVRC folders": (
        "imagenet",
        lambda p: sources.write_folder(sources.imagenet(imagenette=False), p / "x"),
    ),
    "lfw tgz": ("lfw", lambda p: sources.write_tar(sources.lfw(flat=False), p / "lfw.tgz")),
    "lfw flat zip": ("lfw", lambda p: sources.write_zip(sources.lfw(flat=True), p / "lfw.zip")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_card_from_its_official_layout(layout: str, tmp_path: Path) -> None:
    """Manifest, splits, labels and pixels, the latter against Pillow called by hand."""
    name, source = LAYOUTS[layout]
    card = sources.card(name, **sources.SMALL[name])
    done = make(card, source(tmp_path / "source"), tmp_path)
    dataset = load_dataset(card, done.folder)

    assert not list((tmp_path / "data").glob(".*.partial"))
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest == done.manifest
    assert dataset.card.splits.model_dump() == manifest["splits"]
    names = (done.folder / "names.txt").read_text().splitlines()
    assert len(names) == card.preparation.count
    parts = [getattr(dataset, split) for split in SPLITS]
    index = np.concatenate([part.index for part in parts])
    assert len(set(index.tolist())) == len(index) <= len(names)
    for part in parts:
        for i in range(len(part)):
            file, _, label = names[part.index[i]].split("\t")
            assert dataset.card.images.classes[part.labels[i]] == _class(name, label)
            expected = _pixels(name, tmp_path / "source", file)
            if expected is not None:
                np.testing.assert_array_equal(part.images[i], expected, err_msg=file)


def _class(name: str, label: str) -> str:
    """The class that a folder's or a list's label stands for."""
    rule = sources.card(name).preparation
    if name == "imagenet":
        return sources.card(name).images.classes[rule.folders.index(label)]
    return label


def _pixels(name: str, source: Path, file: str) -> np.ndarray | None:
    """Version 1 of the resize rule, spelled out for each card's sizes."""
    number = Path(file.split("#")[0]).stem
    if "#" in file:  # CIFAR-10 binary
        batch, record = file.split("#")
        which = 5 if batch.startswith("test") else int(batch[11]) - 1
        return np.asarray(sources.picture(which * 6 + int(record), 32, 32))
    if name == "cifar10":
        return _decoded(sources.jpeg(int(number), 32, 32))
    if name.startswith("celeba") and name != "celebahq_fi":
        image = Image.open(io.BytesIO(sources.jpeg(int(number), 178, 218)))
        return np.asarray(image.resize((128, 156), Image.Resampling.BILINEAR))[14:142]
    if name == "celebahq_fi":
        image = Image.open(io.BytesIO(sources.jpeg(int(number), 256, 256)))
        return np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR))
    if name == "imagenet":
        i = int(number.split("_")[-1])
        if i == 7:
            return None  # the grey one: see test_grey_images_are_converted
        image = Image.open(io.BytesIO(sources.jpeg(i, 300 + i, 280)))
        width = int(256 * (300 + i) / 280)
        left = round((width - 256) / 2)
        resized = image.resize((width, 256), Image.Resampling.BILINEAR)
        return np.asarray(resized)[:, left : left + 256]
    people = [f"{p}_{i + 1:04d}" for p, n in sources.LFW_PEOPLE.items() for i in range(n)]
    image = sources.picture(people.index(number) + 1, 150, 150)
    return np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR))


def _decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lfw tgz", "lfw flat zip"),
        ("imagenette tgz", "ILSVRC folders"),
        ("cifar10 binary tar.gz", "cifar10 binary unpacked"),
        ("cifar10 class folders zip", "cifar10 class folders"),
    ],
)
def test_the_packing_does_not_matter(one: str, other: str, tmp_path: Path) -> None:
    found = []
    for layout in (one, other):
        name, source = LAYOUTS[layout]
        card = sources.card(name, **sources.SMALL[name])
        folder = tmp_path / layout.replace(" ", "_")
        found.append(make(card, source(folder / "source"), folder).manifest["splits"])
    assert found[0] == found[1]


def test_held_out_persons_are_not_members(tmp_path: Path) -> None:
    name, source = LAYOUTS["lfw flat zip"]
    card = sources.card(name, **sources.SMALL[name])
    done = make(card, source(tmp_path / "source"), tmp_path)
    dataset = load_dataset(card, done.folder)
    people = [set(getattr(dataset, split).labels.tolist()) for split in SPLITS]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    assert [len(found) for found in people] == [3, 1, 2]
    assert done.manifest["persons_shared_with_members"] == {"auxiliary": 0, "heldout": 0}


def test_imagenette_is_split_by_what_imagenet_trained_on(tmp_path: Path) -> None:
    name, source = LAYOUTS["imagenette tgz"]
    card = sources.card(name, **sources.SMALL[name])
    done = make(card, source(tmp_path / "source"), tmp_path)
    dataset = load_dataset(card, done.folder)
    names = (done.folder / "names.txt").read_text().splitlines()
    assert all("ILSVRC2012_val" not in names[row] for row in dataset.members.index)
    unseen = [*dataset.heldout.index, *dataset.auxiliary.index]
    assert all("ILSVRC2012_val" in names[row] for row in unseen) and len(unseen) == 10


def test_the_twin_is_compared_with_as_many_members(tmp_path: Path, fashion_mini: Dataset) -> None:
    name, source = LAYOUTS["cifar10 class folders zip"]
    card = sources.card(name, **sources.SMALL[name])
    dataset = load_dataset(card, make(card, source(tmp_path / "source"), tmp_path).folder)
    assert dataset.twin_is_smaller
    assert len(dataset.members_twin) == len(dataset.heldout_twin) == len(dataset.heldout) == 4
    np.testing.assert_array_equal(dataset.members_twin.index, dataset.members.index[:4])
    assert len(dataset.heldout_rest) == 0
    assert len(dataset.unseen) == 6
    assert not fashion_mini.twin_is_smaller
    assert len(fashion_mini.members_twin) == len(fashion_mini.members)


OFFICIAL = {
    "cifar10": {"test": 10_000, "train": 50_000},
    "celeba": {"train": 162_770, "val": 19_867, "test": 19_962},
    "celeba25k": {"train": 162_770, "val": 19_867, "test": 19_962},
    "imagenet": {"val": 500, "train": 12_894},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_lists_of_images_follow_from_counts_alone(name: str, registry: Registry) -> None:
    """The hashes in the cards are those of the rule applied to the official counts."""
    card, counts = registry.card(name), OFFICIAL[name]
    assert sum(counts.values()) == card.preparation.count
    parts = np.repeat(np.arange(len(counts)), list(counts.values()))
    found = draw_splits(card.preparation.draw, parts, list(counts), np.full(len(parts), -1))
    for split, rows in found.items():
        assert array_hash(rows) == getattr(card.splits, split).index_sha256
        assert len(rows) == getattr(card.splits, split).count


def test_lfw_lists_follow_from_its_list_of_images(registry: Registry) -> None:
    card = registry.card("lfw")
    lines = (registry.card_folder("lfw") / "images.csv").read_text().splitlines()
    stems = sorted(
        f"{person}_{int(i):04d}"
        for person, _, numbers in (line.partition(",") for line in lines)
        for i in numbers.split()
    )
    people = sorted({stem[:-5] for stem in stems})
    persons = np.array([people.index(stem[:-5]) for stem in stems])
    found = draw_splits(card.preparation.draw, np.zeros(len(stems), int), ["all"], persons)
    for split, rows in found.items():
        assert array_hash(rows) == getattr(card.splits, split).index_sha256


def test_a_draw_deals_every_unit_out_once_and_at_random() -> None:
    parts = np.repeat([0, 1], [900, 300])
    share = {"members": {"part": "a", "count": 500}, "auxiliary": {"part": "b", "count": 100}}
    rule = Draw.model_validate(share | {"heldout": {"part": "b"}})
    found = draw_splits(rule, parts, ["a", "b"], np.full(1200, -1))
    assert {name: len(rows) for name, rows in found.items()} == {
        "members": 500, "auxiliary": 100, "heldout": 200,
    }  # fmt: skip
    assert found["members"].max() < 900 <= found["heldout"].min()
    assert not set(found["auxiliary"].tolist()) & set(found["heldout"].tolist())
    # any prefix is a sample: the first fifth of the members is spread over the whole part
    first = np.sort(found["members"][:100]) / 900
    assert np.abs(first - (np.arange(100) + 0.5) / 100).max() < 0.17  # Kolmogorov, p about 0.005
    other = draw_splits(rule.model_copy(update={"seed": 1}), parts, ["a", "b"], np.full(1200, -1))
    assert (other["members"] != found["members"]).any()


def test_a_whole_data_set_is_not_prepared_twice_into_a_mixture(tmp_path: Path) -> None:
    """A failed second preparation leaves the first as it was."""
    card = sources.card("cifar10", **sources.SMALL["cifar10"])
    files = sources.cifar10_folders()
    done = make(card, sources.write_zip(files, tmp_path / "a.zip"), tmp_path)
    before = (done.folder / "manifest.json").read_bytes()
    files["train/bird/0002.jpg"] = b"no image"
    with pytest.raises(MembenchError, match="not an image"):
        make(card, sources.write_zip(files, tmp_path / "b.zip"), tmp_path)
    assert (done.folder / "manifest.json").read_bytes() == before
    load_dataset(card, done.folder)


def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "BATCH", 4)
    monkeypatch.setattr(preparing, "SYNC_SECONDS", 0.0)
    card = sources.card("cifar10", **sources.SMALL["cifar10"])
    source = sources.write_zip(sources.cifar10_folders(), tmp_path / "a.zip")
    whole = make(card, source, tmp_path / "whole")
    decoded = []
    run_job = pool.run_job

    def until_the_fifth(job):
        if len(decoded) == 4:
            raise KeyboardInterrupt
        decoded.append(len(job.items))
        return run_job(job)

    monkeypatch.setattr(pool, "run_job", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        make(card, source, tmp_path)
    with pytest.raises(MembenchError, match="is not prepared yet"):
        load_dataset(card, tmp_path / "data" / "cifar10")
    monkeypatch.setattr(pool, "run_job", run_job)
    resumed = make(card, source, tmp_path)
    assert resumed.decoded == whole.decoded - sum(decoded) == 36 - 16
    assert resumed.manifest == whole.manifest


def test_a_changed_source_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BATCH", 4)
    card = sources.card("cifar10", **sources.SMALL["cifar10"])
    files = sources.cifar10_folders()
    broken = files | {"train/truck/0029.jpg": files["train/truck/0029.jpg"][:300]}
    with pytest.raises(MembenchError, match=r"0029\.jpg: truncated"):
        make(card, sources.write_zip(broken, tmp_path / "a.zip"), tmp_path)
    done = make(card, sources.write_zip(files, tmp_path / "a.zip"), tmp_path)
    assert done.decoded == 36


KILLED = """
import sys, time
from pathlib import Path
if __name__ == "__main__":
    sys.path.insert(0, {tests!r})
    import sources
    from rich.console import Console
    from membench.console import Stages
    from membench.data import pool, prepare
    pool.BATCH, pool.FEW, prepare.SYNC_SECONDS = 16, 1, 0.0
    collect = pool._collect
    def slowly(waiting, finished):
        collect(waiting, finished)
        time.sleep(0.1)
    pool._collect = slowly
    card = sources.card("cifar10", count=600, draw__auxiliary__count=20, draw__heldout__count=80)
    root = Path({root!r})
    quiet = Stages(Console(), quiet=True)
    prepare.prepare(card, root, root / "a.zip", root / "data", quiet, workers=2)
"""


def test_a_killed_preparation_goes_on_and_leaves_no_process(tmp_path: Path) -> None:
    """kill -9 of the parent: workers end by themselves, finished batches are kept."""
    source = sources.write_zip(sources.cifar10_folders(600), tmp_path / "a.zip")
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
    process = subprocess.Popen([sys.executable, script])
    journal = tmp_path / "data" / ".cifar10.partial" / "journal.txt"
    children: list[int] = []
    deadline = time.monotonic() + 30
    while not journal.is_file() or journal.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if listed.is_file():
        children = [int(pid) for pid in listed.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)

    card = sources.card("cifar10", count=600, draw__auxiliary__count=20, draw__heldout__count=80)
    with pytest.raises(MembenchError, match="is not prepared yet"):
        load_dataset(card, tmp_path / "data" / "cifar10")
    saved, pool.BATCH = pool.BATCH, 16
    try:
        resumed = prepare(card, tmp_path, source, tmp_path / "data", silent)
    finally:
        pool.BATCH = saved
    assert 0 < resumed.decoded < 600
    whole = prepare(card, tmp_path, source, tmp_path / "whole", silent)
    assert resumed.manifest == whole.manifest


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_file_hash_of_an_array_is_its_array_hash(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, array in enumerate(
        (
            rng.integers(0, 256, (5000, 7, 3), np.uint8),
            rng.integers(0, 9, 11, np.int16),
            np.asfortranarray(rng.integers(0, 9, (5, 4), np.int32)),
            rng.integers(0, 9, (5, 4)).astype(">i4"),
            np.zeros((0, 3), np.uint8),
        )
    ):
        np.save(tmp_path / f"{i}.npy", array)
        assert array_file_hash(tmp_path / f"{i}.npy") == array_hash(array)
    by_hand = hashlib.sha256(b"|u1(2,)" + bytes([7, 8])).hexdigest()
    assert array_hash(np.array([7, 8], np.uint8)) == by_hand
