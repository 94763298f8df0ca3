"""The five methods keep the contract, and the contract catches methods that do not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from membench.contract import CHECKS, check_method
from membench.registry import Registry
from membench.templates import write_method


def outcome(registry: Registry, name: str) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    good = check_method(registry, registry.method(name), console)
    return good, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["random", "ol_ti", "side_a", "side_o", "side_c"])
def test_methods_keep_the_contract(registry: Registry, name: str) -> None:
    good, text = outcome(registry, name)
    assert good, text
    guided = name != "random"
    assert text.count("passed") == (len(CHECKS) if guided else len(CHECKS) - 2), text


def test_the_template_keeps_the_contract(tmp_path: Path) -> None:
    write_method("my_attack", tmp_path)
    good, text = outcome(Registry([tmp_path]), "my_attack")
    assert good, text
    assert text.count("passed") == len(CHECKS)


HEAD = """
import random
from membench.plugins import extraction
"""
TIMED = (
    "lab.time_dependent(lab.synthetic(), "
    "lab.clusters(lab.synthetic(), n_clusters={}, min_cohesion=0.0))"
)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("def bad(lab):\n    return None", "summary is empty"),
        ('def bad(lab, strength):\n    """Does."""\n    return None', "one positional argument"),
        ('def bad(lab, *, f=open):\n    """Does."""\n    return None', "not JSON serializable"),
        ('def bad(lab):\n    """Does."""\n    return 3', "returned int"),
        (
            f'def bad(lab):\n    """Does."""\n    return {TIMED.format("random.randint(2, 99)")}',
            "two preparations differ",
        ),
        (
            'def bad(lab):\n    """Does."""\n    lab.store.get(lab.synthetic())\n    return None',
            "preparing wrote something",
        ),
        ('def bad(lab):\n    """Does."""\n    raise KeyError("oops")', "KeyError: 'oops'"),
    ],
)
def test_the_contract_catches(tmp_path: Path, body: str, complaint: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(f'{HEAD}\n@extraction(title="Bad", paper="none")\n{body}\n')
    good, text = outcome(Registry([tmp_path]), "bad")
    assert not good
    assert "FAILED" in text
    assert complaint in text
