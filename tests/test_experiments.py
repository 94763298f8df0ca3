"""Experiments and comparisons of runs: every number against the matches it came from."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from scipy import stats
from typer.testing import CliRunner

from membench.cli import app
from membench.compare import _packed, _recounted, compare
from membench.contract import silent
from membench.data.imageset import Dataset
from membench.diffusion.targets import OracleTarget
from membench.errors import MembenchError
from membench.experiments import classes, guidance, unique
from membench.experiments.common import Setting, parse_band, plan, published
from membench.extraction import extraction
from membench.hashing import content_hash
from membench.lab import Lab
from membench.metrics import richness
from membench.registry import Registry
from membench.run import Cell, build_cell, run
from membench.similarity.measures import LEVELS
from membench.specs import RunSpec, Sampling
from membench.store import Store

MODES = ("calibrated", "cumulative")


def cell(
    registry: Registry, small: Dataset, results: Path, method: str, seed: int = 0,
    scales: tuple[float, ...] = (0.0, 1.0), **settings: int,
) -> Cell:  # fmt: skip
    """A cell of 48 images over the small data set; the classifiers are shared by the store."""
    plugin = registry.method(method)
    spec = RunSpec(
        method=method,
        parameters=plugin.settings({key: str(value) for key, value in settings.items()}),
        dataset=small.card.name,
        target="oracle:0.5",
        seed=seed,
        guidance_scales=scales,
        images_per_scale=48,
        sampling=Sampling(steps=3),
    )
    lab = Lab(small, OracleTarget(small, 0.5), Store(results), silent, "cpu", 0)
    return build_cell(spec, plugin, lab)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(registry: Registry, small: Dataset, results: Path) -> dict[str, list[Path]]:
    """Folders of two methods at two seeds."""
    found: dict[str, list[Path]] = {}
    for method in ("random", "ol_ti"):
        cells = [cell(registry, small, results, method, seed) for seed in (0, 1)]
        for one in cells:
            run(one)
        found[method] = [one.folder for one in cells]
    return found


# ---------------------------------------------------------------- compare


def test_differences_are_those_of_the_scores(runs: dict[str, list[Path]]) -> None:
    every = [path for paths in runs.values() for path in paths]
    found = compare(every, baseline="random")
    records = {
        m: [json.loads((p / "record.json").read_text()) for p in paths] for m, paths in runs.items()
    }
    assert found["images"] == 96 and found["seeds"] == [0, 1]
    levels = [level for level in LEVELS if level in records["random"][0]["per_image"]]
    assert [(line["metric"], line["band"]) for line in found["comparisons"]] == [
        (metric, level) for metric in ("ams", "excess", "ums") for level in levels
    ]
    for line in found["comparisons"]:
        metric, side = {"excess": ("ams", "excess")}.get(
            line["metric"], (line["metric"], "members")
        )
        ours, theirs = (
            np.mean([
                r["scores"]["average"]["bands"]["calibrated"][line["band"]][side][metric]
                for r in records[method]
            ])
            for method in ("ol_ti", "random")
        )  # fmt: skip
        assert line["value"] == pytest.approx(ours - theirs), line["metric"]
        assert line["interval"][0] <= line["value"] <= line["interval"][1]


def test_packed_outcomes_are_those_of_the_matches(runs: dict[str, list[Path]]) -> None:
    """The headline bands, read from the record and counted again from the saved matches."""
    for path in (paths[0] for paths in runs.values()):
        record = json.loads((path / "record.json").read_text())
        scales = list(record["scores"]["scales"])
        for level in LEVELS:
            ours, theirs = (
                read(record, path, "calibrated", level, scales) for read in (_packed, _recounted)
            )
            assert (ours is None) == (theirs is None)
            for key in ours or ():
                np.testing.assert_array_equal(ours[key], theirs[key])


def test_one_scale_is_mcnemar(runs: dict[str, list[Path]]) -> None:
    found = compare([*runs["random"], *runs["ol_ti"]], mode="cumulative", scale=1.0)
    (line,) = (x for x in found["comparisons"] if (x["metric"], x["band"]) == ("ams", "mid"))
    assert line["test"] == "McNemar, exact" and line["method"] == "ol_ti"
    outcome = []
    for method, scale in (("ol_ti", "1"), ("random", "0")):
        read = [
            _recounted(json.loads((p / "record.json").read_text()), p, "cumulative", "mid", [scale])
            for p in runs[method]
        ]
        outcome.append(np.concatenate([part["members"][0] for part in read if part]))
    only = [int((a & ~b).sum()) for a, b in (outcome, outcome[::-1])]
    expected = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    assert line["p"] == pytest.approx(expected)


def test_what_cannot_be_compared_is_refused_in_one_line(
    runs: dict[str, list[Path]], tmp_path: Path
) -> None:
    random, other = runs["random"], runs["ol_ti"]
    for paths, message in (
        (random, "all records are of one method"),
        ([random[0], *other], "random has seeds 0, ol_ti has 0, 1; images are paired by seed"),
    ):
        with pytest.raises(MembenchError, match=message):
            compare(paths)
    with pytest.raises(MembenchError, match="--baseline side_x: expected one of ol_ti, random"):
        compare([*random, *other], baseline="side_x")
    with pytest.raises(MembenchError, match="--band-mode shifted: these records have calibrated"):
        compare([*random, *other], mode="shifted")
    with pytest.raises(MembenchError, match="ol_ti has no scale 7, only 0, 1"):
        compare([*random, *other], scale=7)
    copies = []
    for name, paths in (("r", random), ("o", other)):
        record = json.loads((paths[0] / "record.json").read_text())
        copies.append(tmp_path / f"{name}.json")
        copies[-1].write_text(json.dumps(record))
    assert compare(copies)["comparisons"]  # the record alone is enough for its own bands
    with pytest.raises(MembenchError, match=r"matches-\S+: missing; name the run's folder"):
        compare(copies, mode="cumulative")


def test_extracted_images_add_up_to_the_record(
    runs: dict[str, list[Path]], registry: Registry
) -> None:
    path = runs["ol_ti"][0]
    record = json.loads((path / "record.json").read_text())
    found = extraction(registry, path, mode="cumulative", band="high")
    bands = {s: x["bands"]["cumulative"]["high"] for s, x in record["scores"]["scales"].items()}
    for scale, band in bands.items():
        counts = [row[f"count_at_{scale}"] for row in found["images"]]
        assert sum(counts) == band["members"]["pairs"]
        assert np.count_nonzero(counts) == band["members"]["unique"]
    with pytest.raises(MembenchError, match="no band cumulative:top; expected one of"):
        extraction(registry, path, mode="cumulative", band="top")


# ---------------------------------------------------------------- experiments


def check(result, folder: Path) -> list[dict[str, str]]:
    """The three files say the same, the figure is SVG with the mark of its data and small."""
    table, figure, facts = result.write(folder)
    text = figure.read_text()
    ElementTree.fromstring(text)
    assert text.count("membench-data-sha256:") == 1 and len(text) < 100_000
    assert result.write(folder)[1].read_text() == text
    assert json.loads(facts.read_text())["reading"] == result.reading
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(result.rows)
    return rows


def test_guidance_rows_are_the_records_scores(
    registry: Registry, small: Dataset, results: Path, tmp_path: Path
) -> None:
    prepared = [cell(registry, small, results, "ol_ti", scales=(0.0, 1.0, 100.0))]
    result = guidance.guidance(prepared, "cumulative", "mid", beside="celebahq_fi")
    scores = run(prepared[0])["scores"]["scales"]
    rows = check(result, tmp_path)
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        score = scores[f"{float(row['guidance_scale']):g}"]
        band = score["bands"][row["mode"]][row["band"]]
        for metric in ("ams", "ums"):
            for side in ("members", "heldout", "excess"):
                expected = band[side][metric]
                shown = row[f"{metric}_{side}"]
                assert shown == ("" if expected is None else str(expected))
        assert float(row["top_1_members"]) == score["top_percent"]["members"]["1"]
    assert "highest at scale" in result.reading[0]
    assert len(result.facts["published"]) == 51
    with pytest.raises(MembenchError, match="--published mnist: nothing is printed for it"):
        guidance.guidance(prepared, "cumulative", "mid", beside="mnist")


def test_unique_is_measured_on_prefixes_and_ends_at_the_record(
    registry: Registry, small: Dataset, results: Path, tmp_path: Path
) -> None:
    prepared = [cell(registry, small, results, "random")]
    result = unique.unique(prepared, "cumulative", "mid")
    check(result, tmp_path)
    record = run(prepared[0])
    band = record["scores"]["average"]["bands"]["cumulative"]["mid"]
    inside = [row for row in result.rows if row["kind"] == "measured"]
    end = inside[-1]
    assert end["images"] == 48
    assert end["measured"] == end["rarefied"] == band["members"]["unique"]
    assert end["measured_heldout"] == band["heldout"]["unique"]
    matches = prepared[0].lab.store.get(prepared[0].matches[0.0])
    image, reference, _ = matches.pairs(1.4)
    for row in inside:
        seen = {int(j) for i, j in zip(image, reference, strict=True) if i < row["images"]}
        assert row["measured"] == len(seen)
    counts = np.bincount(reference, minlength=64)
    beyond = [row for row in result.rows if row["kind"] == "extrapolated"]
    assert (beyond[0]["images"], beyond[-1]["images"]) == (48, 96)
    assert beyond[0]["chao"] == pytest.approx(beyond[0]["good_toulmin"]) == end["measured"]
    assert beyond[-1]["chao"] == richness.extrapolated(counts, 48, 96)
    half = result.facts["from_half"]
    assert half["measured"] == end["measured"] and half["predicts"] == 48


def test_unique_of_an_oracle_lies_in_its_band(registry: Registry, tmp_path: Path) -> None:
    """Images of an oracle are exchangeable: prefixes fall in the 95 % band about that often."""
    within = total = 0
    for seed in range(4):
        setting = Setting(
            registry, tmp_path, silent, "random", "fashion_mini", "oracle:0.7", images=96,
            seeds=(seed,), steps=2, device="cpu",
        )  # fmt: skip
        result = unique.unique(unique.cells(setting, None), "calibrated", "mid")
        for row in result.rows:
            if row["kind"] == "measured" and row["images"] in (24, 48, 72):
                within += row["rarefied_low"] <= row["measured"] <= row["rarefied_high"]
                total += 1
    assert total == 12 and within >= 9


def test_classes_fit_is_scipys(
    registry: Registry, small: Dataset, results: Path, tmp_path: Path
) -> None:
    groups = [
        [cell(registry, small, results, "side_c", scales=(1.0,), n_clusters=k)] for k in (8, 12, 16)
    ]
    result = classes.classes(groups, "n_clusters", "cumulative", beside="celebahq_fi")
    check(result, tmp_path)
    assert all(row["classes"] <= row["value"] for row in result.rows)
    for name, fit in result.facts["fits"].items():
        metric, level = name.split("_")
        points = [
            (row["classes"], row[f"{metric}_members"])
            for row in result.rows
            if (row["mode"], row["band"]) == ("cumulative", level)
        ]
        expected = stats.linregress(*zip(*points, strict=True))
        assert fit["coefficient"] == pytest.approx(expected.slope)
        assert fit["intercept"] == pytest.approx(expected.intercept)
        assert fit["n"] == 3
    assert len(result.facts["published"]) == 2
    assert any("published, celebahq_fi" in line for line in result.reading)


def test_a_plan_names_every_stage_once(registry: Registry, small: Dataset, tmp_path: Path) -> None:
    cells = [cell(registry, small, tmp_path, "ol_ti", seed) for seed in (0, 1)]
    stages = plan(cells)
    assert len({stage.key for stage in stages}) == len(stages)
    assert not any(stage.cached for stage in stages)
    assert sum(stage.stage == "images at scale 1" for stage in stages) == 2
    assert not (tmp_path / "artifacts").exists()


def test_published_figures_are_as_printed() -> None:
    sweep = published("guidance_scale_sweep", "celebahq_fi")
    assert [float(row["guidance_scale"]) for row in sweep] == list(range(51))
    best = max(sweep, key=lambda row: float(row["ams_mid_percent"]))
    assert best["guidance_scale"] == "15.0" and best["ams_mid_percent"] == "1.516"
    assert content_hash(sweep) == content_hash(published("guidance_scale_sweep", "celebahq_fi"))
    assert all("SIDE" in row["source"] for row in sweep)
    assert published("classes_regression", "fashion_mini") == []


def test_bands_are_named_as_on_the_card() -> None:
    assert parse_band("mid", MODES) == ("calibrated", "mid")
    assert parse_band("cumulative:low", MODES) == ("cumulative", "low")
    for text in ("top", "literal:mid"):
        with pytest.raises(MembenchError, match=f"--band {text}: expected low, mid or high"):
            parse_band(text, MODES)


def test_commands(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, end to end, and its mistakes in one line."""
    common = ["--dataset", "fashion_mini", "--device", "cpu", "--steps", "2"]
    common += ["--target", "oracle:0.5", "--images", "64"]
    shown = command("experiment", "unique", *common).stdout
    assert "training images in 64 images" in shown
    folder = tmp_path / "results/experiments/unique-fashion_mini-oracle-0.5-random"
    assert sorted(p.name for p in folder.iterdir()) == ["unique.csv", "unique.json", "unique.svg"]
    monkeypatch.chdir(tmp_path)
    here = CliRunner()
    again = here.invoke(app, ["experiment", "unique", *common, "--json"])
    assert json.loads(again.stdout)["experiment"] == "unique"
    dry = ["experiment", "guidance", *common, "--dry-run", "--guidance-scale", "0,1"]
    assert "images at scale 1" in here.invoke(app, dry).stdout
    for arguments, message in (
        (["guidance", "--method", "random"], "--method random: it has no guidance to sweep"),
        (["unique", "--method", "ol_ti"], "--guidance-scale: choose one of 0.1, 0.3"),
        (["classes", "--method", "ol_ti"], "n_clusters"),
        (["classes", "--values", "a"], "--values a: expected whole numbers"),
        (["unique", "--band", "top"], "--band top: expected low, mid or high"),
    ):
        failed = here.invoke(app, ["experiment", *arguments, *common])
        assert isinstance(failed.exception, MembenchError), arguments
        assert message in str(failed.exception) and "\n" not in str(failed.exception)
