"""Training the attacker's classifiers: time-dependent knowledge distillation (spec section 2).

One loop trains both kinds: a label classifier on clean images, and a time-dependent one on
forward-noised images. Step k draws everything it needs from a generator seeded by (seed, k), so
that a killed run goes on from its checkpoint to the same weights, bit for bit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from membench.diffusion.classifier import ResNet, freeze
from membench.diffusion.sampler import from_uint8
from membench.diffusion.targets import load_strictly, read_safetensors
from membench.diffusion.threads import torch_threads
from membench.errors import MembenchError
from membench.files import replace_atomically
from membench.hashing import array_hash, content_hash, derive_seed
from membench.specs import ClassifierTraining, Network

Progress = Callable[[int, float], None]
HELD_BACK_DRAWS = 4  # (t, noise) per held-back image in the loss that picks the best weights
EVALUATION_BATCH = 256


def distillation_loss(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Mean KL( p(y | x_0) || p_phi(y | x_t) ); of a one-hot p it is -log p_phi (hard labels).

    logits, probabilities: [B, K].
    """
    log_p = torch.log_softmax(logits, dim=1)
    return nn.functional.kl_div(log_p, probabilities, reduction="batchmean")


def accuracy_timesteps(train_timesteps: int) -> list[int]:
    """Where the accuracy by noise level is reported: 10, 100, 200, .., 900 of 1000."""
    return [train_timesteps // 100] + [train_timesteps * k // 10 for k in range(1, 10)]


@dataclass(frozen=True)
class _Task:
    """What is learnt: images uint8 [N, H, W, C], hard [N] or soft [N, K] targets, abar if timed."""

    images: np.ndarray
    targets: np.ndarray
    n_classes: int
    abar: list[float] | None
    seed: int
    device: torch.device

    def probabilities(self, rows: np.ndarray) -> Tensor:
        """float32 [B, K]; one-hot for hard targets."""
        chosen = torch.from_numpy(np.array(self.targets[rows]))
        if chosen.ndim == 1:
            chosen = nn.functional.one_hot(chosen.long(), self.n_classes)
        return chosen.float().to(self.device)

    def generator(self, *purpose: Any) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    def inputs(
        self, rows: np.ndarray, t: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """x_t [B, C, H, W] and t [B]; the clean images and None without a timestep."""
        x = from_uint8(self.images[rows])
        if t is None or self.abar is None:
            return x.to(self.device), None
        abar_t = torch.tensor(self.abar, dtype=torch.float64)[t].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=generator)
        x_t = abar_t.sqrt().float() * x + (1 - abar_t).sqrt().float() * noise
        return x_t.to(self.device), t.to(self.device)

    def split(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and rows held back, chosen by the seed."""
        count = len(self.images)
        order = torch.randperm(count, generator=self.generator("held back")).numpy()
        held = min(max(1, round(share * count)), count - 1)
        return np.sort(order[held:]), np.sort(order[:held])

    def training_batch(self, rows: np.ndarray, size: int, step: int) -> tuple[Any, ...]:
        """x, t, probabilities of one step, from (seed, step) alone; t is uniform."""
        generator = self.generator("classifier", step)
        chosen = rows[torch.randint(len(rows), (size,), generator=generator).numpy()]
        t = None
        if self.abar is not None:
            t = torch.randint(len(self.abar), (size,), generator=generator)
        return *self.inputs(chosen, t, generator), self.probabilities(chosen)

    def held_back_batches(self, rows: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """The fixed set of held-back (image, t, noise): t is spread evenly over 0 .. T - 1."""
        generator = self.generator("evaluate")
        t = None
        if self.abar is not None:
            rows = np.tile(rows, HELD_BACK_DRAWS)
            even = torch.randperm(len(rows), generator=generator)
            t = ((even + 0.5) / len(rows) * len(self.abar)).long()
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            x, times = self.inputs(rows[part], None if t is None else t[part], generator)
            yield x, times, self.probabilities(rows[part])

    def accuracy(self, classifier: ResNet, rows: np.ndarray, t: int | None) -> float:
        """Share of `rows` whose most probable class is the target's, at timestep t."""
        generator, correct = self.generator("accuracy", t), 0
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = rows[start : start + EVALUATION_BATCH]
            times = None if t is None else torch.full((len(part),), t)
            x, times = self.inputs(part, times, generator)
            guess = classifier(x, times).argmax(1)
            correct += int((guess == self.probabilities(part).argmax(1)).sum())
        return correct / len(rows)


@dataclass
class _State:
    """Everything that a run needs to go on."""

    classifier: ResNet
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    step: int = 0
    loss_sum: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, identity: str) -> None:
        saved = {
            "identity": identity,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
            "curve": json.dumps(self.curve),
        }
        replace_atomically(path, lambda partial: torch.save(saved, partial))

    def load(self, path: Path, identity: str) -> None:
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            owner = saved["identity"]
        except Exception as error:
            raise MembenchError(
                f"{path}: damaged checkpoint ({type(error).__name__}); delete it to start anew"
            ) from None
        if owner != identity:
            raise MembenchError(f"{path}: of another training; delete it to start anew")
        self.classifier.load_state_dict(saved["classifier"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        self.step, self.curve = saved["step"], json.loads(saved["curve"])


@torch.no_grad()
def _held_back_loss(classifier: ResNet, task: _Task, rows: np.ndarray) -> float:
    classifier.eval()
    total = images = 0.0
    for x, t, probabilities in task.held_back_batches(rows):
        total += distillation_loss(classifier(x, t), probabilities).item() * len(x)
        images += len(x)
    classifier.train()
    return total / images


def _has_given_up(curve: list[dict[str, float]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations have not bettered the held-back loss."""
    if patience is None or len(curve) <= patience:
        return False
    losses = [point["held_back_loss"] for point in curve]
    return min(losses[-patience:]) >= min(losses[:-patience])


@torch_threads(1)
def _fit(
    task: _Task,
    network: Network,
    training: ClassifierTraining,
    checkpoint: Path | None,
    progress: Progress,
) -> tuple[ResNet, dict[str, Any]]:
    """AdamW with warm-up; keeps the weights of the lowest held-back loss, may stop early.

    On one CPU thread: an attack's classifier must not depend on the machine's number of cores.
    """
    if len(task.images) < 2 or len(task.images) != len(task.targets):
        raise ValueError(f"{len(task.images)} images with {len(task.targets)} targets")
    rows, held_back = task.split(training.held_back)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(task.seed, "init"))
        classifier = ResNet(network, task.images.shape[3], task.n_classes, task.abar is not None)
    classifier.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    state = _State(classifier.train(), optimizer, best={})
    identity = content_hash(
        {
            "images": array_hash(task.images),
            "targets": array_hash(task.targets),
            "n_classes": task.n_classes,
            "abar": task.abar,
            "network": network.identity(),
            "training": training.identity(),
            "seed": task.seed,
        }
    )
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, identity)

    while state.step < training.steps and not _has_given_up(state.curve, training.patience):
        warm = min(1.0, (state.step + 1) / max(1, training.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * warm
        x, t, probabilities = task.training_batch(rows, training.batch_size, state.step)
        loss = distillation_loss(classifier(x, t), probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise MembenchError(
                f"classifier: loss is {value} at step {state.step}; lower its learning_rate"
            )
        state.step += 1
        state.loss_sum += value
        progress(state.step, value)

        if state.step % training.evaluate_every == 0 or state.step == training.steps:
            since = state.curve[-1]["step"] if state.curve else 0
            held_back_loss = _held_back_loss(classifier, task, held_back)
            if all(held_back_loss < point["held_back_loss"] for point in state.curve):
                state.best = copy.deepcopy(classifier.state_dict())
            state.curve.append(
                {
                    "step": state.step,
                    "loss": state.loss_sum / (state.step - since),
                    "held_back_loss": held_back_loss,
                }
            )
            state.loss_sum = 0.0
            if checkpoint is not None:
                state.save(checkpoint, identity)

    classifier.load_state_dict(state.best)
    freeze(classifier)
    best = min(state.curve, key=lambda point: point["held_back_loss"])
    classes = np.concatenate(
        [
            task.probabilities(held_back[start : start + EVALUATION_BATCH]).argmax(1).cpu().numpy()
            for start in range(0, len(held_back), EVALUATION_BATCH)
        ]
    )
    return classifier, {
        "images": len(rows),
        "held_back_images": len(held_back),
        "n_classes": task.n_classes,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "targets": "hard" if task.targets.ndim == 1 else "soft",
        "steps": state.step,
        "best_step": int(best["step"]),
        "held_back_loss": best["held_back_loss"],
        "curve": state.curve,
        "chance": 1 / task.n_classes,
        "majority_share": float(np.bincount(classes).max() / len(classes)),
    }


def train_label_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    network: Network,
    training: ClassifierTraining,
    seed: int,
    *,
    checkpoint: Path | None = None,
    progress: Progress = lambda step, loss: None,
    device: torch.device | str = "cpu",
) -> tuple[ResNet, dict[str, Any]]:
    """A time-independent classifier of clean images (`ol_ti`; step 3 of TDKD).

    images: uint8 [N, H, W, C]; labels: integers [N] below `n_classes`. With `checkpoint` a killed
    run goes on from that file, written every `evaluate_every` steps. Returns the frozen classifier
    of the best held-back loss, and a JSON-able report with its `accuracy` on held-back images.
    Raises `MembenchError` for a damaged or foreign checkpoint and for a loss that is not finite.
    """
    task = _Task(images, np.asarray(labels), n_classes, None, seed, torch.device(device))
    classifier, report = _fit(task, network, training, checkpoint, progress)
    _, held_back = task.split(training.held_back)
    with torch.no_grad():
        return classifier, report | {"accuracy": task.accuracy(classifier, held_back, None)}


def train_time_classifier(
    images: np.ndarray,
    targets: np.ndarray,
    n_classes: int,
    abar: list[float],
    network: Network,
    training: ClassifierTraining,
    seed: int,
    *,
    checkpoint: Path | None = None,
    progress: Progress = lambda step, loss: None,
    device: torch.device | str = "cpu",
) -> tuple[ResNet, dict[str, Any]]:
    """The time-dependent classifier p_phi^t(y | x_t) (step 4 of TDKD), t uniform over 0 .. T - 1.

    images: uint8 [N, H, W, C], synthetic; targets: labels [N] (hard: -log p) or probabilities
    [N, K] (soft: KL); abar: [T]. Otherwise as `train_label_classifier`; the report holds
    `accuracy_by_timestep` on held-back images against the label or the most probable class.
    """
    task = _Task(images, np.asarray(targets), n_classes, abar, seed, torch.device(device))
    classifier, report = _fit(task, network, training, checkpoint, progress)
    _, held_back = task.split(training.held_back)
    with torch.no_grad():
        accuracy = {
            str(t): task.accuracy(classifier, held_back, t) for t in accuracy_timesteps(len(abar))
        }
    return classifier, report | {"accuracy_by_timestep": accuracy}


@torch.no_grad()
def pseudo_label(classifier: ResNet, images: np.ndarray) -> np.ndarray:
    """p(y | x_0) of a label classifier: uint8 [N, H, W, C] -> float32 [N, K]."""
    device = next(classifier.parameters()).device
    batches = [
        classifier(from_uint8(images[start : start + EVALUATION_BATCH]).to(device)).softmax(1).cpu()
        for start in range(0, len(images), EVALUATION_BATCH)
    ]
    return torch.cat(batches).numpy()


def save_classifier(path: Path, classifier: ResNet, meta: dict[str, Any]) -> None:
    """Write weights and description as safetensors; `meta` is anything JSON-able."""
    description = {
        "network": classifier.network.identity(),
        "channels": classifier.channels,
        "n_classes": classifier.n_classes,
        "timed": classifier.timed,
        "meta": meta,
    }
    tensors = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    metadata = {"classifier": json.dumps(description)}
    replace_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def load_classifier(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[ResNet, dict[str, Any]]:
    """The frozen classifier and its meta; `MembenchError` naming the file when it is damaged."""
    tensors, metadata = read_safetensors(path)
    try:
        description = json.loads(metadata["classifier"])
        with torch.device("meta"):
            classifier = ResNet(
                Network.model_validate(description["network"]),
                description["channels"],
                description["n_classes"],
                description["timed"],
            )
        meta = description["meta"]
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise MembenchError(
            f"{path}: not a classifier of membench ({type(error).__name__})"
        ) from None
    load_strictly(classifier, tensors, path)
    classifier.to(torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return freeze(classifier), meta
