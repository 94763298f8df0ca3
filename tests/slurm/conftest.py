"""The cluster of the tests, started once, and the table of what the faults did."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import UNAVAILABLE, Cluster, Trial

from membench.files import read_json

TABLE = "MEMBENCH_FAULT_TABLE"
"""Environment variable: the file for the table of what each fault cost (Markdown)."""
HEAD = ("event", "what happened", "work lost, s", "until it went on, s", "computed twice")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes; skips, with the script's reason, where they cannot be had."""
    place = Path(tempfile.mkdtemp(prefix="membench-slurm-"))
    place.chmod(
        0o755
    )  # munge wants its socket to be reachable for all, which pytest's folders are not
    found = Cluster(place / "cluster")
    code = found.up().returncode
    if code == UNAVAILABLE:
        reason = found.said().splitlines()[-1]
        shutil.rmtree(place)
        pytest.skip(reason)
    before = dict(os.environ)
    os.environ.update(found.environment)
    try:
        assert code == 0, found.said()
        yield found
    finally:
        found.down()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(place)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that every trial needs and none is about: the first that makes them leaves them."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def trial(cluster: Cluster, tmp_path: Path, shared: Path) -> Iterator[Trial]:
    found = Trial(tmp_path, tmp_path / "results")
    shutil.copytree(shared, found.results / "artifacts")
    yield found
    cluster.up()  # whatever the fault has stopped
    for path in (found.results / "artifacts").glob("*/*/artifact.json"):
        place = shared / path.parent.relative_to(found.results / "artifacts")
        titles = ("near-duplicates", "calibration")
        if read_json(path)["title"] in titles and not place.exists():
            shutil.copytree(path.parent, place)


@pytest.fixture(scope="session")
def fault_table() -> Iterator[Callable[..., None]]:
    """Takes a row from each test; written at the end, if the environment names a file."""
    rows: list[tuple[str, ...]] = []

    def add(event: str, happened: str, *, lost: float, waited: float, twice: int) -> None:
        rows.append((event, happened, f"{lost:.1f}", f"{waited:.1f}", str(twice)))

    yield add
    if os.environ.get(TABLE) and rows:
        lines = [HEAD, ("---",) * len(HEAD), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        Path(os.environ[TABLE]).write_text(text + "\n", encoding="utf-8")
