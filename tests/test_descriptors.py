"""Descriptors: weights are checked before they are loaded, blocks survive a kill, rows are right.

A small TorchScript network made here goes the way of the official file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from membench import catalogue, describing
from membench.contract import CHECKS, check_descriptor
from membench.contract_descriptor import DESCRIPTOR_CHECKS
from membench.describing import BLOCK
from membench.diffusion.clusters import cluster
from membench.diffusion.targets import OracleTarget
from membench.errors import MembenchError
from membench.hashing import derive_seed, file_hash
from membench.lab import Lab
from membench.plugins import Descriptor, Method
from membench.registry import Broken, Registry
from membench.similarity.descriptors import BATCH, Extractor, describe, load
from membench.specs import DescriptorChoice
from membench.store import PARTS, Store
from membench.templates import write_descriptor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PLUGIN = '''"""A small network."""
from membench.plugins import Describe, Setup, Weights, descriptor
from membench.similarity.runtimes import torchscript

@descriptor(
    title="Small", paper="none", dimensions={dimensions}, preset="official_288",
    weights=Weights("small.torchscript.pt", "https://example.org", "{sha256}", {size}),
)
def small(setup: Setup) -> Describe:
    """A small network."""
    return torchscript(setup)
'''


class Small(torch.nn.Module):
    """Convolutions, pooling and a projection, as SSCD has them; not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, stride=4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, stride=2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(128, 24),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.layers(x)


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture
def weights(network: Small, tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "small.torchscript.pt"
    path.parent.mkdir()
    torch.jit.script(network).save(str(path))
    return path


@pytest.fixture
def found(weights: Path, tmp_path: Path) -> Registry:
    """A registry with the small network as descriptor `small`."""
    return registry_of(tmp_path, weights)


def registry_of(tmp_path: Path, weights: Path, dimensions: int = 24) -> Registry:
    folder = tmp_path / "plugins"
    folder.mkdir(exist_ok=True)
    text = PLUGIN.format(
        sha256=file_hash(weights), size=weights.stat().st_size, dimensions=dimensions
    )
    (folder / "small.py").write_text(text)
    return Registry([folder])


def images(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 20, 24, channels), dtype=np.uint8)


CHOICE = DescriptorChoice(name="small", input_size=32)


# -- weights ------------------------------------------------------------------------------------


def test_the_network_by_hand(found: Registry, network: Small, weights: Path) -> None:
    """One image at a time, normalised in float64, against batches of the TorchScript file."""
    x = images(BATCH + 3)[:, :, :20]
    choice = DescriptorChoice(name="small", input_size=20)
    rows = describe(x, load(found.descriptor("small"), choice, weights=weights))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    double = Small().double()
    double.load_state_dict(network.state_dict())
    for image, row in zip(x, rows, strict=True):
        pixels = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)[None])
        expected = double(pixels)[0].detach().numpy()
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=2e-6)


def test_missing_weights(found: Registry, tmp_path: Path) -> None:
    plugin = found.descriptor("small")
    with pytest.raises(MembenchError) as error:
        load(plugin, CHOICE)
    for part in ("small.torchscript.pt", "https://example.org", plugin.weights.sha256):
        assert part in str(error.value)
    assert "--descriptor-weights PATH" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MembenchError, match=r"nowhere.pt: cannot be read .* needs small"):
        load(plugin, CHOICE, weights=tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[:-100], "bytes, expected the"),
        (lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "SHA-256 .*, expected small"),
        (lambda data: b"", "0 bytes, expected the"),
    ],
)
def test_wrong_weights_are_never_loaded(
    found: Registry,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    complaint: str,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch.jit, "load", refuse)
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(MembenchError, match=complaint) as error:
        load(found.descriptor("small"), CHOICE, weights=weights)
    assert "https://example.org" in str(error.value) and str(weights) in str(error.value)


def test_a_file_that_is_no_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    path.write_text("not a network")
    found = registry_of(tmp_path, path)
    with pytest.raises(MembenchError, match=r"text.pt: not a TorchScript file"):
        load(found.descriptor("small"), CHOICE, weights=path)


def test_the_official_file_is_pinned(registry: Registry) -> None:
    weights = registry.descriptor("sscd_disc_mixup").weights
    assert weights is not None and weights.size == 98_791_638
    assert weights.sha256 == "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"


# -- what comes out -----------------------------------------------------------------------------


def extractor(function: Callable[[np.ndarray], np.ndarray], dimensions: int | None) -> Extractor:
    from membench.similarity.preprocessing import Preprocessing

    return Extractor("mine", dimensions, Preprocessing(), 4, function)


def test_bad_descriptors_are_refused() -> None:
    x = images(6)
    with pytest.raises(MembenchError, match=r"shape \(4, 3\), expected \(4, 5\)"):
        describe(x, extractor(lambda batch: batch.mean(axis=(1, 2)), 5))
    for value, length in ((np.nan, "nan"), (np.inf, "inf"), (0.0, "0")):
        with pytest.raises(MembenchError, match=f"of length {length} for image 0"):
            describe(x, extractor(lambda batch, value=value: np.full((len(batch), 3), value), 3))
    with pytest.raises(MembenchError, match="there are no images"):
        describe(x[:0], extractor(lambda batch: batch.mean(axis=(1, 2)), 3))


def test_flipped_is_the_mirror_image(found: Registry, weights: Path) -> None:
    x = images(5)
    ready = load(found.descriptor("small"), CHOICE, weights=weights)
    mirrored = np.ascontiguousarray(x[:, :, ::-1])
    np.testing.assert_array_equal(describe(x, ready, flipped=True), describe(mirrored, ready))
    assert not np.allclose(describe(x, ready), describe(mirrored, ready))


def test_pixels_against_their_formula(registry: Registry) -> None:
    x = images(5, channels=1)[:, :, :20]
    x[0] = 128  # a constant image still has a direction
    rows = describe(x, load(registry.descriptor("pixels"), DescriptorChoice(name="pixels")))
    expected = np.repeat(x, 3, axis=3).reshape(5, -1) / 127.5 - 1
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected, atol=1e-7)


# -- the artifact -------------------------------------------------------------------------------


def counted(lab: Lab, weights: Path, registry: Registry, calls: list[int]) -> Lab:
    """The lab with the small network; `calls` grows by the images of every batch."""

    @contextmanager
    def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        assert unit == "images"
        yield calls.append

    return replace(lab, registry=registry, descriptor_weights=weights, progress=progress)


def test_descriptors_of_a_split(lab: Lab, found: Registry, weights: Path) -> None:
    calls: list[int] = []
    lab = counted(lab, weights, found, calls)
    ready = load(found.descriptor("small"), CHOICE, weights=weights)
    for flipped in (False, True):
        artifact = lab.descriptors_of("members", CHOICE, flipped)
        rows = lab.store.get(artifact)
        assert isinstance(rows, np.memmap) and rows.dtype == np.float32 and rows.shape == (64, 24)
        expected = describe(lab.dataset.members.images, ready, flipped=flipped)
        np.testing.assert_array_equal(rows, expected)
    assert sum(calls) == 2 * 64
    lab.store.get(lab.descriptors_of("members", CHOICE))
    assert sum(calls) == 2 * 64, "computed twice"


def test_what_is_in_the_identity(lab: Lab, found: Registry, weights: Path) -> None:
    lab = replace(lab, registry=found, descriptor_weights=weights)

    def key(split: str = "members", flipped: bool = False, **changes: object) -> str:
        choice = CHOICE.model_copy(update=changes)
        return lab.descriptors_of(split, choice, flipped).key  # type: ignore[arg-type]

    plain = key()
    different = {
        key("heldout"),
        key(flipped=True),
        key(resize_first=8),
        key(storage="float16"),
        key(input_size=48),
        *(key(input_size=None, preset=name) for name in ("official_320", "dcr_224", "amg_224")),
    }
    assert len(different) == 8 and plain not in different
    assert key(weights="/somewhere/else.pt") == plain, "a path is no identity"
    assert key(input_size=None) == key(input_size=None, preset="official_288"), "its own preset"
    assert key(input_size=320) == key(input_size=None, preset="official_320"), "the same pixels"


def test_a_kill_loses_one_block(
    lab: Lab, found: Registry, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describing, "BLOCK", 2 * BATCH)
    calls: list[int] = []
    lab = counted(lab, weights, found, calls)
    whole = lab.store.get(lab.descriptors_of("members", CHOICE))
    assert calls == [BATCH] * (64 // BATCH)

    stopped: list[int] = []

    @contextmanager
    def stop_in_third_block(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(n: int) -> None:
            stopped.append(n)
            if sum(stopped) > 4 * BATCH:
                raise KeyboardInterrupt

        yield advance

    elsewhere = replace(lab, store=Store(lab.store.root / "killed"))
    killed = replace(elsewhere, progress=stop_in_third_block).descriptors_of("members", CHOICE)
    with pytest.raises(KeyboardInterrupt):
        elsewhere.store.get(killed)
    assert len(list(elsewhere.store.root.rglob(f"{PARTS}/block-*.npy"))) == 2

    computed: list[int] = []
    once = Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, x: computed.append(len(x)) or once(self, x)
    )
    resumed = elsewhere.store.get(elsewhere.descriptors_of("members", CHOICE))
    assert sum(computed) == 64 - 4 * BATCH, "a finished block was computed again"
    np.testing.assert_array_equal(resumed, whole)
    assert not list(elsewhere.store.root.rglob("block-*.npy"))


def test_blocks_are_whole_batches() -> None:
    from membench.similarity.descriptors import BATCH_GPU

    assert BLOCK % BATCH == 0 and BLOCK % BATCH_GPU == 0


def test_float16_moves_scores_little(lab: Lab, found: Registry, weights: Path) -> None:
    """A unit vector's entries are rounded by 2^-11 of themselves: a score by at most 2^-10."""
    lab = replace(lab, registry=found, descriptor_weights=weights)
    full = lab.store.get(lab.descriptors_of("members", CHOICE)).astype(np.float64)
    half = lab.store.get(
        lab.descriptors_of("members", CHOICE.model_copy(update={"storage": "float16"}))
    )
    assert half.dtype == np.float16
    half = half.astype(np.float64)
    moved = np.abs(full @ full.T - half @ half.T).max()
    assert 0 < moved < 2**-10


def test_clusters_of_a_descriptor(lab: Lab, found: Registry, weights: Path) -> None:
    """A card's `cluster_descriptor` may be a descriptor: k-means on its unit vectors."""
    lab = replace(lab, registry=found, descriptor_weights=weights)
    attack = lab.dataset.card.attack.model_copy(update={"cluster_descriptor": CHOICE})
    card = lab.dataset.card.model_copy(update={"attack": attack})
    dataset = replace(lab.dataset, card=card)
    lab = replace(lab, dataset=dataset, target=OracleTarget(dataset, 0.5))
    synthetic = lab.synthetic()
    labels = lab.store.get(lab.clusters(synthetic, n_clusters=10, min_cohesion=0.0))
    rows = lab.store.get(lab.descriptors_of_images(synthetic, CHOICE))
    assert len(rows) == 512
    expected = cluster(rows, 10, seed=derive_seed(lab.seed, "clusters"), min_cohesion=0.0)
    np.testing.assert_array_equal(labels.values, expected.labels)
    assert labels.report["descriptor"] == "small"


def test_old_identities_stand(lab: Lab) -> None:
    """Artifacts named before there were descriptor plugins keep their keys."""
    synthetic = lab.synthetic()
    old = lab.descriptors(synthetic, "pixels_pca")
    assert old.identity == {"name": "pixels_pca", "version": 1}
    clusters = lab.clusters(synthetic, n_clusters=10, min_cohesion=0.5)
    assert [item.key for item in clusters.inputs] == [old.key]
    assert lab.dataset.card.attack.identity()["cluster_descriptor"] == "pixels_pca"


# -- the plugin kind ----------------------------------------------------------------------------


def test_descriptors_are_a_kind(registry: Registry, tmp_path: Path) -> None:
    names = {"pixels", "sscd_disc_mixup", "sscd_onnx", "sscd_onnx_distilled"}
    assert names <= {row["name"] for row in catalogue.rows(registry, "descriptors")}
    assert not names & {row["name"] for row in catalogue.rows(registry, "methods")}
    told = catalogue.describe(registry, "sscd_onnx")
    assert told["kind"] == "descriptor" and told["dimensions"] == 512
    assert told["weights"]["file"] == "sscd.onnx"
    with pytest.raises(MembenchError, match="did you mean 'sscd_onnx'"):
        registry.descriptor("sscd-onx")
    with pytest.raises(MembenchError, match="'side_c' is a method, not a descriptor"):
        registry.descriptor("side_c")
    with pytest.raises(MembenchError, match="'pixels' is a descriptor, not a method"):
        registry.method("pixels")


def test_a_folder_of_both_kinds(tmp_path: Path) -> None:
    write_descriptor("mine", tmp_path)
    (tmp_path / "attack.py").write_text(
        "from membench.plugins import extraction\n"
        "@extraction(title='t', paper='p')\n"
        "def attack(lab):\n    'Does nothing.'\n"
    )
    (tmp_path / "bad.py").write_text("from membench.plugins import descriptor\n@descriptor(\n")
    found = Registry([tmp_path])
    assert isinstance(found.plugin("mine"), Descriptor)
    assert isinstance(found.plugin("attack"), Method)
    by_kind = {
        kind: {row["name"] for row in catalogue.rows(found, kind)}
        for kind in ("methods", "descriptors")
    }
    assert {"mine", "bad"} <= by_kind["descriptors"] and "attack" not in by_kind["descriptors"]
    assert "attack" in by_kind["methods"] and not {"mine", "bad"} & by_kind["methods"]
    broken = [item for item in found.all_descriptors() if isinstance(item, Broken)]
    assert [item.name for item in broken] == ["bad"] and "SyntaxError" in broken[0].reason


def outcome(registry: Registry, name: str, weights: Path | None = None) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    good = check_descriptor(registry, registry.descriptor(name), console, weights)
    return good, console.file.getvalue()  # type: ignore[attr-defined]


def test_descriptors_keep_the_contract(found: Registry, weights: Path, tmp_path: Path) -> None:
    write_descriptor("my_descriptor", tmp_path / "plugins")
    found = Registry([tmp_path / "plugins"])
    for name in ("pixels", "my_descriptor", "small"):
        good, text = outcome(found, name, weights)
        assert good, text
        assert text.count("passed") == len(DESCRIPTOR_CHECKS) < len(CHECKS)
    good, text = outcome(found, "small")
    assert not good and "needs small.torchscript.pt" in text


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("images.mean(axis=(1, 2))[:, :2] + 1", "expected"),
        ("np.random.default_rng().random((len(images), 3))", "they differ"),
        ("images.mean(axis=(1, 2)) - images.mean(axis=(0, 1, 2)) + 1e-3", "it moves by"),
        ("np.ones((len(images), 3))", "two images have one descriptor"),
        ("images.mean(axis=(1, 2)) * np.nan", "of length nan"),
    ],
)
def test_the_contract_catches(tmp_path: Path, body: str, complaint: str) -> None:
    (tmp_path / "bad.py").write_text(
        "import numpy as np\nfrom membench.plugins import descriptor\n"
        "@descriptor(title='Bad', paper='none', dimensions=3)\n"
        f"def bad(setup):\n    'Does.'\n    return lambda images: {body}\n"
    )
    good, text = outcome(Registry([tmp_path]), "bad")
    assert not good and "FAILED" in text and complaint in text, text
