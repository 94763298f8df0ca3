"""Validated descriptions of targets that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from membench.specs_base import Spec


class Schedule(Spec):
    """Noise schedule and prediction of a U-Net, in the names of diffusers' `DDPMScheduler`."""

    num_train_timesteps: int = Field(default=1000, gt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"


WIDTHS = {
    32: (1.0, 2.0, 2.0, 2.0),
    64: (1.0, 2.0, 3.0, 4.0),
    128: (1.0, 1.0, 2.0, 3.0, 4.0),
    256: (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    512: (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
}
"""`channel_mult` that improved-diffusion and guided-diffusion take for an image size."""


class ImprovedDiffusion(Spec):
    """Flags of OpenAI's improved-diffusion that decide what a checkpoint computes.

    Names and defaults are the README's of that code base, whose other flags (losses, precision,
    checkpointing) do not matter here. `num_head_channels`, `resblock_updown` and
    `use_new_attention_order` are guided-diffusion's, which passes timesteps as they are:
    `rescale_timesteps = false`. num_classes: of a model trained with `--class_cond True`.
    attention_resolutions: side lengths in pixels.
    """

    image_size: int = Field(gt=0)
    in_channels: Literal[1, 3] = 3
    num_channels: int = Field(default=128, gt=0)
    num_res_blocks: int = Field(default=2, gt=0)
    channel_mult: tuple[float, ...] = ()
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = Field(default=4, gt=0)
    num_heads_upsample: int | None = Field(default=None, gt=0)
    num_head_channels: int | None = Field(default=None, gt=0)
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    learn_sigma: bool = False
    num_classes: int | None = Field(default=None, gt=0)
    diffusion_steps: int = Field(default=1000, gt=1)
    noise_schedule: Literal["linear", "cosine"] = "linear"
    rescale_timesteps: bool = True
    predict_xstart: bool = False

    @model_validator(mode="before")
    @classmethod
    def _widths_of_the_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("channel_mult"):
            return {**data, "channel_mult": WIDTHS.get(data.get("image_size", 0), ())}
        return data

    @model_validator(mode="after")
    def _can_be_built(self) -> ImprovedDiffusion:
        if not self.channel_mult:
            raise ValueError(f"channel_mult: no default for image_size = {self.image_size}")
        if self.image_size % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(f"image_size: not divisible by 2^{len(self.channel_mult) - 1}")
        for mult in self.channel_mult:
            width = mult * self.num_channels
            if width <= 0 or width % 32:
                raise ValueError(
                    f"num_channels, channel_mult: {mult:g} * {self.num_channels} channels are no "
                    "multiple of 32 (groups of the normalisation)"
                )
        return self


SHA256 = Field(default=None, pattern="^[0-9a-f]{64}$")


class Pretrained(Spec):
    """A target that was trained elsewhere (`membench.diffusion.pretrained`).

    pretrained: a folder or file (absolute, or beside the card's data, or in the folder where
    `membench train` would leave weights), or a hub id, whose `revision` is a full commit.
    layout: `diffusers` reads a pipeline folder with a UNet2DModel, or that model alone;
    `improved_diffusion` a file of weights whose architecture `network` describes. file: which file
    of weights, if it is not the usual one. allow_pickle: read a pickled file of tensors (with
    `weights_only=True`), whose hash must be given. scheduler: in place of the folder's own.
    condition: what a class-conditional model is told of each image: the label of a member, drawn
    as for our own targets (`labels`), or a label uniform over all of its classes (`uniform`);
    `auto` is `labels` if it has as many classes as the data set, else `uniform`.
    """

    title: str
    pretrained: str = Field(min_length=1)
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")
    file: str | None = None
    weights_sha256: str | None = SHA256
    allow_pickle: bool = False
    layout: Literal["diffusers", "improved_diffusion"] = "diffusers"
    condition: Literal["auto", "labels", "uniform"] = "auto"
    scheduler: Schedule | None = None
    network: ImprovedDiffusion | None = None

    @model_validator(mode="after")
    def _says_what_its_layout_needs(self) -> Pretrained:
        openai = self.layout == "improved_diffusion"
        if openai != (self.network is not None):
            raise ValueError("network: needed with layout = 'improved_diffusion', and only there")
        if openai and self.scheduler is not None:
            raise ValueError("scheduler: of layout = 'diffusers'; here `network` has the schedule")
        if self.allow_pickle and self.weights_sha256 is None:
            raise ValueError("allow_pickle: give weights_sha256 too, so that you know what is read")
        return self

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str | None) -> str | None:
        if file is not None and (Path(file).is_absolute() or ".." in Path(file).parts):
            raise ValueError("expected a name inside the folder")
        return file
