"""Ranks with ties, rarefied UMS, the summary board, `diff`, and names that try to be markup."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_report import EVIL, N, make_record, matches, put, rows_of, sealed

from membench.errors import MembenchError
from membench.metrics import calibrate
from membench.metrics.calibration import Calibration
from membench.report import leaderboard
from membench.report.diff import diff
from membench.report.ranking import rank_rows, rank_section
from membench.report.rarefied import rarefaction_curve, rarefied_ums
from membench.report.records import load_records, sections
from membench.report.summary import standings, summary
from membench.scoring import incidence, pack_bits
from membench.similarity.measures import nl2
from membench.specs import Similarity

# --- Ranks ------------------------------------------------------------------------------------


def hits_record(method: str, hits: np.ndarray, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A record at one scale whose member hits in every band are given; held-out has none."""
    record = make_record(method, scales=("0",), seed=seed, **more)
    record["identity"]["similarity"] = {"band_modes": ["calibrated"], "match": "any"}
    rate = float(hits.mean())
    interval = [max(0.0, rate - 0.1), min(1.0, rate + 0.1)]
    for scores in (record["scores"]["average"], record["scores"]["scales"]["0"]):
        for band in scores["bands"]["calibrated"].values():
            for side, value in (("members", rate), ("heldout", 0.0), ("excess", rate)):
                band[side] |= {"ams": value, "ams_interval": interval if value else [0.0, 0.1]}
    nothing = np.zeros(len(hits), np.bool_)
    record["per_image"] = {
        level: {
            "members": {"0": {"hits": pack_bits(hits)}},
            "heldout": {"0": {"hits": pack_bits(nothing)}},
        }
        for level in ("low", "mid", "high")
    }
    return sealed(record)


def exact_p(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test by counting: two-sided, b against c of b + c fair coins."""
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    n = b + c
    tail = sum(math.comb(n, k) for k in range(max(b, c), n + 1)) / 2**n
    return min(1.0, 2 * tail) if n else 1.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=5), st.integers(0, 2**16))
def test_ranks_count_who_is_distinguishably_above(rates: list[float], seed: int) -> None:
    """Against Holm over McNemar's exact tests, both written anew here."""
    rng = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(len(rates))]
    hits = {name: rng.random(N) < rate for name, rate in zip(names, rates, strict=True)}
    (section,) = sections([hits_record(name, hits[name]) for name in names])
    ranking = rank_rows(section.rows)
    assert ranking.paired
    pairs = list(itertools.combinations(names, 2))
    p = {pair: exact_p(hits[pair[0]], hits[pair[1]]) for pair in pairs}
    above: dict[str, set[str]] = {name: set() for name in names}
    for place, (a, b) in enumerate(sorted(pairs, key=lambda pair: p[pair])):
        if p[a, b] * (len(pairs) - place) >= 0.05:
            break  # Holm: the first that fails ends it
        higher, lower = (a, b) if hits[a].sum() > hits[b].sum() else (b, a)
        above[lower].add(higher)
    for name in names:
        assert ranking.above[name] == above[name]
        assert ranking.rank(name) == 1 + len(above[name])
        shared = sum(len(above[other]) == len(above[name]) for other in names) > 1
        assert ranking.shown(name).endswith("=") == shared


def test_a_difference_that_may_be_chance_is_a_tie() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(N) < 0.5
    near = base.copy()
    near[np.flatnonzero(base)[:4]] = False  # 4 of 4 one way: p = 0.125
    far = base & (rng.random(N) < 0.3)
    (section,) = sections(
        [hits_record(n, h) for n, h in zip("abc", (base, near, far), strict=True)]
    )
    ranked = rank_section(section)
    assert [row.label for row in ranked.rows] == ["a", "b", "c"]
    assert [ranked.main.shown(row.label) for row in ranked.rows] == ["1=", "1=", "3"]
    board = leaderboard.board("toy", [r for row in ranked.rows for r in row.records])["toy.md"]
    assert [row[0] for row in rows_of(board, "### Ranking")] == ["1=", "1=", "3"]
    assert "Not distinguishable from it (same seeds compared image by image" in board


def test_without_the_same_seeds_only_intervals_that_do_not_touch_rank() -> None:
    rng = np.random.default_rng(1)
    half, all_but = rng.random(N) < 0.5, rng.random(N) < 0.95
    records = [hits_record("a", half), hits_record("b", all_but, seed=1)]
    (section,) = sections(records)
    ranking = rank_rows(section.rows)
    assert not ranking.paired
    assert [ranking.shown(name) for name in "ba"] == ["1", "2"]


def test_rows_of_different_n_g_are_paired_on_the_images_both_drew() -> None:
    rng = np.random.default_rng(2)
    hits = rng.random(N) < 0.5
    fewer = hits_record("b", hits[:64], images_per_scale=64)
    (section,) = sections([hits_record("a", hits), fewer])
    ranking = rank_rows(section.rows)
    assert ranking.paired
    assert ranking.above == {"a": frozenset(), "b": frozenset()}  # the same on the first 64


# --- Incidence and rarefied UMS ---------------------------------------------------------------


def test_incidence_counts_how_often_a_member_is_matched() -> None:
    similarity = Similarity()
    calibration = calibrate(nl2(matches(0, 99).members.listed.distance)[:, 0], N)
    calibration = Calibration.from_dict(calibration.to_dict())
    found = matches(0.5, 3)
    kept = incidence({0.1: found}, calibration, similarity)
    for level in kept:
        threshold = calibration.values[level]
        assert threshold is not None
        for side in ("members", "heldout"):
            listed = found.side(side).listed
            score = listed.distance / (0.5 * listed.distance.mean(axis=1, keepdims=True))
            times: dict[int, int] = {}
            for image, column in zip(*np.nonzero(score <= threshold), strict=True):
                reference = int(listed.index[image, column])
                times[reference] = times.get(reference, 0) + 1
            expected: dict[int, int] = {}
            for count in times.values():
                expected[count] = expected.get(count, 0) + 1
            got = kept[level][side]["0.1"]
            assert dict(zip(got["times"], got["references"], strict=True)) == expected, (
                level,
                side,
            )


def with_incidence(record: dict[str, Any], found: dict[str, np.ndarray]) -> dict[str, Any]:
    """found: matched [images, references] of each side, the same at every scale and level."""
    parts = {}
    for side, matrix in found.items():
        counts = matrix.sum(axis=0)
        times, references = np.unique(counts[counts > 0], return_counts=True)
        packed = {"times": times.tolist(), "references": references.tolist()}
        parts[side] = dict.fromkeys(record["scores"]["scales"], packed)
    record["incidence"] = dict.fromkeys(("low", "mid", "high"), parts)
    return record


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 7), st.floats(0.02, 0.6))
def test_rarefied_ums_is_the_mean_over_all_subsets(seed: int, size: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    images = 8
    found = {side: rng.random((images, 12)) < rate for side in ("members", "heldout")}
    record = with_incidence(make_record(scales=("0",), images_per_scale=images), found)
    values = {}
    for side, matrix in found.items():
        subsets = itertools.combinations(range(images), size)
        values[side] = np.mean([matrix[list(rows)].any(axis=0).sum() / size for rows in subsets])
        got = rarefied_ums(record, "mid", side, size)
        assert got is not None
        assert got[0] == pytest.approx(values[side], abs=1e-12)
        assert got[1][0] <= got[0] <= got[1][1]
    got = rarefied_ums(record, "mid", "excess", size)
    assert got is not None
    assert got[0] == pytest.approx(values["members"] - values["heldout"], abs=1e-12)
    curve = dict(rarefaction_curve(record, "mid", "members", points=8) or [])
    assert curve[size] == pytest.approx(values["members"], abs=1e-12)
    assert curve[images] == pytest.approx(found["members"].any(axis=0).sum() / images)


def test_rows_with_different_n_g_share_a_ranking_and_their_ums_is_rarefied(tmp_path: Path) -> None:
    """UMS of the larger run stands at the smaller one's N_G; AMS is a rate and stays as it is."""
    rng = np.random.default_rng(4)
    found = {side: rng.random((N, 40)) < 0.02 for side in ("members", "heldout")}
    extra = {"similarity": {"band_modes": ["calibrated"], "match": "any"}}
    large = sealed(with_incidence(make_record("a", scales=("0",), **extra), found))
    small = make_record("b", scales=("0",), images_per_scale=64, **extra)
    (section,) = sections([large, small])
    assert section.ums_images == 64
    of_large = next(row for row in section.rows if row.label == "a")
    ums = of_large.band("calibrated", "mid", "members", "ums")
    expected = rarefied_ums(large, "mid", "members", 64)
    assert ums is not None
    assert expected is not None
    assert (ums.value, ums.interval) == (expected[0], pytest.approx(expected[1]))
    ams = of_large.band("calibrated", "mid", "members")
    assert ams is not None
    assert ams.value == large["scores"]["average"]["bands"]["calibrated"]["mid"]["members"]["ams"]
    files = leaderboard.board("toy", [large, small])
    assert "128 images per guidance scale; UMS at 64 images." in files["toy.md"]
    rows = list(csv.DictReader(io.StringIO(files["toy.csv"])))
    assert {row["ums_images"] for row in rows} == {"64"}
    papers = [r for r in rows if r["mode"] == "cumulative" and r["method"] == "a"]
    assert papers
    assert all(r["ums_members"] == "" for r in papers), "no incidence there, so no UMS at 64"
    del large["incidence"]
    (section,) = sections([sealed(large), small])
    of_large = next(row for row in section.rows if row.label == "a")
    assert of_large.band("calibrated", "mid", "members", "ums") is None


# --- Divergence, CSV --------------------------------------------------------------------------


def divergence_record(target: dict[str, Any]) -> dict[str, Any]:
    part = {"value": 12.34, "standard_error": 0.56}
    record = {
        "kind": "divergence", "schema": 1, "files": {}, "provenance": {}, "cost": {},
        "identity": {
            "target": target, "dataset": {"name": "toy"},
            "divergence": {"estimator": "pf_ode", "images": 64},
        },
        "results": {"epsilons": [
            {"epsilon": 0.1, "memorization_divergence": dict.fromkeys(
                ("members", "heldout", "gap"), part)}]},
    }  # fmt: skip
    return sealed(record)


def test_divergence_stands_with_its_target_only(tmp_path: Path) -> None:
    put(tmp_path, make_record(target="ddpm"), make_record(target="other"))
    path = tmp_path / "divergence/toy/x.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(divergence_record({"name": "ddpm"})))
    text = leaderboard.render(tmp_path, draw=False)["toy.md"]
    ddpm, other = text.split("## Target `ddpm`")[1].split("## Target `other`")
    assert rows_of(ddpm, "### Divergence")[0][:6] == [
        "pf\\_ode" if "pf\\_ode" in ddpm else "pf_ode", "0.1", "64", *["12.3 ± 0.6"] * 3
    ]  # fmt: skip
    assert "Divergence" not in other
    edited = json.loads(path.read_text())
    edited["results"]["epsilons"][0]["epsilon"] = 0.2
    path.write_text(json.dumps(edited))
    with pytest.raises(MembenchError, match=r"x\.json: results_sha256 is not the hash"):
        leaderboard.render(tmp_path, draw=False)


def test_csv_has_rank_cost_and_date_where_they_belong(tmp_path: Path) -> None:
    put(tmp_path, make_record("a"), make_record("b", rate=0.0))
    rows = list(csv.DictReader(io.StringIO(leaderboard.render(tmp_path, draw=False)["toy.csv"])))
    for row in rows:
        average = row["scale"] == "average"
        assert (row["rank"] != "") == (average and row["mode"] == "calibrated")
        assert (row["seconds"] == "100.1") == average
        assert row["newest"] == ("2026-01-02T03:04:05+00:00" if average else "")
        record = make_record(row["method"], rate=0.3 if row["method"] == "a" else 0.0)
        if average:
            found = record["scores"]["average"]["top_percent"]["members"]["1"]
            assert float(row["top_1_percent_members"]) == pytest.approx(found, rel=1e-5)


# --- Summary ----------------------------------------------------------------------------------


def ranked(*records: dict[str, Any]) -> list[Any]:
    return [rank_section(section) for section in sections(records)]


def test_summary_ranks_over_targets_and_names_the_worst_case() -> None:
    rng = np.random.default_rng(5)
    strong, weak = rng.random(N) < 0.8, rng.random(N) < 0.2
    boards = {
        "one": ranked(
            hits_record("a", strong, dataset="one"), hits_record("b", weak, dataset="one")
        ),
        "two": ranked(
            hits_record("a", weak, dataset="two"),
            hits_record("b", strong, dataset="two"),
            hits_record("c", strong, dataset="two"),
        ),
    }
    found, total = standings(boards)
    assert total == 2
    assert [(s.method, s.ranks, s.first) for s in found] == [
        ("b", (2, 1), 1), ("a", (1, 3), 1), ("c", (1,), 1)
    ]  # fmt: skip
    text = summary(boards, ["three"])
    methods = rows_of(text, "## Methods")
    assert [row[:4] for row in methods] == [
        ["1", "b", "2 of 2", "1.50"], ["2", "a", "2 of 2", "2.00"], ["–", "c", "1 of 2", "1.00"]
    ]  # fmt: skip
    targets = rows_of(text, "## Targets")
    assert [row[:3] for row in targets] == [["one", "`ddpm`", "a"], ["two", "`ddpm`", "b"]]
    assert targets[0][-1] == "none"
    assert targets[1][-1] == "**c**"
    assert "[three](three.md): what chance gives; no runs yet" in text


def test_a_mitigated_target_is_a_target_of_its_own() -> None:
    rng = np.random.default_rng(6)
    hits = rng.random(N) < 0.5
    plain, mitigated = hits_record("a", hits), hits_record("a", hits, mitigation={"name": "<b>dp"})
    boards = {"toy": ranked(plain, mitigated)}
    text = summary(boards)
    assert [row[1] for row in rows_of(text, "## Targets")] == ["`ddpm`", "`ddpm` with &lt;b&gt;dp"]
    assert standings(boards)[1] == 2


def test_summary_goes_stale_too(tmp_path: Path) -> None:
    put(tmp_path, make_record("a"))
    leaderboard.build(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("1 run", "2 runs"))
    with pytest.raises(MembenchError, match=r"README\.md: stale"):
        leaderboard.check(tmp_path)


# --- diff -------------------------------------------------------------------------------------


def test_diff_shows_rows_and_ranks_that_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    base = rng.random(N) < 0.6
    worse = base & (rng.random(N) < 0.5)
    put(tmp_path, hits_record("a", worse), hits_record("b", worse & (rng.random(N) < 0.3)))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    new = hits_record("c", base)
    found = diff(tmp_path, [new])
    assert found["records"] == [{"id": new["id"], "status": "new"}]
    changes = {row["after"]["method"]: row for row in found["rows"]}
    assert {name: row["change"] for name, row in changes.items()} == {
        "a": "rank only", "b": "rank only", "c": "new row"
    }  # fmt: skip
    ranks = {name: (row["before"] or {}).get("rank") for name, row in changes.items()}
    assert ranks == {"a": "1", "b": "2", "c": None}
    assert {name: row["after"]["rank"] for name, row in changes.items()} == {
        "a": "2", "b": "3", "c": "1"
    }  # fmt: skip
    assert {m["method"]: (m["before"], m["after"]) for m in found["mean_ranks"]} == {
        "a": (1.0, 2.0), "b": (2.0, 3.0), "c": (None, 1.0)
    }  # fmt: skip
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    put(tmp_path, new)
    assert diff(tmp_path, [new])["rows"] == []
    other = copy.deepcopy(new)
    other["attack"]["surrogate"] = "another"
    assert diff(tmp_path, [sealed(other)])["records"][0]["status"].endswith("with other results")
    with pytest.raises(MembenchError, match="enters no board"):
        diff(tmp_path, [make_record(limited=True)])


def test_diff_follows_a_row_whose_label_grows(tmp_path: Path) -> None:
    put(tmp_path, make_record(parameters={"n_clusters": 50}))
    found = diff(tmp_path, [make_record(parameters={"n_clusters": 20})])
    by_label = {row["after"]["method"]: row for row in found["rows"]}
    assert by_label["side_c (n_clusters=50)"]["before"]["method"] == "side_c"
    assert by_label["side_c (n_clusters=20)"]["before"] is None


def test_diff_on_the_command_line(command: Command, tmp_path: Path) -> None:
    put(tmp_path / "leaderboards", make_record("a"))
    path = tmp_path / "record.json"
    path.write_text(json.dumps(make_record("[red]b", seed=0)))
    shown = command("leaderboard", "diff", path).stdout
    assert "new row" in shown
    assert "[red]b" in shown
    assert json.loads(command("leaderboard", "diff", path, "--json").stdout)["rows"]


# --- Names that try to be markup --------------------------------------------------------------

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    EVIL,
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1))",
    "[x]: javascript:alert(1)",
    "<!-- -->",
    "a|b|c\n|d|",
    "# h",
    "- item",
    "1. one",
    "> quote",
    "```\ncode",
    "~~~",
    "~~gone~~",
    "***",
    "---",
    "===",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "\\",
    "\\|",
    "`",
    "``x``",
    "*a* _b_ **c**",
    "www.example.org http://example.org a@b.org",
    "<http://example.org>",
    "![i](https://example.org/i.png)",
    "\u2028\u2029\u0000\u202e",
    "$x$",
    ":smile: @someone #1",
    "",
]


def leaves(tokens: list[Token]) -> list[Token]:
    return [leaf for token in tokens for leaf in (token, *leaves(token.children or []))]


def shape(markdown: str) -> list[tuple[str, str]]:
    """What a page is made of, whatever its words are."""
    kinds = ("text", "text_special", "code_inline", "softbreak")
    found = leaves(RENDERER.parse(markdown))
    return [
        (t.type, str(t.attrGet("href") or t.attrGet("src") or "")) for t in found
        if t.type not in kinds and t.type != "inline"
    ]  # fmt: skip


def page(name: str, note: str) -> dict[str, str]:
    """A board and the summary in which a name stands wherever somebody else chooses it."""
    record = make_record(
        name, target=name, parameters={"x": note}, mitigation={"name": name}, scales=("0",)
    )
    record["attack"]["classifier"] = {
        "accuracy_by_timestep": {"10": 0.9}, "labels": {note: {"accuracy": 0.5}},
    }  # fmt: skip
    record["provenance"]["finished"] = note[:10] or "x"
    record["identity"]["dataset"]["revision"] = name
    record["identity"]["compute"] = {"device": name}
    other = copy.deepcopy(record)
    other["identity"]["method"]["parameters"] = {"x": f"{note}2"}
    records = [sealed(record), sealed(other)]
    published = [
        {"method": name, "source": note, "band": name, "ams_percent": note, "ums_percent": name}
    ]
    text = leaderboard.board("toy", records, published, draw=False)["toy.md"]
    boards = {"toy": [rank_section(section) for section in sections(records)]}
    return {"board": text, "summary": summary(boards)}


PLAIN = {key: shape(text) for key, text in page("plain", "words").items()}


def check_harmless(name: str, note: str) -> None:
    for key, text in page(name, note).items():
        assert shape(text) == PLAIN[key], (key, name, note)
        html = RENDERER.render(text)
        assert "<script" not in html
        assert "onerror=" not in html.replace("onerror=alert(1)&gt;", "")
        assert 'javascript:alert(1)"' not in html


@pytest.mark.parametrize("name", HOSTILE)
def test_known_attacks_change_nothing_on_a_rendered_board(name: str) -> None:
    """Same headings, tables, cells, links and pictures as with a harmless name."""
    check_harmless(name, name[::-1])


@settings(max_examples=25, deadline=None)
@given(
    st.text(max_size=40) | st.text(alphabet="|`*_[]()<>!#\\&;:~-+=\n 1a", max_size=20),
    st.text(alphabet="|`*[]()<>!#\\&~-\n ab\u202e", max_size=20),
)  # fmt: skip
def test_no_name_changes_a_rendered_board(name: str, note: str) -> None:
    check_harmless(name, note)


def test_the_committed_boards_are_made_of_the_expected_parts() -> None:
    """One comment of HTML, links to files beside the board, nothing else from outside."""
    folder = Path(__file__).parents[1] / "leaderboards"
    for path in folder.glob("*.md"):
        text = path.read_text()
        for token in leaves(RENDERER.parse(text)):
            if token.type.startswith("html"):
                assert token.content.strip().startswith("<!-- Generated by"), path
            for key in ("href", "src"):
                if token.attrGet(key):
                    assert (folder / str(token.attrGet(key))).is_file(), path


def test_committed_records_know_how_often_members_come_back() -> None:
    folder = Path(__file__).parents[1] / "leaderboards" / "records"
    records = [record for found in load_records(folder).values() for record in found]
    assert records
    for record in records:
        for level, sides in record["incidence"].items():
            for side, scales in sides.items():
                for scale, packed in scales.items():
                    band = record["scores"]["scales"][scale]["bands"]["calibrated"][level][side]
                    assert sum(packed["references"]) == band["unique"]
                    times = zip(packed["times"], packed["references"], strict=True)
                    assert sum(t * n for t, n in times) == band["pairs"]
