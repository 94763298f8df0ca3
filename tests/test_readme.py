"""The README quotes the board, not somebody's memory of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cells(line: str) -> list[str]:
    text = line.replace("\\", "").replace("*", "").replace("`", "")
    return [cell.strip() for cell in text.strip().strip("|").split("|")]


def board_rows() -> dict[tuple[str, str], list[str]]:
    """(target, method) -> cells of the calibrated mid band."""
    text = (ROOT / "leaderboards" / "fashion_mini.md").read_text()
    found = {}
    for part in text.split("\n## Target ")[1:]:
        target = part.split("`")[1]
        table = part.split("### Calibrated mid band")[1].split("\n### ")[0]
        for line in table.splitlines():
            if line.startswith("|") and not line.startswith(("|:", "| method")):
                found[target, cells(line)[0]] = cells(line)
    return found


def test_the_findings_are_the_boards() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("| target | method | AMS, %")[1].split("\n\n")[0]
    board, target, seen = board_rows(), "", 0
    for line in table.splitlines()[2:]:
        name, method, ams, heldout, excess, ums = cells(line)
        target = name or target
        _, _, board_ams, _, board_heldout, board_excess, board_ums, *_ = board[target, method]
        assert ams == board_ams.split()[0], line
        assert heldout == board_heldout.split()[0], line
        assert excess == board_excess, line
        assert ums == board_ums.split()[0], line
        seen += 1
    assert seen == len(board) == 10


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_method_it_shows_is_the_method() -> None:
    text = (ROOT / "README.md").read_text()
    shown = text.split("```python\n")[1].split("```")[0].splitlines()
    source = (ROOT / "methods" / "extraction" / "side_c.py").read_text().splitlines()
    assert all(line in source for line in shown if line.strip())


def test_what_it_says_of_classifiers_is_the_boards() -> None:
    """Accuracy of side_c and side_a by noise level on `ddpm`, and the strongest guidance."""
    text = " ".join((ROOT / "README.md").read_text().split())
    board = (ROOT / "leaderboards" / "fashion_mini.md").read_text().split("\n## Target ")[1]
    accuracy = board.split("### The attacks' classifiers")[1].split("### ")[0]
    rows = {cells(line)[0]: cells(line) for line in accuracy.splitlines() if line.startswith("| ")}
    column = {name: i for i, name in enumerate(rows["method"])}
    side_c, side_a = (
        [rows[name][column[f"t = {t}"]] for t in (100, 600, 800)] for name in ("side_c", "side_a")
    )
    assert "{} % of cases at t = 100, but in {} % at t = 600 and {} % at t".format(*side_c) in text
    assert "in {}, {} and {} % (chance: 10 %)".format(*side_a) in text
    guidance = board.split("### How strong the guidance was")[1].split("### ")[0]
    for line in guidance.splitlines():
        if line.startswith(("| side", "| ol_ti")):
            limit = 8 if "ol_ti" in line else 4
            assert all(float(cell) <= limit for cell in cells(line)[2:]), line


def test_divergences_are_the_records() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("| estimator | `ddpm`: members")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 3
    for line in table:
        estimator, *values = cells(line)
        for number, target in enumerate(("ddpm", "ddpm_early")):
            name = f"{target}-{estimator.split()[0]}.json"
            record = json.loads((ROOT / "leaderboards/divergence/fashion_mini" / name).read_text())
            (row,) = (r for r in record["results"]["epsilons"] if r["epsilon"] == 0.1)
            for side, value in zip(
                ("members", "heldout", "gap"), values[3 * number :], strict=False
            ):
                found = row["memorization_divergence"][side]
                assert value == f"{found['value']:.1f} ± {found['standard_error']:.1f}", line


def test_experiments_are_their_tables() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    folder = ROOT / "leaderboards" / "experiments" / "fashion_mini"
    theorem = json.loads((folder / "theorem.json").read_text())["rows"]
    ams = [row for row in theorem if row["measure"] == "AMS"]
    found = ["{:.1f}".format(100 * row["members"]) for row in ams]
    assert "{}, {} and {} % of plain samples".format(*found) in text
    heldout = ["{:.1f}".format(100 * row["heldout"]) for row in ams]
    assert "(held-out {}, {}, {} %)".format(*heldout) in text
    for kind in ("elbo of p(x | y)", "pf_ode of p(x | y)"):
        gaps = [
            row["gap"] for row in theorem if row["measure"] in (kind, kind.replace("x | y", "x"))
        ]
        assert gaps[0] < gaps[2], "the gap grows"
    unique = json.loads((folder / "unique.json").read_text())["reading"]
    assert "measured within the exact band at 38 of 39 sizes" in unique
    assert any(line.endswith("-18.3 %") for line in unique)
    fits = json.loads((folder / "classes.json").read_text())["reading"]
    assert any(
        line.startswith("AMS calibrated mid") and "correlation -0.1" in line for line in fits
    )


def test_what_chance_gives_is_the_calibrations() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    for name in ("fashion_mini", "cifar10", "lfw"):
        path = ROOT / "leaderboards" / "calibrations" / f"{name}.json"
        results = {r["name"]: r for r in json.loads(path.read_text())["results"]}
        first = results["as the card says"]
        rates = [f"{100 * rate:.1f}" for rate in rates_of(first)]
        counted = f"{first['calibration']['n_heldout']:,} of `{name}`"
        (line,) = (part for part in text.split("| ") if part.startswith(counted))
        after = text[text.index(line) :][:250]
        assert " / ".join(rates) + " %" in after, (name, rates)
        if name == "cifar10":
            quarter, small = (
                f"{100 * rates_of(results[key])[2]:.1f} %"
                for key in ("12,500 members", "8 x 8 pixels")
            )
            nearest = first["near_duplicates"]["nearest_rmse"]
            assert f"lies nearer than {nearest:.3f} to a training image" in text
            assert f"holds {quarter} instead of {rates[2]} %, at 8 x 8 pixels {small}" in text
        if name == "lfw":
            mids = [100 * rates_of(results[f"input {n} x {n}"])[1] for n in (224, 128)]
            assert (
                "holds {:.1f} % at an input of 224 pixels and {:.1f} % at 128".format(*mids) in text
            )
            for preset in ("official_288", "dcr_224", "amg_224"):
                assert f"{100 * rates_of(results[preset])[1]:.1f} % (`{preset}`)" in text


def rates_of(result: dict) -> list[float]:
    """False-match rates of the papers' low, mid and high band."""
    (bands,) = result["null"]["bands"].values()
    return [bands[level]["rate"] for level in ("low", "mid", "high")]
