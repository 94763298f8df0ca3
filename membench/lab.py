"""The lab: everything an extraction method may ask for, as artifacts shared by all methods.

Nothing here computes when it is called. Each function describes one artifact by what goes into it;
`Store.get` makes it when it is needed. So a method is a short graph, `--dry-run` can print it, and
two methods that ask for the same thing share it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch

from membench.data.imageset import Dataset
from membench.describing import Describer
from membench.diffusion import tdkd
from membench.diffusion.arithmetic import Arithmetic
from membench.diffusion.classifier import ResNet
from membench.diffusion.clusters import check_settings, cluster, describe
from membench.diffusion.guidance import GuidanceLog, classifier_guidance, gradient_in
from membench.diffusion.sampler import (
    Guidance,
    ImageNoise,
    ddim,
    ddim_times,
    to_device,
    to_uint8,
)
from membench.diffusion.targets import Target, computed
from membench.diffusion.threads import torch_threads
from membench.errors import MembenchError
from membench.files import read_json, write_array, write_joined, write_json
from membench.hashing import content_hash, derive_seed
from membench.matching import Matcher
from membench.registry import Registry
from membench.specs import DescriptorChoice, Sampling, Similarity
from membench.store import PARTS, Artifact, MakePart, Parts, Store, Work, part_marker

VERSIONS = {
    "sampler": 1,
    "guidance": 1,
    "classifier": 1,
    "labels": 1,
    "descriptors": 1,
}
"""Of the code behind each kind of artifact: raise one when its results change."""
IMAGES, LABELS, REPORT = "images.npy", "labels.npy", "report.json"
CLASSIFIER, CHECKPOINT = "classifier.safetensors", "checkpoint.pt"
Place = Literal["x_t", "x_0"]
Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows one stage at a time: `with progress(title, total, unit) as advance: advance(n)`."""

    def __call__(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


@dataclass(frozen=True)
class Labels:
    """Labels of a set of images: hard int64 [N], or probabilities float32 [N, K]."""

    values: np.ndarray
    n_labels: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Classifier:
    """A trained classifier in evaluation mode and what was learnt while training it."""

    network: ResNet
    n_labels: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Surrogate:
    """A surrogate condition: the classifier whose gradient guides the target (spec section 2).

    timed: whether the classifier takes t; at: where a time-independent one is evaluated.
    """

    title: str
    classifier: Artifact[Classifier]
    timed: bool
    at: Place = "x_t"

    def identity(self) -> dict[str, Any]:
        return {"classifier": self.classifier.key, "timed": self.timed, "at": self.at}


@dataclass(frozen=True)
class Generated:
    """What a target returned. images: uint8 [N_G, H, W, C], memory-mapped; labels: int64 [N_G],
    the target label of each image (-1 without guidance); report: guidance norms by timestep."""

    images: np.ndarray
    labels: np.ndarray
    report: dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """One target on one data set, and all that can be derived from them.

    seed: of the attack's own parts (synthetic set, classifiers, clusters), shared by all run seeds.
    similarity: how images are compared, the card's if None.
    registry: where descriptors are found by name. descriptor_weights: the user's file, for those
    that need one. search_on: GPUs that filter the exact search; no result depends on them.
    """

    dataset: Dataset
    target: Target
    store: Store
    progress: Progress
    device: str = "cpu"
    seed: int = 0
    registry: Registry = field(default_factory=Registry)
    descriptor_weights: Path | None = None
    similarity: Similarity | None = None
    search_on: tuple[str, ...] = ()

    # -- images ---------------------------------------------------------------------------------

    def images(
        self,
        surrogate: Surrogate | None,
        guidance_scale: float,
        *,
        count: int,
        seed: int,
        sampling: Sampling,
        label: int | None = None,
        title: str = "",
    ) -> Artifact[Generated]:
        """`count` images from the target, guided by `surrogate` at `guidance_scale`.

        Without a surrogate, or at scale 0, this is plain sampling, and both are one artifact.
        Image i depends on (seed, i) and on the fixed batch grid, on nothing else.
        """
        if guidance_scale == 0:
            surrogate = None
        identity = {
            "target": self.target.identity,
            "sampler": {"name": "ddim", "version": VERSIONS["sampler"]} | sampling.identity(),
            "count": count,
            "seed": seed,
            "compute": self.compute(),
        }
        if surrogate is not None:
            identity["guidance"] = surrogate.identity() | {
                "version": VERSIONS["guidance"],
                "scale": guidance_scale,
                "label": "uniform" if label is None else label,
            }
        title = title or (f"images at scale {guidance_scale:g}" if surrogate else "plain images")
        calls = count * sampling.steps

        size = sampling.batch_size
        n_batches = -(-count // size)

        def begin() -> tuple[np.ndarray, MakePart]:
            condition = None if surrogate is None else self.store.get(surrogate.classifier)
            labels = draw_labels(seed, count, condition, label)

            def batch(folder: Path, i: int) -> None:
                rows = range(i * size, min((i + 1) * size, count))
                began = time.monotonic()
                pixels, norms = self.sample(
                    rows,
                    labels[rows.start : rows.stop],
                    surrogate,
                    condition,
                    guidance_scale,
                    seed,
                    sampling,
                )
                marker = part_marker(folder, i)
                write_array(marker.with_suffix(".npy"), pixels)
                seconds = time.monotonic() - began
                write_json(marker, {"seconds": seconds, "norms": norms.to_dict()})

            return labels, batch

        def make(folder: Path, work: Work) -> None:
            labels, batch = begin()
            total = GuidanceLog()
            with self.progress(title, count, "images") as advance:
                for i in parts.make_all(folder, batch):
                    done = read_json(part_marker(folder, i))
                    total.merge(GuidanceLog.from_dict(done["norms"]))
                    work.seconds += done["seconds"]
                    advance(min(size, count - i * size))
            work.unet_calls, work.classifier_calls = calls, calls if surrogate else 0
            pixels = [part_marker(folder, i).with_suffix(".npy") for i in range(n_batches)]
            write_joined(folder / IMAGES, pixels, count)
            write_array(folder / LABELS, labels)
            write_json(folder / REPORT, {t: entry["mean"] for t, entry in total.to_dict().items()})

        parts = Parts(n_batches, lambda: begin()[1], self._batches_at_a_time)

        def load(folder: Path) -> Generated:
            images = np.load(folder / IMAGES, mmap_mode="r")
            return Generated(images, np.load(folder / LABELS), read_json(folder / REPORT))

        return Artifact(
            "images",
            title,
            identity,
            make,
            load,
            inputs=() if surrogate is None else (surrogate.classifier,),
            planned=Work(calls, calls if surrogate else 0),
            parts=parts,
        )

    @contextmanager
    def _batches_at_a_time(self) -> Iterator[int]:
        """How many batches are made at once: on the CPU, as many as torch has threads, each on one.

        So no bit depends on the number of threads. At most 8, for their memory's sake.
        """
        if torch.device(self.device).type != "cpu":
            yield 1
            return
        threads = torch.get_num_threads()
        with torch_threads(1):
            yield min(threads, 8)

    def sample(
        self,
        rows: range,
        labels: np.ndarray,
        surrogate: Surrogate | None,
        condition: Classifier | None,
        guidance_scale: float,
        seed: int,
        sampling: Sampling,
    ) -> tuple[np.ndarray, GuidanceLog]:
        """One batch of the grid: uint8 [B, H, W, C] and the guidance's norms."""
        noise = ImageNoise(seed, rows, self.target.shape)
        arithmetic = Arithmetic(sampling.precision, sampling.compile)
        log, guidance = GuidanceLog(), None
        if surrogate is not None and condition is not None:
            guidance = self._guidance(surrogate, condition, labels, guidance_scale, log, arithmetic)
        x_0 = ddim(
            computed(self.target, arithmetic).eps_model(seed, rows),
            to_device(noise(), self.device),
            ddim_times(sampling.steps, len(self.target.abar)),
            self.target.abar,
            eta=sampling.eta,
            clip=sampling.clip,
            noise=lambda: to_device(noise(), self.device),
            guidance=guidance,
        )
        try:
            return to_uint8(x_0), log
        except FloatingPointError as error:
            raise MembenchError(
                f"target {self.target.name}, guidance scale {guidance_scale:g}: {error}; "
                "take a smaller scale, or check the target's weights"
            ) from None

    def _guidance(
        self,
        surrogate: Surrogate,
        condition: Classifier,
        labels: np.ndarray,
        scale: float,
        log: GuidanceLog,
        arithmetic: Arithmetic,
    ) -> Guidance:
        return classifier_guidance(
            condition.network,
            torch.from_numpy(labels).to(self.device),
            scale,
            self.target.abar,
            at=surrogate.at,
            timed=surrogate.timed,
            log=log,
            gradient=gradient_in(arithmetic),
        )

    def synthetic(self) -> Artifact[Generated]:
        """The synthetic set: plain samples of the target, from which surrogates learn."""
        card = self.dataset.card
        return self.images(
            None,
            0.0,
            count=card.attack.synthetic_images,
            seed=derive_seed(self.seed, "synthetic"),
            sampling=card.extraction.sampling,
            title="synthetic set",
        )

    # -- labels and classifiers -----------------------------------------------------------------

    def label_classifier(self, split: Literal["members", "auxiliary"]) -> Artifact[Classifier]:
        """A time-independent classifier trained on the true labels of one split."""
        card = self.dataset.card
        images = getattr(self.dataset, split)
        identity = {
            "version": VERSIONS["classifier"],
            "images": getattr(card.splits, split).images_sha256,
            "labels": getattr(card.splits, split).labels_sha256,
            "network": card.attack.network.identity(),
            "training": card.attack.label_classifier.identity(),
            "seed": self.seed,
            "compute": self.compute(),
        }

        def make(folder: Path, work: Work) -> None:
            training = card.attack.label_classifier
            with self.progress(f"classifier on {split}", training.steps, "steps") as advance:
                classifier, report = tdkd.train_label_classifier(
                    images.images,
                    images.labels,
                    len(card.images.classes),
                    card.attack.network,
                    training,
                    derive_seed(self.seed, "label classifier"),
                    checkpoint=folder / PARTS / CHECKPOINT,
                    progress=steps_to(advance),
                    device=self.device,
                )
            _save_classifier(folder, classifier, report)

        return Artifact(
            "classifier", f"classifier on {split}", identity, make, self._load_classifier
        )

    def report(self, classifier: Artifact[Classifier]) -> dict[str, Any]:
        """What was learnt while training a classifier; its network is not loaded if it is there."""
        if not self.store.has(classifier):
            return self.store.get(classifier).report
        found: dict[str, Any] = read_json(self.store.folder(classifier) / REPORT)
        return found

    def pseudo_labels(
        self, images: Artifact[Generated], classifier: Artifact[Classifier]
    ) -> Artifact[Labels]:
        """Probabilities that a classifier gives to each image (TDKD, step 3)."""

        def make(folder: Path, work: Work) -> None:
            network = self.store.get(classifier)
            pixels = self.store.get(images).images
            write_array(folder / LABELS, tdkd.pseudo_label(network.network, pixels))
            work.classifier_calls += len(pixels)
            summary = {key: network.report[key] for key in ("accuracy", "chance", "best_step")}
            write_json(folder / REPORT, {"n_labels": network.n_labels, classifier.title: summary})

        identity = {
            "labels": "probabilities",
            "version": VERSIONS["labels"],
            "compute": self.compute(),
        }
        planned = Work(classifier_calls=self.dataset.card.attack.synthetic_images)
        inputs = (images, classifier)
        return Artifact("labels", "pseudo-labels", identity, make, _load_labels, inputs, planned)

    def descriptors(self, images: Artifact[Generated], name: str) -> Artifact[np.ndarray]:
        """Descriptors of images (`membench.diffusion.clusters.describe`): float64 [N, D]."""

        def make(folder: Path, work: Work) -> None:
            pixels = np.asarray(self.store.get(images).images)
            write_array(folder / "descriptors.npy", describe(pixels, name))

        def load(folder: Path) -> np.ndarray:
            return np.load(folder / "descriptors.npy", mmap_mode="r")

        identity = {"name": name, "version": VERSIONS["descriptors"]}
        return Artifact("descriptors", f"descriptors {name}", identity, make, load, (images,))

    def descriptors_of(
        self,
        split: Literal["members", "auxiliary", "heldout"],
        choice: DescriptorChoice,
        flipped: bool = False,
    ) -> Artifact[np.ndarray]:
        """Unit vectors [N, D] of one split's images (or their mirror images), memory-mapped."""
        return self.describer.of_split(self.dataset, split, choice, flipped)

    def descriptors_of_images(
        self, images: Artifact[Generated], choice: DescriptorChoice, flipped: bool = False
    ) -> Artifact[np.ndarray]:
        """Unit vectors [N_G, D] of what a target returned, memory-mapped."""
        return self.describer.of_images(images, choice, flipped)

    @property
    def describer(self) -> Describer:
        """What computes this lab's descriptors."""
        return Describer(
            self.registry, self.store, self.progress, self.device, self.descriptor_weights
        )

    def clusters(
        self,
        images: Artifact[Generated],
        *,
        n_clusters: int,
        min_cohesion: float,
        descriptor: str | DescriptorChoice | None = None,
    ) -> Artifact[Labels]:
        """k-means clusters of images, the loose ones dropped (SIDE-C); labels are hard.

        descriptor: the card's, if it is not given here. Raises `MembenchError` for too few images;
        `Store.get` does when `min_cohesion` leaves no cluster.
        """
        check_settings(images.identity["count"], n_clusters, min_cohesion)
        chosen = descriptor or self.dataset.card.attack.cluster_descriptor
        if isinstance(chosen, str):
            name, descriptors = chosen, self.descriptors(images, chosen)
        else:
            name, descriptors = chosen.name, self.descriptors_of_images(images, chosen)
        identity = {
            "labels": "clusters",
            "version": VERSIONS["labels"],
            "n_clusters": n_clusters,
            "min_cohesion": min_cohesion,
            "seed": self.seed,
        }

        def make(folder: Path, work: Work) -> None:
            found = cluster(
                self.store.get(descriptors),
                n_clusters,
                min_cohesion=min_cohesion,
                seed=derive_seed(self.seed, "clusters"),
            )
            write_array(folder / LABELS, found.labels)
            report = {"n_labels": found.n_clusters, "descriptor": name} | found.report
            write_json(folder / REPORT, report)

        return Artifact("labels", "clusters", identity, make, _load_labels, (descriptors,))

    def label_by(
        self,
        images: Artifact[Generated],
        function: Callable[[np.ndarray], np.ndarray],
        *,
        version: int,
        **settings: Any,
    ) -> Artifact[Labels]:
        """Labels by a function of your own: uint8 [N, H, W, C] -> int [N] or float [N, K].

        The function's source is part of the identity; raise `version` when something it calls
        changes. `settings` go to it as arguments.
        """
        identity = {
            "labels": function.__qualname__,
            "source_sha256": content_hash(inspect.getsource(function)),
            "version": version,
            "settings": settings,
        }

        def make(folder: Path, work: Work) -> None:
            values = np.asarray(function(np.asarray(self.store.get(images).images), **settings))
            hard = values.ndim == 1
            n_labels = int(values.max()) + 1 if hard else values.shape[1]
            write_array(folder / LABELS, values.astype(np.int64 if hard else np.float32))
            write_json(folder / REPORT, {"n_labels": n_labels})

        return Artifact("labels", function.__name__, identity, make, _load_labels, (images,))

    def time_dependent(self, images: Artifact[Generated], labels: Artifact[Labels]) -> Surrogate:
        """A time-dependent classifier trained on noised images (TDKD, step 4).

        Probabilities are learnt with the soft loss, hard labels with the hard one.
        """
        card = self.dataset.card
        training = card.attack.time_classifier
        identity = {
            "timed": True,
            "version": VERSIONS["classifier"],
            "network": card.attack.network.identity(),
            "training": training.identity(),
            "abar": content_hash(self.target.abar),
            "seed": self.seed,
            "compute": self.compute(),
        }

        def make(folder: Path, work: Work) -> None:
            known = self.store.get(labels)
            pixels = self.store.get(images).images
            if known.n_labels < 2:
                raise MembenchError(
                    f"{labels.title}: {known.n_labels} label(s) for {len(pixels)} images; "
                    "guidance needs at least two"
                )
            title = "time-dependent classifier"
            with self.progress(title, training.steps, "steps") as advance:
                classifier, report = tdkd.train_time_classifier(
                    pixels,
                    known.values,
                    known.n_labels,
                    self.target.abar,
                    card.attack.network,
                    training,
                    derive_seed(self.seed, "time classifier"),
                    checkpoint=folder / PARTS / CHECKPOINT,
                    progress=steps_to(advance),
                    device=self.device,
                )
            _save_classifier(folder, classifier, report | {"labels": known.report})

        artifact = Artifact(
            "classifier",
            "time-dependent classifier",
            identity,
            make,
            self._load_classifier,
            (images, labels),
        )
        return Surrogate("time-dependent classifier", artifact, timed=True)

    def time_independent(self, classifier: Artifact[Classifier], at: str = "x_t") -> Surrogate:
        """A clean-image classifier used at every t: at x_t, or at the predicted x_0 (OL-TI)."""
        if at not in ("x_t", "x_0"):
            raise MembenchError(f"at: {at!r}, expected 'x_t' or 'x_0'")
        title = f"time-independent classifier at {at}"
        return Surrogate(title, classifier, timed=False, at=cast(Place, at))

    # -- matches --------------------------------------------------------------------------------

    @property
    def matcher(self) -> Matcher:
        """What compares this lab's images with its data set."""
        similarity = self.similarity or self.dataset.card.similarity
        return Matcher(
            self.dataset, similarity, self.store, self.progress, self.describer, self.search_on
        )

    # -- help -----------------------------------------------------------------------------------

    def compute(self) -> dict[str, str]:
        """Where the arithmetic happens: kinds of device round differently.

        dtype: of weights, and of all arithmetic that `Sampling.precision` is not about.
        """
        return {"device": torch.device(self.device).type, "dtype": "float32"}

    def _load_classifier(self, folder: Path) -> Classifier:
        network, _ = tdkd.load_classifier(folder / CLASSIFIER, self.device)
        report = read_json(folder / REPORT)
        return Classifier(network, network.n_classes, report)


def steps_to(advance: Advance) -> Callable[[int, float], None]:
    """A trainer's report (step, loss) as increments of a progress bar."""
    last = 0

    def report(step: int, loss: float) -> None:
        nonlocal last
        advance(step - last)
        last = step

    return report


def draw_labels(
    seed: int, count: int, condition: Classifier | None, label: int | None
) -> np.ndarray:
    """The target label of each image: fixed, or uniform from the image's own seed; -1 for none."""
    if condition is None:
        return np.full(count, -1, np.int64)
    if label is not None:
        if not 0 <= label < condition.n_labels:
            raise MembenchError(f"--label {label}: expected 0 to {condition.n_labels - 1}")
        return np.full(count, label, np.int64)
    draws: Sequence[int] = [derive_seed(seed, "label", i) for i in range(count)]
    return np.array([draw % condition.n_labels for draw in draws], np.int64)


def _save_classifier(folder: Path, classifier: ResNet, report: dict[str, Any]) -> None:
    tdkd.save_classifier(folder / CLASSIFIER, classifier, {})
    write_json(folder / REPORT, report)


def _load_labels(folder: Path) -> Labels:
    report = read_json(folder / REPORT)
    return Labels(np.load(folder / LABELS), report.pop("n_labels"), report)
