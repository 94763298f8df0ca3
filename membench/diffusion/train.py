"""Training a target: noise prediction (Ho, Jain and Abbeel 2020), resumable to the bit.

Step k draws its batch, timesteps and noise from a generator seeded by (recipe seed, k), so the
state of a run is its networks, its optimiser and k: nothing else has to survive a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from membench.diffusion.sampler import ImageNoise, ddim, ddim_times, from_uint8, to_uint8
from membench.diffusion.targets import conditional_model, draw_conditions
from membench.diffusion.unet import (
    build_unet,
    condition_labels,
    count_parameters,
    schedule_abar,
)
from membench.errors import MembenchError
from membench.files import replace_atomically, write_json
from membench.hashing import content_hash, derive_seed, file_hash
from membench.specs import Images, TargetRecipe, Training

Probe = Callable[[int, np.ndarray], dict[str, float]]
Report = Callable[[int, float], None]

WEIGHTS, LOG, CHECKPOINT = "model.safetensors", "training.json", "checkpoint.pt"


@dataclass
class _State:
    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def tensors(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then linear decay from `learning_rate` to `final_learning_rate`."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate + done * (training.final_learning_rate - training.learning_rate)


def draw_batch(
    images: Tensor, training: Training, train_timesteps: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0 [B, C, H, W], t [B], eps [B, C, H, W] and the rows [B] of x_0 among the images, of one
    step, from (seed, step) alone."""
    generator = torch.Generator().manual_seed(derive_seed(training.seed, "train", step))
    rows = torch.randint(len(images), (training.batch_size,), generator=generator)
    t = torch.randint(train_timesteps, (training.batch_size,), generator=generator)
    x_0 = images[rows]
    return x_0, t, torch.randn(x_0.shape, generator=generator), rows


def _save_checkpoint(path: Path, identity: str, state: _State) -> None:
    saved = state.tensors() | {
        "identity": identity,
        "step": state.step,
        "seconds": state.seconds,
        "loss_sum": state.loss_sum,
        "curve": json.dumps(state.curve),
        "threads": torch.get_num_threads(),
    }
    replace_atomically(path, lambda partial: torch.save(saved, partial))


def _load_checkpoint(path: Path, identity: str, state: _State) -> int:
    """Fill `state` and return the number of threads the run began with."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise MembenchError(
            f"{path}: damaged checkpoint ({type(error).__name__}); delete it to start anew"
        ) from None
    if saved.get("identity") != identity:
        raise MembenchError(f"{path}: of another recipe; delete it or choose another --results")
    state.network.load_state_dict(saved["network"])
    state.average.load_state_dict(saved["average"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step, state.seconds = saved["step"], saved["seconds"]
    state.loss_sum, state.curve = saved["loss_sum"], json.loads(saved["curve"])
    return int(saved.get("threads", torch.get_num_threads()))


def training_identity(recipe: TargetRecipe, images_sha256: str) -> str:
    """What a checkpoint belongs to; `stop_at` is left out, since a longer run may go on from it."""
    described = recipe.model_dump(mode="json", exclude={"title", "weights", "weights_sha256"})
    del described["training"]["stop_at"]
    if recipe.condition == "none":
        del described["condition"]
    return content_hash({"recipe": described, "images": images_sha256})


@torch.inference_mode()
def sample_plain(
    network: nn.Module,
    abar: list[float],
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    batch_size: int = 64,
    steps: int = 50,
    device: torch.device | str = "cpu",
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [count, H, W, C] drawn by DDIM from a network in training.

    labels: those of the members if the network is conditional; each image draws one of them.
    """
    network.eval()
    images = []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        x_t = ImageNoise(seed, indices, shape)().to(device)
        model = conditional_model(network, draw_conditions(labels, seed, indices), device)
        x_0 = ddim(model, x_t, ddim_times(steps, len(abar)), abar)
        images.append(to_uint8(x_0))
    network.train()
    return np.concatenate(images)


def train(
    recipe: TargetRecipe,
    shape: Images,
    members: np.ndarray,
    members_sha256: str,
    folder: Path,
    *,
    labels: np.ndarray | None = None,
    probe: Probe,
    resume: bool = False,
    device: str = "cpu",
    report: Report = lambda step, loss: None,
) -> dict[str, Any]:
    """Train a U-Net on `members` (uint8 [N, H, W, C]) and write it into `folder`.

    Writes `model.safetensors` (the EMA weights), `training.json` (recipe, loss curve, and what
    `probe` says of plain samples every `evaluate_every` steps) and `checkpoint.pt`. `resume` goes
    on from the checkpoint, with as many threads as before, and gives the same weights, bit for bit
    on one kind of machine, as a run that was never interrupted; without it a folder that holds a
    checkpoint is refused. labels: int [N] of the members, for a conditional recipe.
    Returns the content of `training.json`.
    """
    training = recipe.training
    folder.mkdir(parents=True, exist_ok=True)
    identity = training_identity(recipe, members_sha256)
    checkpoint = folder / CHECKPOINT

    torch.manual_seed(derive_seed(training.seed, "init"))
    network = build_unet(recipe, shape).to(device, memory_format=torch.channels_last)
    network.train()
    state = _State(
        network=network,
        average=AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema)),
        optimizer=torch.optim.AdamW(
            network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        ),
    )
    if checkpoint.exists():
        if not resume:
            raise MembenchError(f"{checkpoint}: a training is under way here; go on with --resume")
        torch.set_num_threads(_load_checkpoint(checkpoint, identity, state))
        if state.step > training.last_step:
            raise MembenchError(
                f"{checkpoint}: is at step {state.step}, past the recipe's {training.last_step}"
            )
    abar = schedule_abar(recipe)
    abar_tensor = torch.tensor(abar)
    pixels = from_uint8(members)
    labels = condition_labels(recipe, shape, labels)
    curve = state.curve

    def evaluate() -> None:
        samples = sample_plain(
            state.average.module,
            abar,
            shape.shape,
            training.evaluate_images,
            derive_seed(training.seed, "evaluate"),
            device=device,
            labels=labels,
        )
        since = curve[-1]["step"] if curve else 0
        loss = state.loss_sum / (state.step - since)
        curve.append({"step": state.step, "loss": loss} | probe(state.step, samples))
        state.loss_sum = 0.0
        _write_log(folder, recipe, members_sha256, state, finished=False)

    while state.step < training.last_step:
        started = time.monotonic()
        x_0, t, eps, rows = draw_batch(pixels, training, recipe.train_timesteps, state.step)
        signal = abar_tensor[t].sqrt().float().view(-1, 1, 1, 1)
        spread = (1 - abar_tensor[t]).sqrt().float().view(-1, 1, 1, 1)
        x_t = (signal * x_0 + spread * eps).to(device, memory_format=torch.channels_last)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(training, state.step)
        known = {}
        if labels is not None:
            known = {"class_labels": torch.from_numpy(labels[rows.numpy()]).to(device)}
        predicted = network(x_t, t.to(device), **known).sample
        loss = nn.functional.mse_loss(predicted, eps.to(device))
        state.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clip)
        state.optimizer.step()
        state.average.update_parameters(network)
        value = loss.item()
        if not np.isfinite(value):
            raise MembenchError(
                f"{folder}: loss is {value} at step {state.step}; lower the learning rate"
            )
        state.step += 1
        state.loss_sum += value
        state.seconds += time.monotonic() - started
        report(state.step, value)

        if state.step % training.evaluate_every == 0:
            evaluate()
        if state.step % training.checkpoint_every == 0 or state.step == training.last_step:
            _save_checkpoint(checkpoint, identity, state)

    if not curve or curve[-1]["step"] < state.step:
        evaluate()
        _save_checkpoint(checkpoint, identity, state)
    weights = {
        name: value.contiguous() for name, value in state.average.module.state_dict().items()
    }
    replace_atomically(folder / WEIGHTS, lambda partial: save_file(weights, partial))
    return _write_log(folder, recipe, members_sha256, state, finished=True)


def _write_log(
    folder: Path, recipe: TargetRecipe, members_sha256: str, state: _State, finished: bool
) -> dict[str, Any]:
    log = {
        "recipe": recipe.model_dump(mode="json", exclude={"weights", "weights_sha256"}),
        "members_images_sha256": members_sha256,
        "parameters": count_parameters(state.network),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "finished": finished,
        "seconds": round(state.seconds, 1),
        "curve": state.curve,
    }
    if finished:
        log["weights_sha256"] = file_hash(folder / WEIGHTS)
    write_json(folder / LOG, log)
    return log
