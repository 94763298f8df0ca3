"""Submissions: packed without images, verified to the last bit, and every tampering found."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

from membench import checks, verify
from membench.checks import Report, check
from membench.contract import silent
from membench.errors import MembenchError
from membench.files import write_json, write_npz
from membench.hashing import canonical_json, content_hash, file_hash
from membench.matching import FACTS, Facts
from membench.record import NULL, RECORD, seal
from membench.registry import Registry
from membench.report.leaderboard import add
from membench.rerun import rerun
from membench.run import prepare, run
from membench.scoring import calibrate_from, incidence, null_facts, per_image, score_all
from membench.similarity.matches import Matches
from membench.specs import Similarity
from membench.submission import PIXELS, SOURCE, SUBMISSION, pack, row_hashes

IMAGES = 24
Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="module")
def folder(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with its images."""
    cell = prepare(
        registry, tmp_path_factory.mktemp("results"), silent, method="random",
        dataset="fashion_mini", target="oracle:0.5", steps=5, images=IMAGES, batch_size=8,
        device="cpu",
    )  # fmt: skip
    run(cell)
    return cell.folder


@pytest.fixture(scope="module")
def packed(folder: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("submission")
    pack(verify.verify(folder), folder, out, registry, with_source=True)
    return out


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "bundle"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def reseal(bundle: Path, record: dict[str, Any] | None = None) -> None:
    """What a cheat does: mend every hash of record and submission after a change."""
    if record is not None:
        record["id"] = content_hash(record["identity"])
        record["results_sha256"] = seal(record)
        (bundle / RECORD).write_text(json.dumps(record))
    record = read(bundle / RECORD)
    found = read(bundle / SUBMISSION)
    found["record"], found["results_sha256"] = record["id"], record["results_sha256"]
    found["files"] = {name: file_hash(bundle / name) for name in found["files"]}
    found["absent"] = {name: record["files"].get(name) for name in found["absent"]}
    method, ran = record["identity"]["method"], record["provenance"].get("method_source_sha256")
    found["method"] |= {"name": method["name"], "version": method["version"], "source": None}
    found["method"]["source_sha256"] = ran
    found.pop("sealed")
    (bundle / SUBMISSION).write_text(json.dumps(found | {"sealed": content_hash(found)}))


# --- Packing ----------------------------------------------------------------------------------


def test_a_submission_holds_what_numbers_rest_on_and_no_image(bundle: Path, folder: Path) -> None:
    names = {path.name for path in bundle.iterdir()}
    assert names == {
        RECORD, SUBMISSION, SOURCE, PIXELS, FACTS, NULL, "matches-0.npz"
    }  # fmt: skip
    images = np.load(folder / "images-0.npy")
    pixels = images.tobytes()
    for path in bundle.iterdir():
        content = path.read_bytes()
        assert not any(pixels[i : i + 256] in content for i in range(0, len(pixels), 256)), path
    record, found = read(bundle / RECORD), read(bundle / SUBMISSION)
    assert found["absent"] == {"images-0.npy": file_hash(folder / "images-0.npy")}
    assert found["method"]["source_sha256"] == record["provenance"]["method_source_sha256"]
    assert found["environment"]["packages"]["numpy"] == np.__version__
    with np.load(bundle / PIXELS) as file:
        assert np.array_equal(file["images-0"], row_hashes(images))


def test_the_source_goes_in_only_if_its_author_agrees_and_it_is_what_ran(
    folder: Path, registry: Registry, tmp_path: Path
) -> None:
    record = read(folder / RECORD)
    pack(record, folder, tmp_path / "a", registry, with_source=False)
    assert not (tmp_path / "a" / SOURCE).exists()
    assert read(tmp_path / "a" / SUBMISSION)["method"]["source"] is None
    check(tmp_path / "a", registry, tmp_path)
    record["provenance"]["method_source_sha256"] = "0" * 64
    with pytest.raises(MembenchError, match="is not the source of random that ran"):
        pack(record, folder, tmp_path / "b", registry, with_source=True)
    with pytest.raises(MembenchError, match="not an empty folder"):
        pack(record, folder, tmp_path / "a", registry, with_source=False)


def test_submit_and_verify_on_the_command_line(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    beside = [path for path in folder.parent.iterdir() if not path.name.startswith(".")]
    assert beside == [folder], "so that a shell's random-* names the run alone"
    said = command("submit", folder, "--out", "mine", "--source").stdout
    assert "no images" in said
    assert "it enters no board: 24 images per scale, not 512" in said
    said = command("verify", "mine", "--rerun", "3").stdout
    assert "identity: the same as card, plugin and target give here" in said
    assert "not checked  files.images-0.npy: not here" in said
    assert "not checked  cost: under no hash but the submission's" in said
    assert "pixels: 100.0 % of 3 images equal" in said
    with pytest.raises(MembenchError, match="enters no board"):
        add(verify.verify_any(folder), tmp_path / "boards")


# --- What verify says -------------------------------------------------------------------------


def test_verify_says_what_it_could_not_check(
    bundle: Path, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    always = {"attack", "cost", "provenance", "files.images-0.npy"}
    found = check(bundle, registry, tmp_path)
    assert found.not_checked.keys() == always
    assert found.not_checked["files.images-0.npy"].startswith("not here")
    found = check(folder, registry, tmp_path)
    assert found.not_checked.keys() == always
    assert found.not_checked["cost"] == "under no hash"
    without = Registry()
    del without.datasets["fashion_mini"]
    found = check(bundle, without, tmp_path)
    assert found.not_checked.keys() == always | {"identity", "identity.dataset", "limited"}
    without = Registry()
    del without.plugins["random"]
    found = check(bundle, without, tmp_path)
    assert found.not_checked.keys() == always | {"identity", "identity.method"}


def test_another_revision_of_the_card_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    card = registry.card("fashion_mini").model_copy(update={"revision": 2})
    monkeypatch.setattr(registry, "card", lambda name: card)
    with pytest.raises(MembenchError, match="made on revision 1 of fashion_mini, the card here is"):
        check(bundle, registry, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: (b / NULL).unlink(), "missing"),
        (lambda b: (b / "more.npz").write_bytes(b"x"), r"more\.npz: not named by"),
        (lambda b: (b / FACTS).write_bytes((b / FACTS).read_bytes()[:-9]), "truncated or changed"),
        (lambda b: (b / SUBMISSION).write_text("[]"), "not a submission"),
        (lambda b: (b / SUBMISSION).unlink(), r"images-0\.npy: missing"),
        (lambda b: edit(b, lambda s: s.update(schema=9)), "schema 9"),
        (lambda b: edit(b, lambda s: s.update(more=1)), "more"),
        (lambda b: edit(b, lambda s: s.update(membench="9")), "sealed is not the hash"),
        (lambda b: edit(b, lambda s: s["files"].pop(RECORD), mend=True), f"no {RECORD}"),
        (
            lambda b: edit(b, lambda s: s["files"].update({"../x": "0"}), mend=True),
            "not a plain file name",
        ),
        (
            lambda b: edit(b, lambda s: s["absent"].update({NULL: "0"}), mend=True),
            r"matches-heldout\.npz: absent, but no images",
        ),
        (
            lambda b: edit(b, lambda s: s["method"].update(name="x"), mend=True),
            r"method\.name is not the record's",
        ),
        (
            lambda b: edit(b, lambda s: s["method"].update(source_sha256="0"), mend=True),
            r"method\.source_sha256",
        ),
    ],
)
def test_a_spoilt_submission_is_named(
    bundle: Path, registry: Registry, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(bundle)
    with pytest.raises(MembenchError, match=message):
        check(bundle, registry, tmp_path)


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any], mend: bool = False) -> None:
    found = read(bundle / SUBMISSION)
    change(found)
    if mend:
        found.pop("sealed")
        found["sealed"] = content_hash(found)
    (bundle / SUBMISSION).write_text(json.dumps(found))


# --- Tampering --------------------------------------------------------------------------------


def leaves(value: Any, path: Path_ = (), every: bool = False) -> Iterator[Path_]:
    """The path of every leaf; of long lists the last, unless `every`."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key), every)
    elif isinstance(value, list) and value:
        n = len(value)
        for i in range(n) if every or n <= 4 else (n - 1,):
            yield from leaves(value[i], (*path, i), every)
    else:
        yield path


def mutated(record: dict[str, Any], path: Path_) -> dict[str, Any]:
    """A copy with one leaf changed, a float by its last bit."""
    place = found = copy.copy(record)
    for key in path[:-1]:  # what lies beside the path is shared
        place[key] = copy.copy(place[key])
        place = place[key]
    value = place[path[-1]]
    if isinstance(value, bool):
        new: Any = not value
    elif isinstance(value, int):
        new = value + 1
    elif isinstance(value, float):
        new = math.nextafter(value, 2 * value + 1)
    elif isinstance(value, str):
        new = (value[:-1] + ("b" if value[-1] == "a" else "a")) if value else "x"
    elif value is None:
        new = 0
    else:
        new = [0] if isinstance(value, list) else {"x": 0}
    place[path[-1]] = new
    return found


def covered(path: Path_, report: Report) -> bool:
    """Whether a report says that it did not check the place of a leaf."""
    name = ".".join(map(str, path))
    return any(name == part or name.startswith(f"{part}.") for part in report.not_checked)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute once for each similarity, identity and file: leaves are many."""
    for name in ("calibrate_from", "null_facts", "score_all", "per_image", "incidence"):
        monkeypatch.setattr(verify, name, _once(getattr(verify, name)))
    real_load = Matches.load
    loaded = cache(lambda sha, path: real_load(path))

    class Cached:
        load = staticmethod(lambda path: loaded(file_hash(path), path))

    monkeypatch.setattr(verify, "Matches", Cached)
    cells: dict[str, Any] = {}
    real = checks.cell_of

    def cell_of(record: Any, registry: Registry, results: Path) -> Any:
        key = canonical_json([record["identity"], record["attack"].get("surrogate")])
        if key not in cells:
            cells[key] = real(record, registry, results)
        return cells[key]

    monkeypatch.setattr(checks, "cell_of", cell_of)
    opened: dict[str, Any] = {}
    real_data = checks.load_dataset

    def load_dataset(card: Any, where: Path) -> Any:
        if card.name not in opened:
            opened[card.name] = real_data(card, where)
        return opened[card.name]

    monkeypatch.setattr(checks, "load_dataset", load_dataset)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def call(*arguments: Any) -> Any:
        similarity = next(a for a in arguments if isinstance(a, Similarity))
        key = canonical_json(similarity.identity())
        if key not in found:
            found[key] = function(*arguments)
        return found[key]

    return call


def tamper(bundle: Path, folder: Path, registry: Registry, every: bool) -> None:
    record = read(bundle / RECORD)
    undetected = set()
    for path in leaves(record, every=every):
        changed = mutated(record, path)
        # in the run's folder, nothing mended
        (folder / RECORD).write_text(json.dumps(changed))
        try:
            report = check(folder, registry, folder)
            assert covered(path, report), f"{path}: not found in the folder"
            undetected.add(path[0])
        except MembenchError:
            pass
        if path in (("id",), ("results_sha256",)):
            continue  # mending them undoes the change
        # in a submission, all hashes mended
        reseal(bundle, changed)
        try:
            report = check(bundle, registry, folder)
        except MembenchError:
            continue
        assert covered(path, report), f"{path}: not found in the submission"
        undetected.add(
            ".".join(map(str, path[:2])) if path[0] in ("identity", "files") else path[0]
        )
    assert undetected == {
        "attack", "cost", "provenance", "files.images-0.npy",
        # another name, of something that is not here: the report says that it derived no identity
        "identity.compute", "identity.dataset", "identity.method", "identity.target",
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_any_changed_leaf_is_found_or_said_not_to_be_checked(
    bundle: Path, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    """Of long lists one element each; `test_every_leaf` takes all of them."""
    tamper(bundle, Path(shutil.copytree(folder, tmp_path / "run")), registry, every=False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_leaf(bundle: Path, folder: Path, registry: Registry, tmp_path: Path) -> None:
    tamper(bundle, Path(shutil.copytree(folder, tmp_path / "run")), registry, every=True)


def changed_arrays(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's arrays with one of them changed in one place, for each of them."""
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    for name, array in content.items():
        new = array.copy()
        if new.dtype.kind == "U":
            new = np.append(new, "x") if new.ndim else np.array(f"{new}x")
        elif not new.size:
            new = np.ones((1, *new.shape[1:]), new.dtype)
        elif new.dtype == bool:
            new.flat[-1] ^= True
        elif new.dtype.kind == "f":
            new.flat[-1] = np.nextafter(new.flat[-1], np.inf)
        else:
            new.flat[-1] += 1
        yield name, content | {name: new}


def test_any_changed_array_is_found(bundle: Path, registry: Registry, tmp_path: Path) -> None:
    """Of every file beside the record; also when the submission's own hashes are mended."""
    count = 0
    for path in sorted(bundle.glob("*.npz")):
        whole = path.read_bytes()
        for _, content in changed_arrays(path):
            write_npz(path, content)
            with pytest.raises(MembenchError, match=f"{path.name}: truncated or changed"):
                check(bundle, registry, tmp_path)
            if path.name != PIXELS:  # the record names the others' hashes
                reseal(bundle)
                with pytest.raises(MembenchError, match=f"{path.name}: truncated or changed"):
                    check(bundle, registry, tmp_path)
            count += 1
        path.write_bytes(whole)
        reseal(bundle)
    assert count > 30


def forge(bundle: Path, name: str, content: dict[str, Any]) -> None:
    """Other matches or facts, with every number of the record computed anew: a perfect forgery."""
    write_npz(bundle / name, content)
    record = read(bundle / RECORD)
    similarity = Similarity.model_validate(record["identity"]["similarity"])
    matches = {0.0: Matches.load(bundle / "matches-0.npz")}
    null = Matches.load(bundle / NULL)
    keep = Facts.load(bundle / FACTS).null_rows(similarity)
    calibration = calibrate_from(null, keep, similarity)
    record |= {
        "calibration": calibration.to_dict(),
        "null": null_facts(null, keep, similarity),
        "scores": score_all(matches, calibration, similarity),
        "per_image": per_image(matches, calibration, similarity),
        "incidence": incidence(matches, calibration, similarity),
    }
    record["files"][name] = file_hash(bundle / name)
    reseal(bundle, json.loads(canonical_json(record)))


# --- Drawing again ----------------------------------------------------------------------------


def test_rerun_finds_the_same_images(
    bundle: Path, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    for place, largest in ((folder, 0), (bundle, None)):
        report = check(place, registry, tmp_path / "fresh")
        assert report.cell is not None
        found = rerun(report.cell, place, 5, entropy=1)
        assert found["equal"]
        assert found["null"]
        assert found["images"] == sum(map(len, found["rows"].values())) == 5
        assert found["batches"] == len({row // 8 for row in found["rows"]["0"]})
        assert found["pixels"] == {"compared": 5, "equal": 1.0, "largest_difference": largest}
        assert found["neighbours"] == {"compared": 5, "equal": 1.0, "largest_difference": 0.0}
    (bundle / PIXELS).unlink()
    edit(bundle, lambda s: s["files"].pop(PIXELS), mend=True)
    report = check(bundle, registry, tmp_path / "fresh")
    assert report.cell is not None
    found = rerun(report.cell, bundle, 99, entropy=1)
    assert found["images"] == IMAGES
    assert found["equal"]
    assert found["pixels"]["equal"] is None


def test_rerun_finds_forged_matches_images_and_null(
    bundle: Path, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    """What no recomputation can see, since every number fits."""
    with np.load(bundle / "matches-0.npz") as file:
        content = {name: file[name] for name in file.files}
    content["members_distance"] = content["members_distance"].copy()
    content["members_distance"][:, 0] *= 0.5  # every image nearer to its member
    forge(bundle, "matches-0.npz", content)
    report = check(bundle, registry, tmp_path / "fresh")
    assert report.cell is not None
    found = rerun(report.cell, bundle, IMAGES)
    assert not found["equal"]
    assert found["neighbours"]["equal"] < 1  # copies at distance 0 stay
    assert found["neighbours"]["largest_difference"] > 0
    assert found["pixels"]["equal"] == 1

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    images = np.load(other / "images-0.npy")
    images[:, 0, 0, 0] ^= 3
    np.save(other / "images-0.npy", images)
    record = read(other / RECORD)
    record["files"]["images-0.npy"] = file_hash(other / "images-0.npy")
    record["results_sha256"] = seal(record)
    write_json(other / RECORD, record)
    report = check(other, registry, tmp_path / "fresh")
    assert report.cell is not None
    found = rerun(report.cell, other, 4)
    assert found["pixels"] == {"compared": 4, "equal": 0.0, "largest_difference": 3}

    third = Path(shutil.copytree(folder, tmp_path / "third"))
    with np.load(third / NULL) as file:
        content = {name: file[name] for name in file.files}
    content["members_distance"] = content["members_distance"] * np.float32(1.25)
    third_bundle = Path(shutil.copytree(bundle, tmp_path / "third_bundle"))
    forge(third_bundle, NULL, content)
    report = check(third_bundle, registry, tmp_path / "fresh")
    assert report.cell is not None
    assert not rerun(report.cell, third_bundle, 1)["null"]
