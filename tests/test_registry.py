"""Names, origins, collisions, broken plugins, third parties."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from membench import catalogue
from membench.errors import MembenchError
from membench.plugins import Method
from membench.registry import Broken, Registry

PLUGIN = '''
from membench.plugins import extraction

@extraction(title="{title}", paper="unpublished")
def prepare(lab, *, strength: float = 1.0, fast: bool = False):
    """Does nothing."""
    return None
'''


def write(folder: Path, name: str, text: str = PLUGIN) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text.format(title=name) if text is PLUGIN else textwrap.dedent(text))
    return path


def test_the_five_methods_and_the_data_set_are_there(registry: Registry) -> None:
    methods = registry.all_methods()
    assert not [method for method in methods if isinstance(method, Broken)]
    assert {"random", "ol_ti", "side_a", "side_o", "side_c"} <= {method.name for method in methods}
    assert registry.card("fashion_mini").name == "fashion_mini"


def test_a_folder_of_plugins(tmp_path: Path) -> None:
    path = write(tmp_path, "mine")
    write(tmp_path, "_helper", "raise RuntimeError('not a plugin')")
    method = Registry([tmp_path]).method("mine")
    assert method.title == "mine"
    assert method.origin.startswith(str(path))
    assert method.parameters == {"strength": 1.0, "fast": False}


def test_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "third_party_module")
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[membench.plugins]\n"
        "by_entry = third_party_module\n"
        "to_object = third_party_module:prepare\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = Registry()
        assert found.method("by_entry").name == "by_entry"
        assert found.method("to_object").source_sha256 == found.method("by_entry").source_sha256
    finally:
        sys.modules.pop("third_party_module", None)


def test_a_collision_names_both_origins(tmp_path: Path) -> None:
    path = write(tmp_path, "side_c")
    with pytest.raises(MembenchError) as error:
        Registry([tmp_path])
    assert str(path) in str(error.value)
    assert str(Path("extraction") / "side_c.py") in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "expected one function under @extraction or @descriptor, found 0"),
        (
            "from membench.plugins import extraction\n"
            "@extraction(title='t', paper='p')\nclass A:\n    pass",
            "AttributeError",
        ),
    ],
)
def test_a_broken_plugin_harms_nothing_else(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path, "broken", text)
    write(tmp_path, "fine")
    found = Registry([tmp_path])
    by_name = {method.name: method for method in found.all_methods()}
    assert isinstance(by_name["broken"], Broken)
    assert reason in by_name["broken"].reason
    assert isinstance(by_name["fine"], Method)
    with pytest.raises(MembenchError, match="is broken") as error:
        found.method("broken")
    assert str(path) in str(error.value)
    assert reason in str(error.value)
    shown = [row for row in catalogue.rows(found, "methods") if row["name"] == "broken"]
    assert reason in shown[0]["title"]


def test_an_invalid_card_is_shown_as_broken(tmp_path: Path, registry: Registry) -> None:
    text = Path(registry.datasets["fashion_mini"].origin).read_text()
    (tmp_path / "mine.toml").write_text(text.replace('"fashion_mini"', '"mine"') + "\ncolour = 1\n")
    found = Registry([tmp_path])
    broken = [card for card in found.all_cards() if isinstance(card, Broken)]
    assert [card.name for card in broken] == ["mine"]
    assert "unknown key" in broken[0].reason


def test_did_you_mean(registry: Registry) -> None:
    with pytest.raises(MembenchError, match="no method named 'SIDE-C'; did you mean 'side_c'"):
        registry.method("SIDE-C")
    with pytest.raises(MembenchError, match="did you mean 'fashion_mini'"):
        registry.card("fashionmini")
    with pytest.raises(MembenchError, match="there are: "):
        registry.method("zzz")


def test_settings_are_typed_like_their_defaults(tmp_path: Path) -> None:
    write(tmp_path, "mine")
    method = Registry([tmp_path]).method("mine")
    assert method.settings({"strength": "2"}) == {"strength": 2.0, "fast": False}
    assert method.settings({"fast": "true"})["fast"] is True
    with pytest.raises(MembenchError, match="mine: no parameter named 'power'; it has: strength"):
        method.settings({"power": "1"})
    with pytest.raises(MembenchError, match="mine: strength: 'strong', expected float"):
        method.settings({"strength": "strong"})


def test_a_missing_plugins_folder(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match="expects a folder"):
        Registry([tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["side_c", "fashion_mini", "fashion_mini/ddpm", "ams"])
def test_info_describes_every_kind(registry: Registry, name: str) -> None:
    assert catalogue.describe(registry, name)["name"] == name.rpartition("/")[2]


def test_info_of_an_unknown_name(registry: Registry) -> None:
    with pytest.raises(MembenchError, match="did you mean 'side_c'"):
        catalogue.describe(registry, "sidec")
