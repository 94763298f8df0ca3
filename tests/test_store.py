"""Artifacts: made once, whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membench.errors import MembenchError
from membench.files import link_or_copy, read_json, write_array, write_joined, write_json, writing
from membench.store import PARTS, Artifact, Store, Work


def number(value: int, made: list[int] | None = None, **identity: object) -> Artifact[int]:
    def make(folder: Path, work: Work) -> None:
        if made is not None:
            made.append(value)
        work.unet_calls += 7
        write_json(folder / "value.json", value)

    return Artifact(
        "number", f"number {value}", {"value": value, **identity}, make,
        lambda folder: read_json(folder / "value.json"), planned=Work(7),
    )  # fmt: skip


def test_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    store = Store(tmp_path)
    artifact = number(3, made)
    assert [stage.cached for stage in store.plan([artifact])] == [False]
    assert store.get(artifact) == store.get(artifact) == 3
    assert made == [3]
    assert store.stages[artifact.key].work.unet_calls == 7
    assert not store.stages[artifact.key].cached
    again = Store(tmp_path)
    assert again.get(artifact) == 3
    assert made == [3]
    assert again.stages[artifact.key].cached
    assert not (store.folder(artifact) / PARTS).exists()


def test_the_key_is_what_went_in() -> None:
    assert number(1).key == number(1).key
    assert number(1).key != number(2).key
    assert number(1).key != number(1, colour="red").key
    first, second = number(1), number(2)
    assert summed(first, second).key != summed(second, first).key


def summed(*inputs: Artifact[int], store: Store | None = None) -> Artifact[int]:
    def make(folder: Path, work: Work) -> None:
        assert store is not None
        write_json(folder / "value.json", sum(store.get(item) for item in inputs))

    return Artifact("sum", "sum", {}, make, lambda folder: read_json(folder / "value.json"), inputs)


def test_inputs_come_first_and_are_planned_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = number(1)
    both = summed(one, one, number(2), store=store)
    assert [stage.stage for stage in store.plan([both, one])] == ["number 1", "number 2", "sum"]
    assert store.get(both) == 4
    assert all(stage.cached for stage in store.plan([both]))


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    attempts: list[bool] = []

    def make(folder: Path, work: Work) -> None:
        part = folder / PARTS / "first.json"
        attempts.append(part.exists())
        write_json(part, 1)
        if len(attempts) == 1:
            raise RuntimeError("power cut")
        write_json(folder / "value.json", 5)

    artifact = Artifact("number", "n", {}, make, lambda folder: read_json(folder / "value.json"))
    with pytest.raises(RuntimeError):
        store.get(artifact)
    assert not store.has(artifact)
    assert store.get(artifact) == 5
    assert attempts == [False, True], "the second attempt finds what the first had finished"


def test_a_kill_before_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = number(8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).get(artifact)
    assert not Store(tmp_path).has(artifact)
    assert Store(tmp_path).get(artifact) == Store(tmp_path).get(artifact) == 8
    names = {path.name for path in Store(tmp_path).folder(artifact).iterdir()}
    assert names == {"artifact.json", "value.json"}


def test_a_second_link_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    for _ in range(2):
        link_or_copy(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("damage", ["truncate", "delete", "change"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    artifact = number(123456)
    path = Store(tmp_path).folder(artifact) / "value.json"
    Store(tmp_path).get(artifact)
    if damage == "truncate":
        path.write_text(path.read_text()[:3])
    elif damage == "delete":
        path.unlink()
    else:
        path.write_text("123457")
    with pytest.raises(MembenchError) as error:
        Store(tmp_path).get(artifact)
    assert str(path) in str(error.value)
    assert "delete" in str(error.value)


def slow_make(root: Path, log: Path) -> None:
    def make(folder: Path, work: Work) -> None:
        with open(log, "a") as stream:
            stream.write("made\n")
        time.sleep(0.5)
        write_json(folder / "value.json", 1)

    artifact = Artifact("slow", "slow", {}, make, lambda folder: read_json(folder / "value.json"))
    assert Store(root).get(artifact) == 1


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=slow_make, args=(tmp_path, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    holder = context.Process(target=slow_make, args=(tmp_path, log))
    holder.start()
    while not log.exists():
        time.sleep(0.01)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    slow_make(tmp_path, log)
    assert log.read_text() == "made\nmade\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MembenchError, match="--results"):
        Store(tmp_path / "file").get(number(1))


def test_a_full_disk_is_one_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(MembenchError, match="no space left on the disk"), writing(Path()):
        full.write_text("x")


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(path, float("nan"))
    assert read_json(path) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["value.json"]


def test_joining_parts_is_concatenating(tmp_path: Path) -> None:
    parts = [np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.ones((1, 2, 2), np.uint8)]
    paths = [tmp_path / f"{i}.npy" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        write_array(path, part)
    write_joined(tmp_path / "all.npy", paths, 4)
    assert np.array_equal(np.load(tmp_path / "all.npy", mmap_mode="r"), np.concatenate(parts))


def test_a_link_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"{", "not JSON"), (b"\xff", "not JSON")]
)
def test_reading_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MembenchError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_the_bill_holds_inputs_that_were_not_read(tmp_path: Path) -> None:
    """What was made by an earlier run costs what it cost, also if only its product is read now."""
    product = replace(number(2), inputs=(number(1),))
    Store(tmp_path).get(product)
    later = Store(tmp_path)
    later.get(product)
    bill = later.bill([product])
    assert [stage.stage for stage in bill] == ["number 1", "number 2"]
    assert all(stage.cached and stage.work.unet_calls == 7 for stage in bill)
