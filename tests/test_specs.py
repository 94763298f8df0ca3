"""Cards: valid, or refused with file and field."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from membench.data.imageset import Dataset, load_dataset
from membench.errors import MembenchError
from membench.hashing import array_hash, content_hash, derive_seed
from membench.registry import Registry
from membench.specs import load_card


@pytest.fixture
def text(registry: Registry) -> str:
    return Path(registry.datasets["fashion_mini"].origin).read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("height = 16", "height = 0", "images.height"),
        ("height = 16", 'height = "sixteen"', "images.height"),
        ("height = 16", "height = 16\nhight = 16", "images.hight: unknown key"),
        ("images_per_scale = 512", "", "extraction.images_per_scale: Field required"),
        ('match = "any"', 'match = "all"', "similarity.match"),
        ('default_target = "ddpm"', 'default_target = "dppm"', "no target named 'dppm'"),
        ('extends = "ddpm"', 'extends = "dppm"', "targets.ddpm_early.extends"),
        ('name = "fashion_mini"', 'name = "other"', "expected the file's 'fashion_mini'"),
        ("height = 16", "height = ", "not valid TOML"),
    ],
)
def test_a_bad_card_names_file_and_field(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    assert old in text
    path = tmp_path / "fashion_mini.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(MembenchError) as error:
        load_card(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_an_extended_target_keeps_the_recipe(fashion_mini: Dataset) -> None:
    targets = fashion_mini.card.targets
    whole, early = targets["ddpm"], targets["ddpm_early"]
    assert early.unet == whole.unet
    assert early.training.model_copy(update={"stop_at": None}) == whole.training.model_copy(
        update={"stop_at": None}
    )
    assert early.training.last_step < whole.training.last_step


def test_splits_are_disjoint_and_drawn_as_the_card_says(fashion_mini: Dataset) -> None:
    parts = [fashion_mini.members, fashion_mini.auxiliary, fashion_mini.heldout]
    index = np.concatenate([part.index for part in parts])
    assert len(np.unique(index)) == len(index) == 512 + 2048 + 2048
    pixels = np.concatenate([part.images for part in parts])
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) == len(pixels)
    assert len(fashion_mini.heldout_twin) == len(fashion_mini.members)
    twin = set(fashion_mini.heldout_twin.index.tolist())
    assert not twin & set(fashion_mini.heldout_rest.index.tolist())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "truncated"),
        (lambda path: path.write_bytes(b"hello"), "truncated or not an array"),
        (lambda path: np.save(path, np.zeros((3, 16, 16, 1), np.uint8)), "shape (3, 16, 16, 1)"),
        (lambda path: np.save(path, np.zeros((512, 16, 16, 1), np.uint8)), "content differs"),
    ],
)
def test_damaged_data_names_the_file(tmp_path: Path, registry, damage, message) -> None:
    card, folder = registry.card("fashion_mini"), registry.data_folder("fashion_mini")
    for path in folder.glob("*.npy"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "members.images.npy")
    with pytest.raises(MembenchError) as error:
        load_dataset(card, tmp_path)
    assert str(tmp_path / "members.images.npy") in str(error.value)
    assert message in str(error.value)


def test_hashes_depend_on_content_alone() -> None:
    assert content_hash({"a": 1, "b": [2.5]}) == content_hash({"b": [2.5], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert array_hash(array) == array_hash(np.asfortranarray(array))
    assert array_hash(array) == array_hash(array.astype(">i4").astype("<i4"))
    assert array_hash(array) != array_hash(array.reshape(4, 3))
    assert 0 <= derive_seed("x", 1) < 2**63
    assert derive_seed("x", 1) != derive_seed("x", 2)
