"""The attacker's classifiers: architecture, losses, resume, files; and guidance by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from membench.data.imageset import ImageSet, load_dataset
from membench.diffusion.classifier import ResNet, freeze
from membench.diffusion.guidance import GuidanceLog, classifier_guidance
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times, from_uint8
from membench.diffusion.targets import ClosedFormTarget
from membench.diffusion.tdkd import (
    distillation_loss,
    load_classifier,
    pseudo_label,
    save_classifier,
    train_label_classifier,
    train_time_classifier,
)
from membench.diffusion.threads import torch_threads
from membench.diffusion.unet import schedule_abar
from membench.errors import MembenchError
from membench.hashing import array_hash
from membench.specs import ClassifierTraining, Network, load_card

DATASETS = Path(__file__).parents[1] / "datasets"
CARD = load_card(DATASETS / "fashion_mini.toml")
ABAR = schedule_abar(CARD.targets["ddpm"])
SMALL = Network(blocks=(1, 1), width=8, stem="small")
TRAINING = ClassifierTraining(steps=30, batch_size=32, learning_rate=3e-3, evaluate_every=10)


@pytest.fixture(scope="module")
def members() -> ImageSet:
    return load_dataset(CARD, DATASETS / "fashion_mini").members


def weights_hash(classifier: ResNet) -> list[str]:
    return [array_hash(np.atleast_1d(v.numpy())) for v in classifier.state_dict().values()]


# --- architecture


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_default_network_is_resnet_34() -> None:
    """21,797,672 parameters: torchvision's ResNet-34 for 1,000 classes."""
    assert parameters(ResNet(Network(), 3, 1000, timed=False)) == 21_797_672


def test_default_network_has_the_strides_of_resnet_34() -> None:
    with torch.no_grad():
        network = ResNet(Network(), 3, 10, timed=False).eval()
        h = network.pool(network.bn1(network.conv1(torch.zeros(1, 3, 64, 64))))
        assert h.shape == (1, 64, 16, 16)
        assert network.blocks(h).shape == (1, 512, 2, 2)
        assert network.features(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize("kind", ["film", "shift"])
def test_time_acts_once_right_after_the_first_normalisation(kind: Any) -> None:
    torch.manual_seed(0)
    network = SMALL.model_copy(update={"time_module": kind})
    timed = ResNet(network, 1, 10, timed=True).eval()
    plain = ResNet(network, 1, 10, timed=False).eval()
    plain.load_state_dict({k: v for k, v in timed.state_dict().items() if "time." not in k})
    x, t = torch.randn(4, 1, 16, 16), torch.tensor([0, 10, 500, 999])
    assert torch.equal(timed(x, t), plain(x)), "the time module must start as the identity"

    assert timed.time is not None
    last = timed.time.mlp[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.normal_(last.weight, std=0.1)
    calls: list[tuple[Tensor, Tensor]] = []
    normalised: list[Tensor] = []
    timed.bn1.register_forward_hook(lambda m, i, out: normalised.append(out))
    timed.time.register_forward_hook(lambda m, inputs, out: calls.append((inputs[0], out)))
    logits = timed(x, t)
    assert len(calls) == 1 and torch.equal(calls[0][0], normalised[0])
    assert not torch.equal(logits, plain(x))
    same_image = timed(x[:1].expand(4, -1, -1, -1), t)
    assert not torch.allclose(same_image[0], same_image[3])
    before, after = (h.flatten(2).mean(2) for h in calls[0])
    assert last.out_features == (16 if kind == "film" else 8)
    if kind == "shift":
        spread = (calls[0][1] - calls[0][0]).flatten(2).std(2)
        torch.testing.assert_close(spread, torch.zeros(4, 8), atol=1e-5, rtol=0)
    assert not torch.allclose(before, after)


def test_a_timestep_is_demanded_or_refused() -> None:
    x = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ValueError, match="timed"):
        ResNet(SMALL, 1, 10, timed=True)(x)
    with pytest.raises(ValueError, match="timed"):
        ResNet(SMALL, 1, 10, timed=False)(x, torch.zeros(1))


# --- losses and training


def test_losses_follow_the_formulas() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 5))
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p = rng.dirichlet(np.ones(5), 6)
    soft = (p * (np.log(p) - log_q)).sum(1).mean()
    assert distillation_loss(torch.tensor(logits), torch.tensor(p)).item() == pytest.approx(soft)
    labels = rng.integers(0, 5, 6)
    hard = -log_q[np.arange(6), labels].mean()
    one_hot = torch.tensor(np.eye(5)[labels])
    assert distillation_loss(torch.tensor(logits), one_hot).item() == pytest.approx(hard)


class Killed(Exception):
    pass


@pytest.mark.parametrize("timed", [False, True])
def test_a_killed_training_goes_on_to_the_same_weights(
    members: ImageSet, tmp_path: Path, timed: bool
) -> None:
    def train(checkpoint: Path | None, stop_after: int = 99) -> tuple[ResNet, dict[str, Any]]:
        def progress(step: int, loss: float) -> None:
            if step > stop_after:
                raise Killed

        kwargs: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress}
        images, labels = members.images[:128], members.labels[:128]
        if timed:
            return train_time_classifier(images, labels, 10, ABAR, SMALL, TRAINING, 1, **kwargs)
        return train_label_classifier(images, labels, 10, SMALL, TRAINING, 1, **kwargs)

    state = torch.random.get_rng_state()
    whole, report = train(None)
    assert torch.equal(torch.random.get_rng_state(), state)
    checkpoint = tmp_path / "checkpoint.pt"
    for stop_after in (5, 17, 25):
        with pytest.raises(Killed):
            train(checkpoint, stop_after)
    resumed, resumed_report = train(checkpoint)
    assert weights_hash(resumed) == weights_hash(whole)
    assert resumed_report == report
    again, _ = train(checkpoint)
    assert weights_hash(again) == weights_hash(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_foreign_and_damaged_checkpoints_are_refused(members: ImageSet, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    images, labels = members.images[:64], members.labels[:64]
    brief = TRAINING.model_copy(update={"steps": 2})
    train_label_classifier(images, labels, 10, SMALL, brief, 0, checkpoint=checkpoint)
    with pytest.raises(MembenchError, match="another training"):
        train_label_classifier(images, labels, 10, SMALL, brief, 1, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(MembenchError, match="damaged"):
        train_label_classifier(images, labels, 10, SMALL, brief, 0, checkpoint=checkpoint)


def test_distillation_learns_and_reports(members: ImageSet, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"steps": 150, "evaluate_every": 25, "held_back": 0.25})
    images = members.images
    teacher, report = train_label_classifier(images, members.labels, 10, SMALL, training, 0)
    assert report["accuracy"] > 0.5 > report["majority_share"] > 0
    assert report["images"] + report["held_back_images"] == len(images)
    curve = {point["step"]: point["held_back_loss"] for point in report["curve"]}
    assert list(curve) == [25, 50, 75, 100, 125, 150]
    assert curve[report["best_step"]] == min(curve.values()) == report["held_back_loss"]

    soft = pseudo_label(teacher, images)
    assert soft.shape == (512, 10)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-5)

    student, report = train_time_classifier(images, soft, 10, ABAR, SMALL, training, 0)
    accuracy = report["accuracy_by_timestep"]
    assert list(accuracy) == ["10", *(str(100 * k) for k in range(1, 10))]
    assert accuracy["10"] > 0.5 > accuracy["900"]
    assert report["targets"] == "soft" and student.timed and not student.training
    assert not any(p.requires_grad for p in student.parameters())
    json.dumps(report)

    save_classifier(tmp_path / "student.safetensors", student, report)
    loaded, _ = load_classifier(tmp_path / "student.safetensors")
    x, t = from_uint8(images[:8]), torch.arange(8)
    assert torch.equal(loaded(x, t), student(x, t)), "a file must not change a bit of a run"


def test_training_stops_when_the_loss_has_not_bettered(members: ImageSet) -> None:
    """After `patience` evaluations, with the weights that a longer training would keep of these."""
    training = TRAINING.model_copy(update={"steps": 400, "learning_rate": 0.1, "patience": 2})
    labels = np.random.default_rng(0).integers(3, size=64)  # nothing to learn
    arguments = (members.images[:64], labels, 3, SMALL)
    classifier, report = train_label_classifier(*arguments, training, 0)
    losses = [point["held_back_loss"] for point in report["curve"]]
    assert report["steps"] == 10 * len(losses) < 400
    assert min(losses[-2:]) >= min(losses[:-2])
    for count in range(3, len(losses)):
        assert min(losses[count - 2 : count]) < min(losses[: count - 2]), "too late"
    full = training.model_copy(update={"steps": report["steps"], "patience": None})
    other, same = train_label_classifier(*arguments, full, 0)
    assert same == report
    for a, b in zip(classifier.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_patience_is_part_of_an_identity_only_where_it_is_given() -> None:
    assert "patience" not in TRAINING.identity()
    assert TRAINING.model_copy(update={"patience": 3}).identity()["patience"] == 3


def test_classifier_files_round_trip_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    classifier = freeze(ResNet(SMALL, 1, 7, timed=True).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    save_classifier(path, classifier, {"accuracy": 0.5})
    loaded, meta = load_classifier(path)
    assert meta == {"accuracy": 0.5}
    assert weights_hash(loaded) == weights_hash(classifier)
    assert (loaded.network, loaded.n_classes, loaded.timed) == (SMALL, 7, True)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    assert torch.equal(loaded(x, t), classifier(x, t))

    content = path.read_bytes()
    for damaged, message in (
        (content[:-10], "truncated"),
        (content.replace(b'\\"network\\"', b'\\"netw0rk\\"'), "not a classifier"),
        (b"", "truncated"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(MembenchError, match=message):
            load_classifier(path)


# --- guidance


@pytest.mark.parametrize("at", ["x_t", "x_0"])
def test_guidance_equals_finite_differences(at: Any) -> None:
    torch.manual_seed(0)
    classifier = freeze(ResNet(SMALL, 1, 5, timed=False).double())
    t, scale = 300, 2.5
    x_t, eps = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3])

    def log_p(x: Tensor) -> Tensor:
        if at == "x_0":
            x = (x - (1 - ABAR[t]) ** 0.5 * eps) / ABAR[t] ** 0.5
        return classifier(x).log_softmax(1)[range(3), labels]

    with torch.inference_mode():
        guide = classifier_guidance(classifier, labels, scale, ABAR, at=at, timed=False)
        term = eps - guide(x_t, t, eps)
    for direction in torch.randn(4, 1, 8, 8, dtype=torch.float64):
        h = 1e-6 * direction
        slope = (log_p(x_t + h) - log_p(x_t - h)) / 2e-6
        expected = scale * (1 - ABAR[t]) ** 0.5 * slope
        torch.testing.assert_close(
            (term * direction).sum((1, 2, 3)), expected, rtol=1e-4, atol=1e-7
        )


def test_guidance_sees_each_image_alone_and_is_logged() -> None:
    torch.manual_seed(0)
    classifier = freeze(ResNet(SMALL, 1, 5, timed=True))
    x_t, eps = torch.randn(2, 4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 3])
    whole, parts = GuidanceLog(), GuidanceLog()

    def guided(rows: slice, log: GuidanceLog) -> Tensor:
        guide = classifier_guidance(classifier, labels[rows], 1.0, ABAR, timed=True, log=log)
        return guide(x_t[rows], 400, eps[rows])

    together = guided(slice(None), whole)
    apart = torch.cat([guided(slice(0, 1), parts), guided(slice(1, 4), parts)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    entry = whole.to_dict()["400"]
    ratio = (eps - together).flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)
    assert entry["mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert entry["images"] == parts.to_dict()["400"]["images"] == 4
    assert parts.to_dict()["400"]["mean"] == pytest.approx(entry["mean"])
    saved = json.loads(json.dumps(whole.to_dict()))
    twice = GuidanceLog.from_dict(saved).merge(whole).to_dict()["400"]
    assert (twice["mean"], twice["images"]) == (entry["mean"], 8)


def test_guidance_raises_the_share_of_its_class(members: ImageSet) -> None:
    """The exact p(c | x_t) of a closed-form target, at scale 1, makes the exact conditional score.

    So every image copies a member of its class; without guidance a tenth would.
    """
    count, times = 48, ddim_times(20, 1000)
    target = ClosedFormTarget(members.images, ABAR)
    x_i = from_uint8(members.images).double().flatten(1)
    of_class = torch.from_numpy(members.labels == np.arange(10)[:, None])

    def classifier(x_t: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        abar_t = ABAR[int(t[0])]
        away = torch.cdist(x_t.double().flatten(1), abar_t**0.5 * x_i).square()
        log_w = -away / (2 * (1 - abar_t))
        return torch.stack([log_w[:, chosen].logsumexp(1) for chosen in of_class], dim=1)

    def share(scale: float) -> float:
        labels = torch.arange(count) % 10
        guidance = classifier_guidance(classifier, labels, scale, ABAR, timed=True)
        x_t = ImageNoise(0, range(count), target.shape)()
        x_0 = ddim(target.predict_eps, x_t, times, ABAR, guidance=guidance)
        nearest = torch.cdist(x_0.double().flatten(1), x_i).argmin(1)
        return float((members.labels[nearest] == labels.numpy()).mean())

    assert share(0) < 0.3
    assert share(1) > 0.9


def test_the_number_of_threads_does_not_change_a_classifier(members: ImageSet) -> None:
    training = TRAINING.model_copy(update={"steps": 6, "evaluate_every": 6})
    found = set()
    for count in (1, 2):
        with torch_threads(count):
            classifier, _ = train_time_classifier(
                members.images, members.labels, 10, ABAR, CARD.attack.network, training, 1
            )
            assert torch.get_num_threads() == count
        found.add(tuple(weights_hash(classifier)))
    assert len(found) == 1
