"""The five methods keep the contract, and the contract catches methods that do not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from membench import contract
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


def test_a_method_of_which_everything_was_skipped_fails(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "CHECKS", (contract.scale_zero_is_random, contract.guidance_acts))
    good, text = outcome(registry, "random")
    assert not good
    assert text.count("skipped") == 3, "twice for the checks, once for the verdict"
    assert "nothing was tested" in text


def test_a_method_that_ignores_its_scale_is_caught(tmp_path: Path) -> None:
    """Guidance that is switched on at scale 0, or off above it, does not pass."""
    write_method("my_attack", tmp_path)
    found = Registry([tmp_path])
    dataset = contract.small_dataset(found)
    lab = contract.Lab(
        dataset,
        contract.OracleTarget(dataset, 0.5),
        contract.Store(tmp_path / "r"),
        contract.silent,
    )
    sample = contract.Lab.sample

    def stubborn(self, rows, labels, surrogate, condition, scale, seed, sampling):
        return sample(self, rows, labels, surrogate, condition, max(scale, 1.0), seed, sampling)

    bench = contract.Bench(found.method("my_attack"), lab)
    contract.scale_zero_is_random(bench)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract.Lab, "sample", stubborn)
        with pytest.raises(AssertionError, match="scale 0 changes images"):
            contract.scale_zero_is_random(bench)
