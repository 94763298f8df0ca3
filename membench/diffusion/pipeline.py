"""diffusers' pipeline folders: a `UNet2DModel` and a scheduler, read without running their code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from membench.diffusion.eps import Prediction, ve_abar
from membench.errors import MembenchError
from membench.files import read_json
from membench.specs_pretrained import Schedule

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""Samplers of one family: their configuration gives betas, and only these are taken from it."""
VE_SCHEDULER = "ScoreSdeVeScheduler"
LAST_ABAR = 2.0**-24
"""In place of an abar_T of 0 (`rescale_betas_zero_snr`), as diffusers' EulerDiscreteScheduler."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def model_folder(folder: Path) -> Path:
    """Where the U-Net of a pipeline folder (or of a folder with the U-Net alone) lies.

    Raises `MembenchError` for a pipeline that has parts a pixel model does not have.
    """
    if (folder / INDEX).is_file():
        _check_parts(folder / INDEX)
    for place in (folder / "unet", folder):
        if (place / CONFIG).is_file():
            return place
    raise MembenchError(
        f"{folder}: neither {INDEX} nor unet/{CONFIG} nor {CONFIG}: not a diffusers folder"
    )


def _check_parts(path: Path) -> None:
    index = _dictionary(path)
    parts = {
        name: value[1]
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1]
    }
    others = sorted(parts.keys() - {"unet", "scheduler"})
    if others:
        raise MembenchError(
            f"{path}: {index.get('_class_name')} has a {others[0]} ({parts[others[0]]}); membench "
            "attacks models of pixels, with a unet and a scheduler only"
        )
    if parts.get("unet") != "UNet2DModel":
        raise MembenchError(f"{path}: unet is {parts.get('unet')}, expected UNet2DModel")


def read_config(folder: Path) -> dict[str, Any]:
    """The U-Net's configuration without diffusers' own notes."""
    path = folder / CONFIG
    config = _dictionary(path)
    if config.get("_class_name") != "UNet2DModel":
        raise MembenchError(
            f"{path}: a {config.get('_class_name', 'model without _class_name')}, expected a "
            "UNet2DModel of diffusers"
        )
    return {name: value for name, value in config.items() if not name.startswith("_")}


def build(config: dict[str, Any], path: Path) -> nn.Module:
    """The network on the meta device, without weights."""
    if config.get("class_embed_type") == "identity":
        raise MembenchError(
            f"{path}: class_embed_type 'identity' wants an embedding, not a label; not supported"
        )
    try:
        with torch.device("meta"):
            network: nn.Module = UNet2DModel.from_config(config)
    except Exception as error:  # whatever diffusers' blocks make of a wrong configuration
        reason = str(error).strip().partition("\n")[0]
        raise MembenchError(f"{path}: UNet2DModel cannot be built from it ({reason})") from None
    kept = network.state_dict().keys()
    lost = [name for name, _ in network.named_buffers() if name not in kept]
    if lost:
        raise MembenchError(f"{path}: block types with a constant {lost[0]} are not supported")
    return network


def weights_file(folder: Path, file: str | None, allow_pickle: bool) -> Path:
    """The file of weights of a U-Net's folder: `file`, or the one with the usual name."""
    if file is not None:
        return folder / file
    usual = folder / f"{WEIGHTS}.safetensors"
    pickled = folder / f"{WEIGHTS}.bin"
    if usual.is_file():
        return usual
    if pickled.is_file():
        return pickled  # refused where it is read, unless the user insists
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / f"{WEIGHTS}.safetensors.index.json").is_file():
        raise MembenchError(f"{usual}: missing; weights in several files are not supported")
    hint = f'; name one of those there, as in file = "{there[0]}"' if there else ""
    raise MembenchError(f"{usual}: no such weights file{hint}")


def modern_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention's tensors under today's names; diffusers before 0.13 wrote others."""
    old = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")

    def renamed(name: str) -> str:
        found = old.fullmatch(name)
        return f"{found[1]}{OLD_ATTENTION[found[2]]}{found[3]}" if found else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def read_schedule(
    folder: Path, unet: Path, given: Schedule | None
) -> tuple[list[float], Prediction, dict[str, Any]]:
    """abar [T], what the network predicts, and the scheduler's part of the identity.

    given: in place of the folder's scheduler. Raises `MembenchError` naming the file for a
    scheduler of another family, and where there is none.
    """
    if given is not None:
        values = given.model_dump(mode="json")
        return _from_betas({"_class_name": "DDPMScheduler"} | values, Path("scheduler"))
    places = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER, unet.parent / SCHEDULER]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise MembenchError(
            f"{places[0]}: no scheduler, so nobody knows the noise schedule; say it in a card or "
            'TOML target, as in scheduler = { beta_schedule = "linear", prediction_type = '
            '"epsilon" }'
        )
    config = _dictionary(path)
    name = config.get("_class_name")
    if name == VE_SCHEDULER:
        return _from_sigmas(config, path)
    if name not in SCHEDULERS:
        raise MembenchError(
            f"{path}: scheduler {name} is not supported; expected {VE_SCHEDULER} or one with betas "
            f"({', '.join(SCHEDULERS[:2])}, ...)"
        )
    return _from_betas(config, path)


def _from_betas(
    config: dict[str, Any], path: Path
) -> tuple[list[float], Prediction, dict[str, Any]]:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise MembenchError(
            f"{path}: prediction_type {prediction!r}, expected epsilon, v_prediction or sample"
        )
    try:
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        abar = scheduler.alphas_cumprod.double()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise MembenchError(f"{path}: not a noise schedule ({reason})") from None
    if not (len(abar) > 1 and (abar[1:] < abar[:-1]).all() and abar[0] < 1 and abar[-1] >= 0):
        raise MembenchError(f"{path}: betas must lie between 0 and 1")
    abar[-1] = max(abar[-1].item(), LAST_ABAR) if config.get("rescale_betas_zero_snr") else abar[-1]
    if abar[-1] <= 0:
        raise MembenchError(f"{path}: abar reaches 0, from which no sampler can start")
    kept = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    identity = {key: config[key] for key in kept if config.get(key) is not None}
    return abar.tolist(), prediction, identity


def _from_sigmas(
    config: dict[str, Any], path: Path
) -> tuple[list[float], Prediction, dict[str, Any]]:
    try:
        low, high, count = config["sigma_min"], config["sigma_max"], config["num_train_timesteps"]
        if not (0 < low < high and count > 1):
            raise ValueError("expected 0 < sigma_min < sigma_max")
        abar = ve_abar(float(low), float(high), int(count))
    except (KeyError, TypeError, ValueError) as error:
        raise MembenchError(f"{path}: not the noise levels of a {VE_SCHEDULER} ({error})") from None
    return abar, "score_ve", {"sigma_min": low, "sigma_max": high, "pixels": [0, 1]}


def _dictionary(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise MembenchError(f"{path}: not a JSON object")
    return content
