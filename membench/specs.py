"""Validated descriptions: data cards and everything in them. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from membench.errors import MembenchError
from membench.specs_base import Spec as Spec
from membench.specs_base import described
from membench.specs_base import explain as explain
from membench.specs_pretrained import Pretrained

SPLITS = ("members", "auxiliary", "heldout")


class Split(Spec):
    """One part of a data set, pinned by hashes of its arrays (`membench.hashing.array_hash`).

    A card whose pixels the user prepares leaves out what it cannot know: the manifest that
    `membench prepare` writes then says it, and is checked from there on. `index_sha256` is in the
    card wherever the rule of the draw gives the list from counts alone.
    """

    count: int | None = Field(default=None, gt=0)
    images_sha256: str | None = None
    labels_sha256: str | None = None
    index_sha256: str | None = None


class Splits(Spec):
    """`members`: what targets train on; `auxiliary`: the attacker's; `heldout`: nobody's."""

    members: Split
    auxiliary: Split
    heldout: Split


class Images(Spec):
    """Shape of one image and the names of its labels; without names the manifest lists them."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    channels: Literal[1, 3]
    classes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), as the networks see it."""
        return self.channels, self.height, self.width


class Download(Spec):
    """An official file that the user fetches; checksums as published, `note` says where."""

    file: str
    url: str
    sha256: str | None = None
    md5: str | None = None
    note: str = ""


class Resize(Spec):
    """How a source image becomes one of the data set's size; `version` names the code that does.

    Version 1 (`membench.data.decode`): the central `crop` (height, width) if there is one, then the
    smaller edge to the wanted size with `filter` (Pillow, antialiased), then the central crop; an
    image that has the size already is left alone. source_sizes: (height, width) allowed in the
    source, else any. convert: grey, palette, CMYK and transparent images are brought to the data
    set's channels; without it they are an error.
    """

    version: Literal[1] = 1
    source_sizes: tuple[tuple[int, int], ...] = ()
    crop: tuple[int, int] | None = None
    filter: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    convert: bool = False


class Share(Spec):
    """What one split gets: `count` units of a part of the source, or all that is left of it."""

    part: str | None = None
    count: int | None = Field(default=None, gt=0)


class Draw(Spec):
    """The deterministic rule that deals the source out (`membench.data.splits`, version 1).

    unit: single images, or persons with all their images, so that no two splits share a person.
    """

    version: Literal[1] = 1
    seed: int = 0
    unit: Literal["image", "person"] = "image"
    members: Share
    auxiliary: Share
    heldout: Share


class Preparation(Spec):
    """How the official files become arrays: `membench prepare`.

    layout: the reader (`membench.data.layouts`). count: images in the source, None if it may vary.
    labels: what a label is. attributes: of CelebA, whose combinations are the labels. folders: the
    class folders to read, in the order of `images.classes`; others are passed over. only: a file
    beside the data set that lists the images to use.
    """

    layout: Literal["celeba", "cifar10", "class_folders", "imagenet", "images", "lfw"]
    count: int | None = Field(default=None, gt=0)
    labels: Literal["identity", "attribute", "class", "none"]
    attributes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    only: str | None = None
    downloads: tuple[Download, ...]
    resize: Resize = Resize()
    draw: Draw

    @model_validator(mode="after")
    def _labels_can_be_read(self) -> Preparation:
        if (self.labels == "attribute") != bool(self.attributes):
            raise ValueError("attributes: needed with labels = 'attribute', and only there")
        return self


BandMode = Literal["calibrated", "cumulative", "literal", "shifted"]


class DescriptorChoice(Spec):
    """A descriptor and everything that pins its scores (spec section 3).

    name: a plugin of the kind `descriptor`. resize_first: images are brought to that square before
    anything else (how a data set at that resolution would look). preset: how images are prepared
    (`membench.similarity.preprocessing.PRESETS`); input_size: in its place, a square of that side,
    normalised as ImageNet is; with neither, the descriptor's own preset. storage: how descriptors
    are kept on disk. weights: the user's file; its hash is pinned by the descriptor, so that the
    path is no part of the identity.
    """

    name: str
    preset: Literal["official_288", "official_320", "dcr_224", "amg_224"] | None = None
    input_size: int | None = Field(default=None, gt=0)
    resize_first: int | None = Field(default=None, gt=0)
    storage: Literal["float16", "float32"] = "float32"
    weights: str | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _one_size(self) -> DescriptorChoice:
        if self.preset is not None and self.input_size is not None:
            raise ValueError("preset and input_size: give one of the two")
        return self


class FalseMatchRates(Spec):
    """Shares of real held-out images that may pass the calibrated bands (spec section 4)."""

    low: float = Field(default=0.05, gt=0, lt=1)
    mid: float = Field(default=0.01, gt=0, lt=1)
    high: float = Field(default=0.002, gt=0, lt=1)


class Similarity(Spec):
    """How a generated image is compared with the members.

    name: `nl2`, normalised L2 of pixels, or `sscd`, the cosine of a `descriptor`.
    band_modes: which readings of the three bands are scored, the headline first; the fixed ones
    are the papers' (nL2 of 1.5, 1.4, 1.35; SSCD of 0.4, 0.5, 0.6). Default: `calibrated` and the
    similarity's own, `cumulative` for nL2 and `literal` for SSCD.
    flips: an image is also compared mirrored. dedup_reference: of members that are near-duplicates
    of each other only the first is compared with. near_duplicate_rmse: what a near-duplicate is
    (thumbnails, pixels in [0, 1]); held-out images that are ones of a member are left out of the
    null that calibrates. distinct_labels: so are those that share a member's label (identities).
    """

    name: Literal["nl2", "sscd"] = "nl2"
    descriptor: DescriptorChoice | None = None
    neighbours: int = Field(default=50, gt=1)
    flips: bool = False
    dedup_reference: bool = False
    match: Literal["any", "best"] = "any"
    band_modes: tuple[BandMode, ...] = ()
    false_match_rates: FalseMatchRates = FalseMatchRates()
    near_duplicate_rmse: float = Field(default=0.02, ge=0)
    distinct_labels: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_modes(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("band_modes"):
            own = "literal" if data.get("name") == "sscd" else "cumulative"
            return {**data, "band_modes": ("calibrated", own)}
        return data

    @model_validator(mode="after")
    def _descriptor_for_sscd(self) -> Similarity:
        if self.name == "sscd" and self.descriptor is None:
            raise ValueError(
                'descriptor: similarity "sscd" needs one, as in { name = "sscd_onnx" }'
            )
        if self.name == "nl2" and self.descriptor is not None:
            raise ValueError("descriptor: normalised L2 compares pixels and takes none")
        return self


def changed_similarity(
    own: Similarity,
    *,
    descriptor: str | None = None,
    preset: str | None = None,
    input_size: int | None = None,
    flips: bool = False,
    dedup_reference: bool = False,
) -> Similarity | None:
    """A card's similarity with what was asked for changed; None if nothing was."""
    changes = [descriptor, preset, input_size, flips or None, dedup_reference or None]
    if all(change is None for change in changes):
        return None
    fields = own.model_dump()
    fields["flips"] |= flips
    fields["dedup_reference"] |= dedup_reference
    if descriptor is None and own.descriptor is None and (preset or input_size) is not None:
        raise MembenchError("--preset, --input-size: name a --descriptor, this data set has none")
    if descriptor is not None or (own.descriptor is not None and (preset or input_size)):
        inherits = own.descriptor is not None and descriptor is None
        choice = own.descriptor.model_dump() if inherits and own.descriptor else {}
        if preset is not None or input_size is not None:
            choice |= {"preset": preset, "input_size": input_size}
        if descriptor is not None:
            choice["name"] = descriptor
        fields |= {"name": "sscd", "descriptor": choice}
        if own.name != "sscd":
            fields["band_modes"] = ()
    try:
        return Similarity.model_validate(fields)
    except ValidationError as error:
        raise MembenchError(f"--descriptor: {explain(error)}") from None


class Sampling(Spec):
    """How images are drawn from a target (spec section 2; all of it is recorded).

    precision, compile: of networks (`membench.diffusion.arithmetic`); identities are silent about
    plain float32, as they were before there was anything else.
    """

    steps: int = Field(default=50, gt=0)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    clip: bool = True
    batch_size: int = Field(default=64, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    @model_serializer(mode="wrap")
    def _silent_about_the_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        default = {"precision": "float32", "compile": False}
        return {k: v for k, v in dump(self).items() if k not in default or v != default[k]}


class Extraction(Spec):
    """What one run of an extraction method returns."""

    images_per_scale: int = Field(gt=0)
    guidance_scales: tuple[float, ...]
    sampling: Sampling = Sampling()


class Network(Spec):
    """A ResNet of basic blocks; (3, 4, 6, 3) blocks of width 64 is ResNet-34."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = Field(default=64, gt=0)
    stem: Literal["imagenet", "small"] = "imagenet"
    time_module: Literal["film", "shift"] = "film"


class ClassifierTraining(Spec):
    """AdamW on shuffled batches; the weights of the best loss on held-back images are kept.

    patience: evaluations without a better loss after which training stops; None: never. It is no
    part of an identity unless it is given.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(default=64, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    held_back: float = Field(default=0.125, gt=0, lt=1)
    evaluate_every: int = Field(default=100, gt=0)
    patience: int | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        if self.patience is None:
            del content["patience"]
        return content


class Attack(Spec):
    """What the surrogate conditions of the SIDE family are made of (TDKD, spec section 2).

    cluster_descriptor: of SIDE-C: pixels of the set itself, or a descriptor plugin.
    """

    synthetic_images: int = Field(gt=0)
    network: Network
    label_classifier: ClassifierTraining
    time_classifier: ClassifierTraining
    cluster_descriptor: Literal["pixels_pca", "pixels_lowres"] | DescriptorChoice = "pixels_pca"


class Training(Spec):
    """Recipe of a target: noise prediction with AdamW, linear decay after warm-up, and an EMA.

    `stop_at` ends the run early and leaves the learning-rate schedule as it is, so that the same
    recipe stopped earlier is a snapshot of the longer run, bit for bit. precision: of the forward
    and backward pass (weights, optimiser and EMA stay float32). snapshots: steps at which the EMA
    weights are kept.
    """

    steps: int = Field(gt=0)
    stop_at: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, gt=0)
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    seed: int = 0
    checkpoint_every: int = Field(default=250, gt=0)
    evaluate_every: int = Field(default=2000, gt=0)
    evaluate_images: int = Field(default=256, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    snapshots: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _snapshots_are_reached(self) -> Training:
        for step in self.snapshots:
            if not 0 < step <= self.last_step:
                raise ValueError(f"snapshots: {step} is no step of 1 to {self.last_step}")
        return self

    @property
    def last_step(self) -> int:
        return min(self.stop_at or self.steps, self.steps)


class UNet(Spec):
    """Configuration of diffusers' `UNet2DModel`; sizes and channels come from the card."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int = Field(default=2, gt=0)
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    norm_num_groups: int = Field(default=32, gt=0)
    add_attention: bool = True
    attention_head_dim: int | None = 8
    dropout: float = 0.0


class TargetRecipe(Spec):
    """One target of a data set: its network, its training, and the shipped weights, if any.

    condition: what the U-Net is told about each image, in training and in sampling: nothing, the
    data set's labels, or a label drawn at random for each member and kept (both are "informative
    labels", Chen et al. 2025, definition 2).
    """

    title: str
    unet: UNet
    condition: Literal["none", "labels", "random_labels"] = "none"
    training: Training
    train_timesteps: int = Field(default=1000, gt=0)
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    weights: str | None = None
    weights_sha256: str | None = None


def _kind_of_target(data: Any) -> str:
    known = "pretrained" in data if isinstance(data, dict) else isinstance(data, Pretrained)
    return "<pretrained>" if known else "<recipe>"


AnyTarget = Annotated[
    Annotated[TargetRecipe, Tag("<recipe>")] | Annotated[Pretrained, Tag("<pretrained>")],
    Discriminator(_kind_of_target),
]


class DataCard(Spec):
    """One data set of the benchmark: a TOML file in `datasets/`.

    license: terms of use as the authors state them. published: files of `leaderboards/published`
    with what papers printed for it. A card is never edited once it is released: a changed one gets
    the next revision.
    """

    name: str
    revision: int = Field(gt=0)
    title: str
    license: str
    citation: str
    source: str
    note: str = ""
    default_target: str
    show_images: bool = False
    published: tuple[str, ...] = ()
    preparation: Preparation | None = None
    images: Images
    splits: Splits
    similarity: Similarity = Similarity()
    extraction: Extraction
    attack: Attack
    targets: dict[str, AnyTarget]

    @model_validator(mode="before")
    @classmethod
    def _extend_targets(cls, data: Any) -> Any:
        """A target with `extends = "OTHER"` starts from OTHER and overrides what it names."""
        targets = data.get("targets") if isinstance(data, dict) else None
        if not isinstance(targets, dict):
            return data
        resolved = {}
        for name, target in targets.items():
            if isinstance(target, dict) and "extends" in target:
                base = targets.get(target["extends"])
                if not isinstance(base, dict) or "extends" in base:
                    raise ValueError(
                        f"targets.{name}.extends: no plain target named {target['extends']!r}"
                    )
                own = {key: value for key, value in target.items() if key != "extends"}
                if "pretrained" in own and "pretrained" not in base:
                    raise ValueError(
                        f"targets.{name}.extends: {target['extends']!r} is a recipe, which a "
                        "pretrained target does not have"
                    )
                target = _merged({k: v for k, v in base.items() if "weights" not in k}, own)
            resolved[name] = target
        return {**data, "targets": resolved}

    def recipe(self, name: str) -> TargetRecipe:
        """The recipe of a target that membench trains; a pretrained one is a `MembenchError`."""
        target = self.targets[name]
        if isinstance(target, Pretrained):
            raise MembenchError(
                f"target {name!r} of {self.name} is pretrained ({target.pretrained}): "
                "it has no recipe, and nothing to train"
            )
        return target

    @property
    def noise_recipe(self) -> TargetRecipe | None:
        """Whose noise schedule a closed-form target takes: the default target's recipe.

        Where that one is pretrained the first recipe of the card; None if there is no recipe.
        """
        targets = [self.targets[self.default_target], *self.targets.values()]
        return next((target for target in targets if isinstance(target, TargetRecipe)), None)

    @model_validator(mode="after")
    def _default_target_exists(self) -> DataCard:
        if self.default_target not in self.targets:
            raise ValueError(f"default_target: no target named {self.default_target!r}")
        return self

    @model_validator(mode="after")
    def _nothing_is_unknown(self) -> DataCard:
        """Only a data set that the user prepares may leave anything to its manifest."""
        if self.preparation is None:
            for name in SPLITS:
                for field, value in getattr(self.splits, name):
                    if value is None:
                        raise ValueError(f"splits.{name}.{field}: Field required")
            if not self.images.classes:
                raise ValueError("images.classes: Field required")
        return self


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


class WaitingCard(Spec):
    """A data set of the papers that membench cannot run yet; `waits_for` says what is missing."""

    name: str
    revision: int = Field(gt=0)
    title: str
    license: str
    citation: str
    source: str
    note: str = ""
    waits_for: str


class NotYet(MembenchError):
    """A card that waits for something; the message says for what."""


def load_card(path: Path) -> DataCard:
    """Read and validate a data card; a `MembenchError` names the file and the field.

    A card with `waits_for` is valid but cannot be used: `NotYet`.
    """
    with described(path, "data card") as content:
        if "waits_for" in content:
            waiting = WaitingCard.model_validate(content)
            raise NotYet(f"{path}: {waiting.name} waits for {waiting.waits_for}")
        card = DataCard.model_validate(content)
    if card.name != path.stem:
        raise MembenchError(f"{path}: name: is {card.name!r}, expected the file's {path.stem!r}")
    return card


class RunSpec(Spec):
    """One cell of the benchmark: method x mitigation x data set x target x seed, resolved."""

    method: str
    parameters: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    dataset: str
    target: str
    mitigation: None = None
    seed: int = 0
    attack_seed: int = 0
    guidance_scales: tuple[float, ...]
    images_per_scale: int = Field(gt=0)
    label: int | None = None
    sampling: Sampling
    device: str = "cpu"

    @model_validator(mode="after")
    def _scales_make_sense(self) -> RunSpec:
        if not self.guidance_scales or any(not 0 <= s < float("inf") for s in self.guidance_scales):
            raise ValueError("guidance_scales: expected one or more finite numbers >= 0")
        if any(float(f"{s:g}") != s for s in self.guidance_scales):
            raise ValueError("guidance_scales: at most six digits")
        if len(set(self.guidance_scales)) < len(self.guidance_scales):
            raise ValueError("guidance_scales: a scale is named twice")
        return self
