"""Training a target: noise prediction (Ho, Jain and Abbeel 2020), resumable to the bit.

Step k draws its batch, timesteps and noise from a generator seeded by (recipe seed, k), so the
state of a run is its networks, its optimiser and k: nothing else has to survive a kill. The batch
is that of the whole step however many processes share it: each takes its slice, gradients are
averaged, and runs on one GPU and on eight differ by rounding alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from membench.data.imageset import ImageSet
from membench.diffusion.sampler import ImageNoise, ddim, ddim_times, from_uint8, to_uint8
from membench.diffusion.targets import conditional_model, draw_conditions
from membench.diffusion.unet import (
    build_unet,
    condition_labels,
    count_parameters,
    schedule_abar,
)
from membench.errors import MembenchError
from membench.files import read_json, replace_atomically, write_json
from membench.hashing import content_hash, derive_seed, file_hash
from membench.specs import Images, TargetRecipe, Training

if TYPE_CHECKING:
    from accelerate import Accelerator

Probe = Callable[[int, np.ndarray], dict[str, float]]
Report = Callable[[int, float], None]

WEIGHTS, LOG, CHECKPOINT, SNAPSHOTS = (
    "model.safetensors", "training.json", "checkpoint.pt", "snapshots",
)  # fmt: skip
_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass
class _State:
    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    processes: int = 1
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def tensors(self) -> dict[str, Any]:
        found = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return found if self.scaler is None else found | {"scaler": self.scaler.state_dict()}


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then linear decay from `learning_rate` to `final_learning_rate`."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate + done * (training.final_learning_rate - training.learning_rate)


def draw_step(
    count: int, shape: tuple[int, int, int], training: Training, train_timesteps: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What step `step` trains on, from (seed, step) alone: rows [B] of the `count` members, their
    timesteps t [B] and eps [B, C, H, W]; shape: (C, H, W)."""
    generator = torch.Generator().manual_seed(derive_seed(training.seed, "train", step))
    rows = torch.randint(count, (training.batch_size,), generator=generator)
    t = torch.randint(train_timesteps, (training.batch_size,), generator=generator)
    return rows, t, torch.randn((training.batch_size, *shape), generator=generator)


@dataclass(frozen=True)
class _Batch:
    """One process's share of a step: x_t and eps [b, C, H, W], t [b], what a conditional U-Net is
    told [b]."""

    x_t: Tensor
    t: Tensor
    eps: Tensor
    labels: Tensor | None

    def to(self, device: torch.device) -> _Batch:
        x_t, t, eps = (
            tensor.to(device, non_blocking=True) for tensor in (self.x_t, self.t, self.eps)
        )
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return _Batch(x_t.contiguous(memory_format=torch.channels_last), t, eps, labels)

    def pinned(self) -> _Batch:
        labels = None if self.labels is None else self.labels.pin_memory()
        return _Batch(self.x_t.pin_memory(), self.t.pin_memory(), self.eps.pin_memory(), labels)


def _noised(images: np.ndarray, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_t [B, C, H, W] of uint8 images [B, H, W, C]; abar: float64 [T]."""
    signal = abar[t].sqrt().float().view(-1, 1, 1, 1)
    spread = (1 - abar[t]).sqrt().float().view(-1, 1, 1, 1)
    return signal * from_uint8(images) + spread * eps


def _batches(make: Callable[[int], _Batch], first: int, device: torch.device) -> Iterator[_Batch]:
    """The batches of steps `first`, `first` + 1, ... on the device; for a GPU the next one is
    drawn while the last one is trained on."""
    if device.type == "cpu":
        while True:
            yield make(first).to(device)
            first += 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda step: make(step).pinned(), first)
        while True:
            ready = waiting.result()
            first += 1
            waiting = pool.submit(lambda step: make(step).pinned(), first)
            yield ready.to(device)


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
    if state.scaler is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.seconds = saved["step"], saved["seconds"]
    state.loss_sum, state.curve = saved["loss_sum"], json.loads(saved["curve"])
    return int(saved.get("threads", torch.get_num_threads()))


def training_identity(recipe: TargetRecipe, images_sha256: str) -> str:
    """What a checkpoint belongs to. `stop_at` is left out, since a longer run may go on from it,
    and so are `snapshots`, which change no weight."""
    described = recipe.model_dump(mode="json", exclude={"title", "weights", "weights_sha256"})
    training = described["training"]
    del training["stop_at"], training["snapshots"]
    if recipe.training.precision == "float32":
        del training["precision"]
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


@torch.inference_mode()
def noise_loss(
    network: nn.Module,
    abar: Tensor,
    images: np.ndarray,
    labels: np.ndarray | None,
    seed: int,
    device: torch.device | str,
    batch_size: int = 64,
) -> float:
    """Mean squared error of eps over uint8 images [N, H, W, C], each at one timestep.

    Timesteps are spread evenly over the schedule and noise follows from the seed, so that members
    and held-out images of one number are asked the same. labels: int64 [N] or None.
    """
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    t = ((torch.arange(len(images)) + 0.5) * len(abar) / len(images)).long()
    t = t[torch.randperm(len(t), generator=generator)]
    total = 0.0
    for start in range(0, len(images), batch_size):
        part = slice(start, min(start + batch_size, len(images)))
        pixels = images[part]
        count, height, width, channels = pixels.shape
        eps = torch.randn((count, channels, height, width), generator=generator)
        x_t = _noised(pixels, t[part], eps, abar).to(device, memory_format=torch.channels_last)
        told = None if labels is None else labels[part]
        predicted = conditional_model(network, told, device)(x_t, t[part].to(device))
        total += nn.functional.mse_loss(predicted.float().cpu(), eps).item() * count
    network.train()
    return total / len(images)


def _accelerator(device: str, training: Training) -> Accelerator:
    """This process among those that `accelerate launch` started, or alone."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=_PRECISION[training.precision],
        # the others wait while the first one draws samples
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if training.batch_size % accelerator.num_processes:
        raise MembenchError(
            f"training.batch_size: {training.batch_size} images cannot be shared evenly by "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def train(
    recipe: TargetRecipe,
    shape: Images,
    members: ImageSet,
    heldout: ImageSet,
    members_sha256: str,
    folder: Path,
    *,
    probe: Probe,
    resume: bool = False,
    device: str = "cpu",
    report: Report = lambda step, loss: None,
) -> dict[str, Any]:
    """Train a U-Net on `members` and write it into `folder`.

    Writes `model.safetensors` (the EMA weights), `training.json` (recipe, and every
    `evaluate_every` steps the training loss, the noise loss on members and on `heldout`, and what
    `probe` says of plain samples), `checkpoint.pt`, and `snapshots/step-N.safetensors` for the
    recipe's `snapshots`. `resume` goes on from the checkpoint, with as many threads as before, and
    gives the same weights, bit for bit on one kind of machine, as a run that was never interrupted;
    without it a folder that holds a checkpoint is refused. Images may be memory-mapped: a step
    reads its batch. What `report`, called after each step, raises ends the training; unless it is
    an `Exception`, an error, with a checkpoint of that step. Under `accelerate launch` every
    process takes its slice of each batch; the first one writes. Returns the content of
    `training.json`.
    """
    training = recipe.training
    accelerator = _accelerator(device, training)
    place = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
    first = accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    identity = training_identity(recipe, members_sha256)
    checkpoint = folder / CHECKPOINT

    torch.manual_seed(derive_seed(training.seed, "init"))
    network = build_unet(recipe, shape).to(place, memory_format=torch.channels_last)
    network.train()
    state = _State(
        network=network,
        average=AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema)),
        optimizer=torch.optim.AdamW(
            network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        ),
        scaler=accelerator.scaler,
        processes=accelerator.num_processes,
    )
    if checkpoint.exists():
        if not resume:
            raise MembenchError(f"{checkpoint}: a training is under way here; go on with --resume")
        torch.set_num_threads(_load_checkpoint(checkpoint, identity, state))
        if state.step > training.last_step:
            raise MembenchError(
                f"{checkpoint}: is at step {state.step}, past the recipe's {training.last_step}"
            )
    for step in training.snapshots:
        if step <= state.step and not snapshot(folder, step).is_file():
            raise MembenchError(
                f"{checkpoint}: is at step {state.step}, past snapshot {step}, which was not kept; "
                "choose later snapshots or start anew"
            )
    model, optimizer = accelerator.prepare(
        network, state.optimizer, device_placement=[False, False]
    )
    abar = schedule_abar(recipe)
    abar_tensor = torch.tensor(abar)
    labels = condition_labels(recipe, shape, np.asarray(members.labels))
    heldout_labels = condition_labels(recipe, shape, np.asarray(heldout.labels))
    curve = state.curve
    mine = training.batch_size // accelerator.num_processes
    share = slice(accelerator.process_index * mine, (accelerator.process_index + 1) * mine)

    def batch(step: int) -> _Batch:
        rows, t, eps = (
            whole[share]
            for whole in draw_step(
                len(members), shape.shape, training, recipe.train_timesteps, step
            )
        )
        told = None if labels is None else torch.from_numpy(labels[rows.numpy()])
        return _Batch(_noised(members.images[rows.numpy()], t, eps, abar_tensor), t, eps, told)

    def evaluate() -> None:
        average, count = state.average.module, training.evaluate_images
        samples = sample_plain(
            average,
            abar,
            shape.shape,
            count,
            derive_seed(training.seed, "evaluate"),
            device=place,
            labels=labels,
        )
        since = curve[-1]["step"] if curve else 0
        found = {"step": state.step, "loss": state.loss_sum / (state.step - since)}
        for name, side, told in (
            ("members", members, labels),
            ("heldout", heldout, heldout_labels),
        ):
            found[f"noise_loss_{name}"] = noise_loss(
                average,
                abar_tensor,
                np.asarray(side.images[:count]),
                None if told is None else told[:count],
                derive_seed(training.seed, "noise loss"),
                place,
            )
        curve.append(found | probe(state.step, samples))
        _write_log(folder, recipe, members_sha256, state, finished=False)

    batches = _batches(batch, state.step, place)
    while state.step < training.last_step:
        started = time.monotonic()
        if recipe.unet.dropout > 0:  # the masks of a step, too, follow from it alone
            torch.manual_seed(
                derive_seed(training.seed, "dropout", state.step, accelerator.process_index)
            )
        drawn = next(batches)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(training, state.step)
        known = {} if drawn.labels is None else {"class_labels": drawn.labels}
        predicted = model(drawn.x_t, drawn.t, return_dict=False, **known)[0]
        loss = nn.functional.mse_loss(predicted, drawn.eps)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        state.average.update_parameters(network)
        value = float(accelerator.reduce(loss.detach(), reduction="mean"))
        if not np.isfinite(value):
            raise MembenchError(
                f"{folder}: loss is {value} at step {state.step}; lower the learning rate"
            )
        state.step += 1
        state.loss_sum += value
        state.seconds += time.monotonic() - started

        if first and state.step in training.snapshots:
            _save_weights(snapshot(folder, state.step), state)
        if state.step % training.evaluate_every == 0:
            if first:
                evaluate()
            state.loss_sum = 0.0
        last = state.step == training.last_step
        due = last or state.step % training.checkpoint_every == 0
        if first and due:
            _save_checkpoint(checkpoint, identity, state)
        try:
            report(state.step, value)
        except Exception:
            raise
        except BaseException:  # told to stop
            if first and not due:
                _save_checkpoint(checkpoint, identity, state)
            raise

    if first:
        if not curve or curve[-1]["step"] < state.step:
            evaluate()
            state.loss_sum = 0.0
            _save_checkpoint(checkpoint, identity, state)
        _save_weights(folder / WEIGHTS, state)
        _write_log(folder, recipe, members_sha256, state, finished=True)
    accelerator.wait_for_everyone()
    log: dict[str, Any] = read_json(folder / LOG)
    return log


def snapshot(folder: Path, step: int | str) -> Path:
    """The file of the EMA weights at one step of the training in `folder`."""
    return folder / SNAPSHOTS / f"step-{step}.safetensors"


def snapshot_steps(folder: Path) -> list[str]:
    """The steps whose weights the training in `folder` has kept, in order."""
    stems = (path.stem.removeprefix("step-") for path in (folder / SNAPSHOTS).glob("step-*"))
    return sorted(stems, key=lambda step: (len(step), step))


def _save_weights(path: Path, state: _State) -> None:
    """The EMA weights as safetensors."""
    path.parent.mkdir(exist_ok=True)
    averaged = state.average.module.state_dict()
    weights = {name: value.contiguous() for name, value in averaged.items()}
    replace_atomically(path, lambda partial: save_file(weights, partial))


def _write_log(
    folder: Path, recipe: TargetRecipe, members_sha256: str, state: _State, finished: bool
) -> None:
    log = {
        "recipe": recipe.model_dump(mode="json", exclude={"weights", "weights_sha256"}),
        "members_images_sha256": members_sha256,
        "parameters": count_parameters(state.network),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": state.processes,
        "finished": finished,
        "seconds": round(state.seconds, 1),
        "curve": state.curve,
        "snapshots": {
            str(step): file_hash(snapshot(folder, step))
            for step in recipe.training.snapshots
            if snapshot(folder, step).is_file()
        },
    }
    if finished:
        log["weights_sha256"] = file_hash(folder / WEIGHTS)
    write_json(folder / LOG, log)
