"""The contract every extraction method keeps, checked on a small target of known answer.

`membench test NAME` runs these on any method (descriptors have checks of their own, in
`membench.contract_descriptor`); the project's own tests run them on the five that
come with it. The target is `oracle:0.5` over 64 images of `fashion_mini`: no training, no network,
seconds.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.markup import escape

from membench.contract_descriptor import DESCRIPTOR_CHECKS, bench
from membench.data.imageset import Dataset, ImageSet, load_dataset
from membench.diffusion.sampler import EpsModel, ImageNoise, ddim, ddim_times, to_uint8
from membench.diffusion.targets import OracleTarget, Target
from membench.errors import MembenchError
from membench.hashing import array_hash
from membench.lab import Lab, Surrogate
from membench.plugins import Descriptor, Method
from membench.registry import Broken, Registry
from membench.run import Cell, build_cell, run
from membench.similarity.descriptors import checked
from membench.specs import RunSpec, Sampling
from membench.store import PARTS, Store
from membench.verify import verify

SCALE = 2.0
SAMPLING = Sampling(steps=10, batch_size=16)
IMAGES = 40  # two full batches and a short one


class SkipCheck(Exception):
    """The check does not apply to this method; the text says why."""


def small_dataset(registry: Registry) -> Dataset:
    """64 members, 128 auxiliary and 192 held-out images of `fashion_mini`, with light settings."""
    whole = load_dataset(registry.card("fashion_mini"), registry.data_folder("fashion_mini"))
    parts, splits = {}, {}
    for name, count in {"members": 64, "auxiliary": 128, "heldout": 192}.items():
        part: ImageSet = getattr(whole, name)
        part = ImageSet(part.images[:count], part.labels[:count], part.index[:count])
        parts[name] = part
        splits[name] = getattr(whole.card.splits, name).model_copy(
            update={"count": count}
            | {f"{kind}_sha256": array_hash(getattr(part, kind)) for kind in vars(part)}
        )
    card = whole.card
    light = {"steps": 20, "evaluate_every": 10}
    attack = card.attack.model_copy(
        update={
            "synthetic_images": 512,
            "label_classifier": card.attack.label_classifier.model_copy(update=light),
            "time_classifier": card.attack.time_classifier.model_copy(update=light),
        }
    )
    extraction = card.extraction.model_copy(update={"sampling": SAMPLING})
    changes = {
        "attack": attack,
        "extraction": extraction,
        "splits": card.splits.model_copy(update=splits),
    }
    return Dataset(card.model_copy(update=changes), **parts)


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    yield lambda n: None


@dataclass(frozen=True)
class Bench:
    """One method on the small target, with results in a folder of its own."""

    method: Method
    lab: Lab

    def cell(self, lab: Lab | None = None, scale: float = SCALE) -> Cell:
        lab = lab or self.lab
        spec = RunSpec(
            method=self.method.name,
            parameters=self.method.parameters,
            dataset=lab.dataset.card.name,
            target=lab.target.name,
            guidance_scales=(scale,),
            images_per_scale=IMAGES,
            sampling=SAMPLING,
        )
        return build_cell(spec, self.method, lab)

    def surrogate(self) -> Surrogate:
        surrogate = self.cell().surrogate
        if surrogate is None:
            raise SkipCheck("the method does not guide")
        return surrogate

    def elsewhere(self, name: str) -> Lab:
        """The same lab with an empty store."""
        return replace(self.lab, store=Store(self.lab.store.root.parent / name))


def describes_itself(bench: Bench) -> None:
    """Title, paper and docstring are there; every parameter has a JSON-able default."""
    method = bench.method
    for field in ("title", "paper", "summary"):
        assert getattr(method, field).strip(), f"{field} is empty"
    for name, default in method.parameters.items():
        assert default is not inspect.Parameter.empty, f"parameter {name} has no default"
        json.dumps(default)
    signature = inspect.signature(method.prepare)
    others = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert len(others) == 1, "expected one positional argument (lab), the rest after a *"


def prepares_without_computing(bench: Bench) -> None:
    """Putting the method together computes nothing and gives the same artifacts every time."""
    lab = bench.elsewhere("untouched")
    first, second = bench.cell(lab), bench.cell(lab)
    assert not lab.store.root.exists(), "preparing wrote something"
    assert first.id == second.id, "two preparations differ"


def extracts_images(bench: Bench) -> None:
    """Images are uint8 [N_G, H, W, C], one per index, and not all the same."""
    cell = bench.cell()
    for artifact in cell.images.values():
        images = bench.lab.store.get(artifact).images
        channels, height, width = bench.lab.target.shape
        assert images.dtype == np.uint8 and images.shape == (IMAGES, height, width, channels)
        assert len(np.unique(images.reshape(IMAGES, -1), axis=0)) > 1, "all images are the same"


def scale_zero_is_random(bench: Bench) -> None:
    """At guidance scale 0 the images are those of plain sampling, bit for bit."""
    surrogate = bench.surrogate()
    lab, rows = bench.lab, range(16)
    condition = lab.store.get(surrogate.classifier)
    labels = np.arange(16) % condition.n_labels
    guided, _ = lab.sample(rows, labels, surrogate, condition, 0.0, 0, SAMPLING)
    noise = ImageNoise(0, rows, lab.target.shape)()
    times = ddim_times(SAMPLING.steps, len(lab.target.abar))
    plain = ddim(lab.target.eps_model(0, rows), noise, times, lab.target.abar)
    assert np.array_equal(guided, to_uint8(plain)), "scale 0 changes images"


def guidance_acts(bench: Bench) -> None:
    """At a scale above 0 the images differ from plain ones, and the record says how much."""
    surrogate = bench.surrogate()
    plain = bench.lab.images(None, 0, count=IMAGES, seed=0, sampling=SAMPLING)
    guided = bench.cell().images[SCALE]
    assert surrogate.title
    first, second = bench.lab.store.get(plain), bench.lab.store.get(guided)
    assert not np.array_equal(first.images, second.images), "guidance changes nothing"
    assert len(second.report) == SAMPLING.steps, "no guidance norm for every timestep"


def shards_do_not_matter(bench: Bench) -> None:
    """A batch of the grid computed alone has the images it has in the whole run."""
    cell = bench.cell()
    ((scale, artifact),) = cell.images.items()
    generated = bench.lab.store.get(artifact)
    condition = None if cell.surrogate is None else bench.lab.store.get(cell.surrogate.classifier)
    rows = range(16, 32)
    labels = generated.labels[rows.start : rows.stop]
    alone, _ = bench.lab.sample(rows, labels, cell.surrogate, condition, scale, 0, SAMPLING)
    assert np.array_equal(alone, generated.images[rows.start : rows.stop]), "the batch differs"


@dataclass
class Counted:
    """A target that counts the images it is asked for."""

    target: Target
    images: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def eps_model(self, seed: int, indices: Sequence[int]) -> EpsModel:
        self.images += len(indices)
        return self.target.eps_model(seed, indices)


def resumes_after_a_kill(bench: Bench) -> None:
    """Stopped after a batch, the next attempt computes what is missing; the images are equal."""

    @contextmanager
    def stop_after_first(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(n: int) -> None:
            if title.startswith(("images", "plain")):
                raise KeyboardInterrupt

        yield advance

    lab = bench.elsewhere("killed")
    try:
        ((_, artifact),) = bench.cell(replace(lab, progress=stop_after_first)).images.items()
        lab.store.get(artifact)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the stop did not happen")
    finished = [
        np.load(part, mmap_mode="r").shape[0]
        for part in (lab.store.partial(artifact) / PARTS).glob("batch-*.npy")
    ]
    assert finished, "the stop left nothing"
    counted = Counted(lab.target)
    lab = replace(lab, target=cast(Target, counted))
    ((scale, artifact),) = bench.cell(lab).images.items()
    resumed = lab.store.get(artifact).images
    assert counted.images == IMAGES - sum(finished), "a finished batch was computed again"
    assert np.array_equal(resumed, bench.lab.store.get(bench.cell().images[scale]).images)


def record_verifies(bench: Bench) -> None:
    """A run writes a record from which every number can be recomputed."""
    cell = bench.cell()
    record = run(cell)
    assert verify(cell.folder)["results_sha256"] == record["results_sha256"]


CHECKS: tuple[Callable[[Bench], None], ...] = (
    describes_itself,
    prepares_without_computing,
    extracts_images,
    scale_zero_is_random,
    guidance_acts,
    shards_do_not_matter,
    resumes_after_a_kill,
    record_verifies,
)


def check_method(registry: Registry, method: Method, console: Console) -> bool:
    """Run every check on one method; False if one failed or all were skipped."""
    dataset = small_dataset(registry)
    with tempfile.TemporaryDirectory(prefix="membench-test-") as folder:
        lab = Lab(dataset, OracleTarget(dataset, 0.5), Store(Path(folder) / "results"), silent)
        return _check_all(method, CHECKS, lambda: Bench(method, lab), console)


def check_descriptor(
    registry: Registry, descriptor: Descriptor, console: Console, weights: Path | None = None
) -> bool:
    """Run every check on one descriptor; False if one failed or its weights are not there."""
    try:
        found = bench(registry, descriptor, weights)
    except MembenchError as error:
        console.print(
            f"[bold]{escape(descriptor.name)}[/] [red]FAILED[/] {escape(str(error))}",
            soft_wrap=True,
        )
        return False
    return _check_all(descriptor, DESCRIPTOR_CHECKS, lambda: found, console)


def _check_all(
    plugin: Method | Descriptor,
    checks: Sequence[Callable[[Any], None]],
    bench: Callable[[], Any],
    console: Console,
) -> bool:
    passed = failed = 0
    console.print(f"[bold]{escape(plugin.name)}[/] ({escape(plugin.origin)})", highlight=False)
    for check in checks:
        what = (inspect.getdoc(check) or check.__name__).partition("\n")[0]
        try:
            check(bench())
        except SkipCheck as reason:
            mark, note = "[yellow]skipped[/]", f" ({reason})"
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and check is not resumes_after_a_kill:
                raise
            failed += 1
            mark, note = "[red]FAILED[/] ", f"\n         {type(error).__name__}: {error}"
        else:
            passed += 1
            mark, note = "[green]passed[/] ", ""
        console.print(f"  {mark} {escape(what)}{escape(note)}", highlight=False, soft_wrap=True)
    if not passed:
        console.print("  nothing was tested: every check was skipped or failed")
    return passed > 0 and not failed


def check_plugins(registry: Registry, name: str | None, weights: Path | None = None) -> bool:
    """`membench test [NAME]`: one method or descriptor, or all of them.

    With no name, descriptors whose weights are not on this machine are passed over, and said to be.
    """
    console = Console()
    plugins: list[Method | Descriptor | Broken]
    if name is not None:
        plugins = [registry.plugin(name)]
    else:
        plugins = [*registry.all_methods(), *registry.all_descriptors()]
    good = bool(plugins)
    for plugin in plugins:
        if isinstance(plugin, Broken):
            console.print(f"[red]BROKEN[/]  {escape(plugin.name)}: {escape(plugin.reason)}")
            good = False
        elif isinstance(plugin, Method):
            good &= check_method(registry, plugin, console)
        elif name is not None or _has_weights(plugin, weights, console):
            good &= check_descriptor(registry, plugin, console, weights)
    return good


def _has_weights(plugin: Descriptor, weights: Path | None, console: Console) -> bool:
    if plugin.weights is None or weights is not None:
        return True
    try:
        checked(plugin.name, plugin.weights, None)
    except MembenchError as error:
        line = f"[bold]{escape(plugin.name)}[/] [yellow]skipped[/] ({escape(str(error))})"
        console.print(line, soft_wrap=True)
        return False
    return True
