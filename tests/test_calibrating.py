"""Calibration and scored images, end to end: no model, known answers, records one can repeat."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from PIL import Image

from membench import calibrating, external
from membench.contract import SAMPLING, silent
from membench.data.imageset import Dataset
from membench.diffusion.targets import OracleTarget
from membench.errors import MembenchError
from membench.hashing import content_hash
from membench.lab import Lab
from membench.record import seal
from membench.registry import Registry
from membench.report import leaderboard, table, variations
from membench.run import build_cell, run
from membench.specs import DescriptorChoice, RunSpec, Similarity
from membench.store import Store
from membench.verify import verify_any

PIXELS = Similarity(name="sscd", descriptor=DescriptorChoice(name="pixels"))


@pytest.fixture(scope="module")
def calibration(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    found = calibrating.prepare(registry, results, silent, dataset="fashion_mini")
    calibrating.run(found)
    return found.folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / calibrating.RECORD).read_text())


def brute_nl2(queries: np.ndarray, reference: np.ndarray, n: int = 50) -> np.ndarray:
    """nL2 of the nearest, float64, from the spec's formula."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (queries, reference))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distance = np.sqrt(np.sort(squared.clip(0), axis=1)[:, :n])
    return distance[:, 0] / (0.5 * distance.mean(axis=1))


def test_rates_are_those_of_brute_force(calibration: Path, fashion_mini: Dataset) -> None:
    results = {r["name"]: r for r in record_of(calibration)["results"]}
    heldout, members = fashion_mini.heldout.images, fashion_mini.members.images
    mirrored = np.minimum  # of distances, below
    for name, best in (
        ("as the card says", brute_nl2(heldout, members)),
        ("128 members", brute_nl2(heldout, members[:128])),
    ):
        for level, edge in (("low", 1.5), ("mid", 1.4), ("high", 1.35)):
            rate = results[name]["null"]["bands"]["cumulative"][level]["rate"]
            assert rate == pytest.approx((best <= edge).mean(), abs=1e-12), (name, level)
        found = results[name]["calibration"]["thresholds"]["low"]
        assert (best <= found["value"] + 1e-6).mean() == pytest.approx(found["achieved"], abs=1e-9)
        quantile = np.quantile(best, 0.05)
        assert results[name]["quantiles"]["95"] == pytest.approx(quantile, abs=1e-5)
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (heldout[:64], members))
    c = heldout[:64, :, ::-1].reshape(64, -1).astype(np.int64)
    squares = [((x[:, None] - b) ** 2).sum(2) for x in (a, c)]
    distance = np.sqrt(np.sort(mirrored(*squares), axis=1)[:, :50]) / 255
    both = distance[:, 0] / (0.5 * distance.mean(axis=1))
    number = list(results).index("mirrored too")
    saved = calibrating.Matches.load(calibration / f"null-{number:02d}.npz")
    np.testing.assert_allclose(saved.scores()[:64, 0], both, rtol=1e-6)


def test_fewer_members_make_strangers_look_nearer(calibration: Path) -> None:
    """The denominator of nL2 grows with the members' spread: the papers' bands move with N."""
    results = [r for r in record_of(calibration)["results"] if r["group"] in ("", "members")]
    rates = [r["null"]["bands"]["cumulative"]["mid"]["rate"] for r in results]
    assert [r["calibration"]["n_members"] for r in results] == [512, 256, 128, 64]
    assert rates == sorted(rates) and rates[-1] > rates[0] + 0.1


def test_the_cards_way_is_what_runs_use(
    calibration: Path, registry: Registry, lab: Lab, fashion_mini: Dataset, tmp_path: Path
) -> None:
    whole = replace(
        lab, dataset=fashion_mini, target=OracleTarget(fashion_mini, 0.5), store=Store(tmp_path)
    )
    spec = RunSpec(
        method="random", dataset="fashion_mini", target="oracle:0.5", guidance_scales=(1.0,),
        images_per_scale=16, sampling=SAMPLING,
    )  # fmt: skip
    record = run(build_cell(spec, registry.method("random"), whole))
    first = record_of(calibration)["results"][0]
    assert record["calibration"] == first["calibration"]
    assert record["null"] == first["null"]


def test_a_calibration_is_verified_and_tampering_found(calibration: Path, tmp_path: Path) -> None:
    verify_any(calibration)
    copy = tmp_path / "copy"
    shutil.copytree(calibration, copy)
    record = record_of(copy)
    record["results"][1]["null"]["bands"]["cumulative"]["low"]["rate"] += 0.01
    (copy / calibrating.RECORD).write_text(json.dumps(record))
    with pytest.raises(MembenchError, match="edited"):
        verify_any(copy)
    record["results_sha256"] = seal(record)
    (copy / calibrating.RECORD).write_text(json.dumps(record))
    with pytest.raises(MembenchError, match=r"results\[1\].null.bands.cumulative.low.rate is"):
        verify_any(copy)
    (copy / "null-00.npz").unlink()
    with pytest.raises(MembenchError, match=r"null-00\.npz: missing"):
        verify_any(copy)


def test_calibrating_again_gives_the_same(calibration: Path, registry: Registry) -> None:
    before = record_of(calibration)["results_sha256"]
    again = calibrating.prepare(registry, calibration.parents[2], silent, dataset="fashion_mini")
    assert again.folder == calibration
    assert calibrating.run(again)["results_sha256"] == before


def test_sscd_varies_preprocessing_and_input(registry: Registry, tmp_path: Path) -> None:
    """With the plain-pixel descriptor: what is described, without its cost."""
    found = calibrating.prepare(
        registry, tmp_path, silent, dataset="fashion_mini", similarity=PIXELS,
        vary=("preprocessing", "resolution"),
    )  # fmt: skip
    names = [variation.name for variation in found.variations]
    assert names == [
        "as the card says", "input 128 x 128", "input 224 x 224", "input 320 x 320",
        "official_288", "dcr_224", "amg_224",
    ], "official_320 is an input of 320 x 320: once is enough"  # fmt: skip
    assert len({variation.null.key for variation in found.variations}) == len(names)


def test_boards_print_a_calibration_without_any_run(calibration: Path, tmp_path: Path) -> None:
    leaderboard.add(record_of(calibration), tmp_path)
    leaderboard.build(tmp_path)
    text = (tmp_path / "fashion_mini.md").read_text()
    assert "What chance gives, and what moves it" in text and "| 64 members" in text
    assert variations.sentence(record_of(calibration)) in text
    assert leaderboard.check(tmp_path) == 3
    path = tmp_path / "calibrations" / "fashion_mini.json"
    path.write_text(path.read_text().replace('"n_heldout": 2048', '"n_heldout": 2049'))
    with pytest.raises(MembenchError, match="edited"):
        leaderboard.check(tmp_path)


def test_the_command(command: Command, tmp_path: Path) -> None:
    options = ("--dataset", "fashion_mini", "--results", str(tmp_path))
    printed = command("calibrate", *options, "--vary", "members").stdout
    assert "an AMS of that size" in printed and "calibration.json" in printed
    for arguments, message in (
        (("--vary", "colour"), "--vary colour: expected one of flips, members"),
        (("--preset", "official_320"), "name a --descriptor"),
        (("--descriptor", "sscd_onx"), "did you mean"),
        (("--descriptor", "pixels", "--preset", "x"), "--descriptor: descriptor.preset"),
    ):
        failed = command("calibrate", *options, *arguments, check=False)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1


# ---------------------------------------------------------------- SSCD from end to end


@pytest.mark.parametrize("flips", [False, True])
def test_an_oracle_gives_its_rate_by_a_descriptor(
    registry: Registry, fashion_mini: Dataset, tmp_path: Path, flips: bool
) -> None:
    """Run, record and verify with cosine similarity: copies are found, strangers at their rate."""
    similarity = PIXELS.model_copy(update={"flips": flips})
    target = OracleTarget(fashion_mini, 0.3)
    lab = Lab(fashion_mini, target, Store(tmp_path), silent, similarity=similarity)
    spec = RunSpec(
        method="random", dataset="fashion_mini", target="oracle:0.3", guidance_scales=(1.0,),
        images_per_scale=256, sampling=SAMPLING,
    )  # fmt: skip
    cell = build_cell(spec, registry.method("random"), lab)
    record = run(cell)
    copies = sum(target.copies_member(0, i) for i in range(256))
    high = record["scores"]["average"]["bands"]["calibrated"]["high"]
    assert copies <= high["members"]["ams"] * 256 <= copies + 8
    assert high["lower"] is not None and high["upper"] is None
    assert high["excess"]["ams_interval"][0] > 0.15
    literal = record["scores"]["average"]["bands"]["literal"]["high"]
    assert (literal["lower"], literal["upper"]) == (0.6, 1.0)
    assert literal["members"]["ums"] is not None, "pairs of the widest band are all known"
    assert "another similarity than the card's" in record["limited_by"]
    assert record["identity"]["descriptor"]["preprocessing"]["version"] == 1, (
        "all that pins a score"
    )
    verify_any(cell.folder)


# ---------------------------------------------------------------- images from elsewhere


@pytest.fixture
def folder(fashion_mini: Dataset, tmp_path: Path) -> Path:
    """30 copies of members and 34 real images that nobody trained on, as PNG files."""
    made = tmp_path / "samples"
    made.mkdir()
    images = np.concatenate(
        [fashion_mini.members.images[:30], fashion_mini.heldout_rest.images[:34]]
    )
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(made / f"{i:03d}.png")
    return made


def test_scored_images_have_known_scores(registry: Registry, folder: Path, tmp_path: Path) -> None:
    found = external.prepare(
        registry, tmp_path / "r", silent, images=folder, dataset="fashion_mini"
    )
    record = external.run(found)
    high = record["scores"]["average"]["bands"]["calibrated"]["high"]
    assert high["members"]["ams"] == 30 / 64 and high["members"]["unique"] == 30
    assert record["scores"]["average"]["l2_ratio"]["members"] == 30 / 64
    assert record["knn"]["epsilons"][0]["memorization_divergence"]["gap"]["value"] > 0
    assert record["id"] == content_hash(record["identity"]) and record["limited"]
    assert any(line.startswith("knn divergence") for line in table.knn_lines(record))
    assert [stage["stage"] for stage in record["cost"]["stages"]][-1] == "calibration"
    assert verify_any(found.folder)["id"] == record["id"]
    with pytest.raises(MembenchError, match="enters no board: images from elsewhere"):
        leaderboard.add(record, tmp_path)


def test_score_takes_archives_and_names_what_is_wrong(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    options = ("--dataset", "fashion_mini", "--results", str(tmp_path / "r"))
    archive = tmp_path / "samples.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, path.name)
    printed = [
        command("score", "--images", str(path), *options, "--name", "tool").stdout
        for path in (folder, archive)
    ]
    assert "excess 46.9 % [32.7, 58.2]" in printed[0].replace("\n", " ")
    assert printed[0].splitlines()[-2:] == printed[1].splitlines()[-2:], "one record, read twice"
    (folder / "bad.png").write_bytes((folder / "000.png").read_bytes()[:40])
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    for path, message in (
        (tmp_path / "nowhere", "nowhere"),
        (folder, "bad.png"),
        (tmp_path / "large.png", "large.png"),
    ):
        failed = command("score", "--images", str(path), *options, check=False)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1


def test_run_can_compare_mirrored_and_deduplicated(command: Command, tmp_path: Path) -> None:
    options = "run --method random --dataset fashion_mini --target oracle:1 --images 16 --steps 5"
    plain = json.loads(command(*options.split(), "--json").stdout)
    other = json.loads(command(*options.split(), "--flips", "--dedup-reference", "--json").stdout)
    assert (plain["scores"]["average"]["flips"], other["scores"]["average"]["flips"]) == (0, 1)
    assert plain["id"] != other["id"]
    assert "another similarity than the card's" in other["limited_by"]
    assert other["scores"]["average"]["near_duplicates"]["members"] == 0
