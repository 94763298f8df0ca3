"""Tables, contact sheet and boards, from records whose scores the real metrics made."""

from __future__ import annotations

import copy
import csv
import html
import io
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from membench.errors import MembenchError
from membench.hashing import content_hash
from membench.metrics import METRIC_VERSIONS, average, calibrate, score
from membench.record import SCHEMA
from membench.report import contact_sheet, figures, leaderboard, table
from membench.report.markdown import escaped
from membench.report.records import load_records, pooled, sections
from membench.similarity.matches import Matches
from membench.similarity.measures import nl2
from membench.similarity.search import Neighbours

N = 128
EVIL = (
    "=x|y</td><script>alert(1)</script>\n# big [a](http://b) `c` *d* ![e](f) $\\frac{1}{2}$\u202e"
)


def neighbours(rate: float, seed: int, n: int = N) -> Neighbours:
    """Distances of n images to N references; a share `rate` of them has one very near."""
    rng = np.random.default_rng(seed)
    distance = np.sort(rng.uniform(4, 8, (n, 50)), axis=1)
    distance[: round(rate * n), 0] = rng.uniform(0.1, 1, round(rate * n))
    index = np.argsort(rng.random((n, N)), axis=1)[:, :50]
    return Neighbours(distance.astype(np.float32), index.astype(np.int32))


def matches(rate: float, seed: int) -> Matches:
    return Matches.of(neighbours(rate, seed), neighbours(0, seed + 1000), N, N)


@cache
def scored(rate: float, seed: int, scales: tuple[str, ...]) -> dict[str, Any]:
    calibration = calibrate(nl2(neighbours(0, 99, 2000).distance)[:, 0], N)
    found = {scale: matches(rate, 10 * seed + i) for i, scale in enumerate(scales)}
    scores = {
        "scales": {scale: score(m, calibration) for scale, m in found.items()},
        "average": average(list(found.values()), calibration),
    }
    return json.loads(json.dumps({"calibration": calibration.to_dict(), "scores": scores}))


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """With the hashes that `membench run` gives it."""
    record["id"] = content_hash(record["identity"])
    apart = ("results_sha256", "cost", "provenance")
    content = {key: value for key, value in record.items() if key not in apart}
    return record | {"results_sha256": content_hash(content)}


def make_record(
    method: str = "side_c",
    *,
    rate: float = 0.3,
    seed: int = 0,
    target: str = "ddpm",
    scales: tuple[str, ...] = ("0.1", "0.3"),
    dataset: str = "toy",
    limited: bool = False,
    parameters: dict[str, Any] | None = None,
    finished: str = "2026-01-02T03:04:05+00:00",
    **identity: Any,
) -> dict[str, Any]:
    """A record as `membench run` writes it; the share of extracted images is `rate`."""
    settings = parameters or {"n_clusters": 50}
    stages = [
        {"stage": "synthetic set", "seconds": 80.1, "unet_calls": 102400, "classifier_calls": 0,
         "cached": True},
        {"stage": "images at 0.1", "seconds": 20.0, "unet_calls": 6400, "classifier_calls": 6400,
         "cached": False},
    ]  # fmt: skip
    record = {
        "schema": SCHEMA,
        "limited": limited,
        "limited_by": ["64 images per scale, not 128"] if limited else [],
        "identity": {
            "dataset": {"name": dataset, "revision": 1},
            "target": {"name": target},
            "method": {"name": method, "version": 1, "parameters": settings},
            "mitigation": None,
            "seed": seed,
            "guidance_scales": [float(scale) for scale in scales],
            "images_per_scale": N,
            "metrics": dict(METRIC_VERSIONS),
        }
        | identity,
        "attack": {"surrogate": None, "classifier": {"accuracy_by_timestep": {"10": 0.9}}},
        "files": {},
        "null": {},
        "per_image": {},
        **copy.deepcopy(scored(rate, seed, scales)),
        "cost": {
            "stages": stages, "unet_calls": 108800, "classifier_calls": 6400, "seconds": 100.1,
            "peak_memory_bytes": 1_200_000_000,
        },
        "provenance": {"membench": "0.1.0", "finished": finished},
    }  # fmt: skip
    return sealed(record)


def put(folder: Path, *records: dict[str, Any]) -> None:
    for record in records:
        path = folder / "records" / record["identity"]["dataset"]["name"] / f"{record['id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


@pytest.fixture
def boards(tmp_path: Path) -> Path:
    """A `leaderboards` folder with two methods, two targets and two seeds."""
    for target, strength in (("ddpm", 1.0), ("ddpm_early", 0.0)):
        for seed in (0, 1):
            put(
                tmp_path,
                make_record("random", rate=0.1 * strength, seed=seed, target=target, scales=("0",)),
                make_record("side_c", rate=0.5 * strength, seed=seed, target=target),
                make_record("side_a", rate=0.48 * strength, seed=seed, target=target),
            )
    return tmp_path


def rows_of(markdown: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading."""
    lines = markdown.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|:"))
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return body


# --- The end of a run -------------------------------------------------------------------------


def printed(thing: Any) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_report_says_what_was_measured() -> None:
    record = make_record(rate=0.3)
    band = record["scores"]["average"]["bands"]["calibrated"]["mid"]
    text = printed(table.report(record))
    for part in ("side_c on toy / ddpm, seed 0", "synthetic set", "cached", "108,800"):
        assert part in text
    assert f"{100 * band['members']['ams']:.1f} [" in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert len(re.findall(r"low +≤ 1.300 +[\d.]+ \[", text)) == 3  # on one line, at every scale
    reading = " ".join(table.reading(record).split())
    assert reading.startswith("At 1 % false matches (nL2 ≤ ")
    assert f"{100 * band['members']['ams']:.1f} % of images matched a member" in reading
    assert f"of {N} training images extracted at each scale, on average." in reading


def test_reading_admits_that_nothing_was_extracted() -> None:
    assert "shows no extraction" in table.reading(make_record(rate=0.0))
    assert "shows no extraction" not in table.reading(make_record(rate=0.5))
    assert "enters no board" in table.reading(make_record(limited=True))


def test_report_of_a_band_without_threshold() -> None:
    record = make_record(scales=("0",))
    few = calibrate(nl2(neighbours(0, 99, 20).distance)[:, 0], N)  # 20 images cannot show 1 %
    found = matches(0.3, 0)
    record["calibration"] = few.to_dict()
    record["scores"] = {"scales": {"0": score(found, few)}, "average": average([found], few)}
    assert "cannot show a false-match rate of 1 %" in table.reading(record)
    assert "–" in printed(table.report(record))
    assert "–" in leaderboard.board("toy", [sealed(record)])["toy.md"]


def test_plan_counts_what_is_left_to_do() -> None:
    text = printed(table.plan(make_record()["cost"]["stages"]))
    assert "1 of 2 stages" in text
    assert re.search(r"\n *to do +6,400 +6,400", text)


def test_markup_in_a_stage_is_printed_as_it_is() -> None:
    record = make_record()
    record["cost"]["stages"][0]["stage"] = "[red]stage[/red]"
    assert "[red]stage[/red]" in printed(table.report(record))


# --- Contact sheet ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 1), (40, 30, 3), (300, 300, 3)])
def test_contact_sheet_is_a_picture(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    members, generated = rng.integers(0, 256, (2, N, *shape), dtype=np.uint8)
    path = tmp_path / "sheet.png"
    found = {0.1: matches(0.5, 0), 0.3: matches(0.5, 1)}
    contact_sheet.contact_sheet(
        path, {0.1: generated, 0.3: generated}, found, members, title="side_c on toy", count=9
    )
    with Image.open(path) as sheet:
        assert sheet.mode == "RGB"
        assert min(sheet.size) > 300


def test_best_pairs_are_the_lowest_scores_of_distinct_members() -> None:
    members = np.zeros((N, 4, 4, 1), np.uint8)
    found = {0.1: matches(0.5, 0), 0.3: matches(0.2, 1)}
    pairs = contact_sheet.best_pairs(dict.fromkeys(found, members), found, members, 20)
    scores = [pair.score for pair in pairs]
    assert scores == sorted(scores)
    assert len({pair.index for pair in pairs}) == len(pairs) == 20
    for pair in pairs:
        assert found[pair.scale].members.listed.index[pair.row, 0] == pair.index


# --- Boards -----------------------------------------------------------------------------------


def test_board_pools_seeds_and_ranks_by_excess(boards: Path) -> None:
    leaderboard.build(boards)
    text = (boards / "toy.md").read_text()
    assert "12 runs, 3 methods, 2 targets; newest run of 2026-01-02." in text
    ddpm = text.split("## Target `ddpm_early`")[0]
    rows = rows_of(ddpm, "### Calibrated mid band: 1 % false matches")
    assert [row[0] for row in rows] == ["side_c", "side_a", "random"]
    assert rows[0][1] == f"{N} × 2 × 2"
    records = [r for r in load_records(boards / "records")["toy"] if r["identity"]["seed"] < 2]
    values = [
        100 * r["scores"]["average"]["bands"]["calibrated"]["mid"]["members"]["ams"]
        for r in records
        if (r["identity"]["method"]["name"], r["identity"]["target"]["name"]) == ("side_c", "ddpm")
    ]
    assert rows[0][2].startswith(f"{sum(values) / 2:.1f} \\[")
    assert rows[0][3] == f"{min(values):.1f}–{max(values):.1f}"


def test_board_says_who_cannot_be_told_apart(boards: Path) -> None:
    leaderboard.build(boards)
    ddpm, early = (boards / "toy.md").read_text().split("## Target `ddpm_early`")
    verdict = ddpm.split("### Calibrated mid band")[1].split("| method")[0]
    assert "Highest: **side_c**." in verdict
    assert "Not distinguishable from it (their intervals overlap): **side_a**." in verdict
    assert "random" not in verdict
    assert "No method shows extraction here" in early


def test_board_is_the_same_whatever_the_order_and_the_clock(boards: Path, tmp_path: Path) -> None:
    records = load_records(boards / "records")["toy"]
    once = leaderboard.board("toy", records)
    again = leaderboard.board("toy", records[::-1])
    assert once == again
    assert all(len(text) < 200_000 for text in once.values())


def test_limited_and_failed_records_stay_out(boards: Path) -> None:
    before = leaderboard.render(boards, draw=False)
    put(boards, make_record("side_o", limited=True), sealed(make_record("ol_ti") | {"error": "x"}))
    after = leaderboard.render(boards, draw=False)
    assert after["toy.csv"] == before["toy.csv"]
    assert "Left out as limited or failed: 2." in after["toy.md"]
    assert "side_o" not in after["toy.md"]
    put(boards, make_record(dataset="only_limited", limited=True))
    assert set(leaderboard.render(boards, draw=False)) == set(after)
    with pytest.raises(MembenchError, match="enters no board: 64 images per scale, not 128"):
        leaderboard.add(make_record(limited=True), boards)


def test_add_files_a_record_where_build_finds_it(tmp_path: Path) -> None:
    record = make_record(target="oracle:0.3")
    path = leaderboard.add(record, tmp_path)
    assert path.name == f"oracle-0.3-side_c-seed0-{record['id'][:12]}.json"
    assert load_records(tmp_path / "records") == {"toy": [record]}
    assert leaderboard.add(record, tmp_path) == path
    other = copy.deepcopy(record)
    other["attack"]["surrogate"] = "another"
    with pytest.raises(MembenchError, match="the same run with other results"):
        leaderboard.add(sealed(other), tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_add_refuses_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(MembenchError, match="no name of a data set"):
        leaderboard.add(make_record(dataset=name), tmp_path / "boards")
    assert not list(tmp_path.rglob("*.json"))


def test_one_seed_twice_in_a_row_is_refused(tmp_path: Path) -> None:
    put(tmp_path, *(make_record(artifacts={"0.1": key}) for key in ("a", "b")))
    with pytest.raises(MembenchError, match="delete the older one"):
        leaderboard.build(tmp_path)


def test_impossible_scores_are_refused(tmp_path: Path) -> None:
    record = make_record()
    record["scores"]["average"]["bands"]["calibrated"]["mid"]["members"]["ams"] = 1.5
    put(tmp_path, sealed(record))
    with pytest.raises(MembenchError, match=r"\.json: .*ams"):
        leaderboard.build(tmp_path)


def test_check_names_the_stale_file(boards: Path) -> None:
    files = leaderboard.build(boards)
    assert leaderboard.check(boards) == len(files) == 5
    for name in ("toy.md", "toy.csv"):
        path = boards / name
        whole = path.read_text()
        path.write_text(whole.replace("side_a", "side_b"))
        with pytest.raises(MembenchError, match=rf"{name}: stale.*membench leaderboard build"):
            leaderboard.check(boards)
        path.write_text(whole)
    path = boards / "toy.curves.svg"
    whole = path.read_text()
    path.write_text(whole.replace("<g", "<g ", 1))  # drawn by another matplotlib
    leaderboard.check(boards)
    path.write_text(whole.replace("sha256:", "sha256:0"))
    with pytest.raises(MembenchError, match=r"toy\.curves\.svg: stale"):
        leaderboard.check(boards)
    path.unlink()
    with pytest.raises(MembenchError, match=r"toy\.curves\.svg: missing"):
        leaderboard.check(boards)


def test_a_new_record_makes_the_board_stale(boards: Path) -> None:
    leaderboard.build(boards)
    put(boards, make_record("random", rate=0.2, seed=7, scales=("0",)))
    with pytest.raises(MembenchError, match=r"toy\..*: stale"):
        leaderboard.check(boards)
    leaderboard.build(boards)
    leaderboard.check(boards)


def test_a_board_without_records_is_refused_and_removed(boards: Path) -> None:
    leaderboard.build(boards)
    (boards / "ghost.md").write_text((boards / "toy.md").read_text())
    (boards / "findings.md").write_text("typed by hand: stays")
    with pytest.raises(MembenchError, match=r"ghost\.md: no record stands behind it"):
        leaderboard.check(boards)
    leaderboard.build(boards)
    assert not (boards / "ghost.md").exists()
    assert (boards / "findings.md").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text[: len(text) // 2], "truncated or not JSON"),
        (lambda text: "[]", "not a record of membench"),
        (lambda text: text.replace('"schema": 2', '"schema": 3'), "schema 3"),
        (lambda text: text.replace('"seed": 0', '"seed": 5'), "id is not the hash"),
        (lambda text: text.replace('"ams": 0.', '"ams": 0.1', 1), "results_sha256 is not the hash"),
    ],
)
def test_a_spoilt_record_is_named(tmp_path: Path, spoil: Any, reason: str) -> None:
    record = make_record()
    put(tmp_path, record)
    (path,) = tmp_path.glob("records/toy/*.json")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(MembenchError, match=f"{re.escape(str(path))}: .*{reason}"):
        leaderboard.build(tmp_path)


def test_a_gap_in_a_record_is_named(tmp_path: Path) -> None:
    record = make_record()
    del record["scores"]["average"]["bands"]["calibrated"]
    put(tmp_path, sealed(record))
    with pytest.raises(MembenchError, match=r"\.json: not a whole record \(KeyError"):
        leaderboard.build(tmp_path)


def test_misplaced_and_doubled_records_are_named(tmp_path: Path) -> None:
    record = make_record()
    put(tmp_path, record)
    (path,) = tmp_path.glob("records/toy/*.json")
    twin = path.with_name("zz.json")
    twin.write_text(path.read_text())
    with pytest.raises(MembenchError, match=r"zz\.json: the same run as"):
        leaderboard.build(tmp_path)
    other = tmp_path / "records/other/a.json"
    other.parent.mkdir()
    twin.rename(other)
    with pytest.raises(MembenchError, match=r"a\.json: a record of 'toy'"):
        leaderboard.build(tmp_path)


def test_parameters_tell_namesakes_apart() -> None:
    (section,) = sections([make_record(), make_record(parameters={"n_clusters": 20})])
    labels = [row.label for row in section.rows]
    assert labels == ["side_c (n_clusters=20)", "side_c (n_clusters=50)"]


def test_markup_of_plugins_does_nothing(tmp_path: Path) -> None:
    files = leaderboard.board("toy", [make_record(EVIL), make_record(target=EVIL)])
    text = files["toy.md"]
    for bad in ("<script", "</td>", "\n# big", "[a](", "![e]", "\u202e"):
        assert bad not in text
    widths = {len(row) for row in rows_of(text, "### Calibrated mid band")}
    assert len(widths) == 1
    cells = [cell for row in csv.reader(io.StringIO(files["toy.csv"])) for cell in row]
    assert not any(cell[:1] in set("=+@") for cell in cells)
    assert "<script" not in files["toy.methods.svg"]


def test_published_figures_stand_beside_unranked(boards: Path) -> None:
    (boards / "published").mkdir()
    path = boards / "published/toy.csv"
    path.write_text("source,method,band,ams_percent,ums_percent\nA paper,side_x,low,12.5,3.25\n")
    text = leaderboard.render(boards, draw=False)["toy.md"]
    assert rows_of(text, "## Published") == [["side_x", "A paper", "low", "12.5", "3.25"]]
    assert "side_x" not in text.split("## Published")[0]
    path.write_text("source,method\nA paper\n")
    with pytest.raises(MembenchError, match=r"toy\.csv: every line needs"):
        leaderboard.render(boards, draw=False)


def test_papers_bands_on_real_images_are_in_the_head() -> None:
    papers = {
        name: {"upper": upper, "rate": rate}
        for name, upper, rate in (("low", 1.5, 0.85), ("mid", 1.4, 0.77), ("high", 1.35, 0.75))
    }
    text = leaderboard.board(
        "toy", [sealed(make_record() | {"null": {"bands": {"cumulative": papers}}})]
    )["toy.md"]
    assert "nL2 ≤ 1.5 / ≤ 1.4 / ≤ 1.35, are reached by **85.0 / 77.0 / 75.0 %**" in text


def test_csv_holds_every_band_and_scale(boards: Path) -> None:
    text = leaderboard.render(boards, draw=False)["toy.csv"]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2 * (2 * (1 + 2) + (1 + 1)) * 6  # targets, methods x scales, modes x bands
    for row in rows:
        parts = [float(row[f"ams_{side}"]) for side in ("members", "heldout", "excess")]
        assert parts[0] - parts[1] == pytest.approx(parts[2], abs=1e-5)
        assert float(row["ams_excess_lower"]) <= parts[2] <= float(row["ams_excess_upper"])


@given(st.text())
def test_escaped_text_is_one_harmless_line(text: str) -> None:
    out = escaped(text)
    assert out.isprintable()
    assert not re.search(r"[<>]", out)
    assert not re.search(r"&(?!amp;|lt;|gt;)", out)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]#$:!~@]", re.sub(r"\\[^\w\s]", "", out))
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", out))
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert shown == (plain if len(plain) <= 200 else plain[:199] + "…")


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares, shares).map(sorted), min_size=1, max_size=6))
def test_pooled_interval_holds_the_mean_and_shrinks(parts: list[list[float]]) -> None:
    found = pooled((middle, (low, high)) for low, middle, high in parts)
    assert found.interval is not None
    low, high = found.interval
    assert low - 1e-12 <= found.value <= high + 1e-12
    assert found.least - 1e-12 <= found.value <= found.most + 1e-12
    assert high - low <= max(high - low for low, _, high in parts) * 2**0.5 + 1e-12


def test_pooled_known_value() -> None:
    found = pooled([(0.2, (0.1, 0.35)), (0.4, (0.3, 0.6))])
    assert found.value == pytest.approx(0.3)
    assert found.lower == pytest.approx(0.3 - 0.5 * (0.1**2 + 0.1**2) ** 0.5)
    assert found.upper == pytest.approx(0.3 + 0.5 * (0.15**2 + 0.2**2) ** 0.5)


def test_figures_know_their_data(boards: Path) -> None:
    found = sections(load_records(boards / "records")["toy"])
    points = figures.method_points(found)
    svg = figures.draw_methods(points)
    assert figures.draw_methods(points) == svg
    assert figures.mark(points) in svg
    assert figures.mark(points[:1]) not in svg


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, membench.report.leaderboard, membench.report.table, "
        "membench.report.contact_sheet; "
        "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_classifiers_of_clean_images_are_on_the_board() -> None:
    own, taught = make_record("ol_ti"), make_record("side_a")
    own["attack"]["classifier"] = {"accuracy": 0.5}
    taught["attack"]["classifier"] = {"labels": {"classifier on <b>x": {"accuracy": 0.25}}}
    text = leaderboard.board("toy", [sealed(own), sealed(taught)])["toy.md"]
    assert "- ol_ti: its own classifier, 50 %" in text
    assert "side_a: classifier on" in text
    assert "25 %" in text
    assert "<b>" not in text
