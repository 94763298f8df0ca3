"""Saved benchmarks as a table and a figure, and what lands in them."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from report import main, ratios, report
from turns import Timed, ratio, take_turns

SAVED: dict[str, Any] = {
    "machine_info": {
        "cpu": {"brand_raw": "Some CPU", "flags": ["fpu", "avx2", "avx512_bf16", "sse"]},
        "cores": 2,
        "memory_bytes": 24 * 2**30,
        "machine": "x86_64",
        "system": "Linux",
        "python_version": "3.11.2",
        "load_at_start": 0.25,
        "versions": {"torch": "2.9.0", "numpy": "2.1.0"},
        "node": "secret-host",
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2026-11-30T01:02:03",
    "benchmarks": [
        {
            "name": "test_search",
            "extra_info": {
                "what": "50 nearest",
                "clock": "CPU",
                "threads": 1,
                "load": 0.1,
                "seconds": {"ours": [1.0, 2.0, 4.0], "flat": [3.0, 4.0, 16.0], "bare": [0.5] * 3},
                "ratios": {
                    "flat": {"median": 3.0, "lower": 2.5, "upper": 3.5},
                    "bare": {"median": 0.25, "lower": 0.1875, "upper": 0.375},
                },
            },
        },
        {"name": "test_old", "extra_info": {}},
    ],
}


def test_every_ratio_is_a_row() -> None:
    rows, without = ratios(SAVED)
    assert without == ["test_old"]
    assert [(row.peer, row.median) for row in rows] == [("flat", 3.0), ("bare", 0.25)]
    assert (rows[0].ours_seconds, rows[0].peer_seconds, rows[0].rounds) == (2.0, 4.0, 3)


def test_table_and_figure(tmp_path: Path) -> None:
    assert report([SAVED], tmp_path, "speed") == ["test_old"]
    text = (tmp_path / "speed.md").read_text()
    assert "| 50 nearest | flat | **3.00** [2.50, 3.50] | 2 | 4 | 3 | 1 | CPU | 0.1 |" in text
    assert "|  | bare | **0.25** [0.19, 0.38] |" in text
    parts = ("Some CPU", "24 GiB", "avx2, avx512_bf16\n", "torch 2.9.0", "load 0.2", "![Ratios")
    for part in parts:
        assert part in text
    assert "secret-host" not in text
    image = Image.open(tmp_path / "speed.png").convert("RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x0B, 0x62, 0xA4), (0xD5, 0x5E, 0x00)} <= colours, "one is faster, one slower"


def test_files_of_two_machines_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(SAVED)
    other["machine_info"]["cpu"]["brand_raw"] = "Another CPU"
    with pytest.raises(SystemExit, match="not of one machine: processor differ"):
        report([SAVED, other], tmp_path, "speed")
    assert not list(tmp_path.iterdir())


def test_files_without_ratios_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no benchmark"):
        report([SAVED | {"benchmarks": SAVED["benchmarks"][1:]}], tmp_path, "speed")


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saved.json").write_text(json.dumps(SAVED))
    call = ["report.py", str(tmp_path / "saved.json"), "--out", str(tmp_path), "--name", "mine"]
    monkeypatch.setattr(sys, "argv", call)
    main()
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "mine.md")
    assert "test_old" in printed.err


seconds = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=9))
def test_ratio_of_rounds(rounds: list[tuple[float, float]]) -> None:
    theirs, ours = (list(part) for part in zip(*rounds, strict=True))
    found = ratio(theirs, ours)
    each = sorted(a / b for a, b in rounds)
    assert found["median"] == pytest.approx(statistics.median(each))
    assert each[0] <= found["lower"] * (1 + 1e-9)
    assert found["lower"] <= found["median"] * (1 + 1e-9) <= found["upper"] * (1 + 1e-8)
    assert found["upper"] <= each[-1] * (1 + 1e-9)


class Fixture:
    """As much of pytest-benchmark's fixture as `take_turns` calls."""

    def __init__(self, disabled: bool) -> None:
        self.disabled = disabled
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Any, *, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(1 if self.disabled else rounds + warmup_rounds):
            setup()
            target()


@pytest.mark.parametrize("disabled", [False, True])
def test_contenders_take_turns(disabled: bool) -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Any:
        def run() -> Timed:
            calls.append(name)
            return Timed(seconds * len(calls), name.upper())

        return run

    fixture = Fixture(disabled)
    peers = {"a": contender("a", 4.0), "b": lambda: calls.append("b")}
    found = take_turns(fixture, "what", contender("ours", 1.0), peers, rounds=2)
    assert found == {"a": "A", "b": None, "ours": "OURS"}
    assert calls == ["a", "b", "ours"] * (1 if disabled else 3)
    if disabled:
        assert fixture.extra_info == {}
        return
    info = json.loads(json.dumps(fixture.extra_info))
    assert info["seconds"]["ours"] == [6.0, 9.0], "the warm-up is not counted"
    assert info["seconds"]["a"] == [16.0, 28.0]
    each = [16 / 6, 28 / 9]
    assert info["ratios"]["a"]["median"] == pytest.approx(sum(each) / 2)
    assert info["what"] == "what" and info["threads"] >= 1
