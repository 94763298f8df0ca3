"""The wheel and the sdist hold the whole tree, and our plugin folders never shadow a package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {
    "membench": "membench",
    "methods": "membench_methods",
    "datasets": "membench_datasets",
}
SHIPPED = ("membench", "methods", "datasets", "leaderboards", "tests")
LOOSE = (".ci/run", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files(folder: str) -> set[str]:
    """Every file of a folder of the tree, relative to the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", ".benchmarks"} & set(path.parts)
    }


def readme_command(name: str) -> str:
    """The fenced block after `<!-- command: NAME -->`."""
    pattern = rf"<!-- command: {name} -->\n```\w*\n(.*?)\n```"
    found = re.search(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md lacks the block `<!-- command: {name} -->`"
    return found[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that knows nothing of our tree but what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plugin_folders_hold_no_init() -> None:
    """With one, `import datasets` from the root would find ours, not Hugging Face's."""
    for folder in ("datasets", "methods"):
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_hugging_face_datasets_wins_from_the_root(tmp_path: Path) -> None:
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("load_dataset = print\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import datasets; datasets.load_dataset"
    run(sys.executable, "-c", code, cwd=ROOT)  # "" comes first on the path


def test_bare_checkout_finds_its_plugins(tmp_path: Path) -> None:
    """Never installed, only on the path; the finder of an editable install is taken away."""
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
sys.path.insert(0, {str(ROOT)!r})
from membench.registry import Registry
found = Registry()
assert "fashion_mini" in found.datasets and "random" in found.methods
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_every_package_is_listed() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    folders = {Path(file).parent for file in files("membench") if file.endswith(".py")}
    ours = {".".join(folder.parts) for folder in folders}
    assert ours == {name for name in listed if name.split(".")[0] == "membench"}


def test_constraints_pin_every_dependency() -> None:
    names = r"^[A-Za-z0-9._-]+"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(names + r"==[\w.]+", pin) for pin in pins)
    pinned = {re.match(names, pin)[0].lower().replace("_", "-") for pin in pins}
    declared = project()["project"]
    wanted = declared["dependencies"] + declared["optional-dependencies"]["test"]
    assert {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in wanted} <= pinned


def test_readme_commands_are_those_of_a_bare_machine() -> None:
    for name in ("run", "test"):
        assert readme_command(name).startswith("python3 -m venv .venv && . .venv/bin/activate && ")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "tree"
    for name in sorted({*LOOSE, *(file for top in SHIPPED for file in files(top))}):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for kind in ("sdist", "wheel"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        run(sys.executable, "-c", code, cwd=copy)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_tree(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.split('/', 1)[1]}"
        for folder, package in INSTALLED_AS.items()
        for file in files(folder)
    }
    assert inside == expected


@pytest.mark.slow
def test_sdist_holds_the_tree(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {info.name.split("/", 1)[1] for info in archive if info.isfile()}
    generated = {"PKG-INFO", "setup.cfg"}
    ours = {name for name in inside - generated if ".egg-info/" not in name}
    assert ours == {*LOOSE, *(file for folder in SHIPPED for file in files(folder))}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["wheel", "editable"])
def test_installed_package_finds_its_plugins(built: Path, tmp_path: Path, mode: str) -> None:
    """From an empty folder; in an editable install a new file is seen without reinstalling."""
    environment, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    (wheel,) = built.glob("*.whl")
    source = [str(wheel)] if mode == "wheel" else ["-e", str(built / "tree")]
    # `--system-site-packages` does not reach into a virtual environment: a .pth file lends ours.
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=empty)
    (site,) = environment.glob("[lL]ib/**/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (site / "lent.pth").write_text("\n".join(lent))
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--force-reinstall", *source, cwd=empty)

    methods = (built / "tree/methods") if mode == "editable" else (site / "membench_methods")
    (methods / "extraction/dropped_in.py").write_text("seen = True\n")
    code = """
import importlib, pathlib, membench, membench_datasets
folders = map(pathlib.Path, membench_datasets.__path__)
assert "fashion_mini" in {card.stem for folder in folders for card in folder.glob("*.toml")}
assert importlib.import_module("membench_methods.extraction.dropped_in").seen
print(pathlib.Path(membench.__file__).resolve())
"""
    home = site if mode == "wheel" else built / "tree"
    assert run(python, "-c", code, cwd=empty).startswith(str(home.resolve()))
    assert "fashion_mini" in run(scripts / "membench", "list", cwd=empty)
