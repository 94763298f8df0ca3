"""Where the time of sampling goes: one call of the U-Net, and one gradient of guidance, by kernel.

    OMP_NUM_THREADS=1 python tests/benchmarks/sampling_profile.py [--rounds 15]

The networks of `test_sampling.py` in float32, batches of 64, on one thread. Milliseconds are
medians of calls that nobody traces; shares are the time that torch's profiler finds in each kernel
itself. Operations of convolutions are counted by torch (`FlopCounterMode`) and set against the rate
at which this machine multiplies plain float32 matrices of several sizes, in turns with the calls.

Writes profile.md into FOLDER (tests/benchmarks/results).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import machine
import torch
from test_sampling import BATCH, N_LABELS, SHAPE, classifier, network
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from membench.allocator import keep_freed_memory
from membench.diffusion.classifier import freeze
from membench.diffusion.guidance import by_autograd

HERE = Path(__file__).parent / "results"
SIZES = (512, 1024, 2048)
"""Of square float32 matrices."""
KINDS = {
    "convolutions": ("convolution", "mkldnn_conv", "conv2d", "conv"),
    "matrix products": ("mm", "bmm", "linear", "attention", "matmul"),
    "norms": ("norm",),
    "activations": ("silu", "relu", "sigmoid", "gelu", "threshold"),
    "sums and copies": ("add", "copy", "cat", "clone", "mul", "sum", "fill", "zero"),
}


class Part(NamedTuple):
    """What was seen of one call: milliseconds, shares of the kinds, operations of convolutions."""

    title: str
    ms: float
    shares: dict[str, float]
    conv_flops: int

    @property
    def conv_rate(self) -> float:
        """Operations a second while convolutions run."""
        return self.conv_flops / (self.ms / 1000 * self.shares["convolutions"])


def kind_of(kernel: str) -> str:
    """The kind of an `aten::` kernel by its name."""
    for kind, words in KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "other"


def shares(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """The part of its time that a call spends in kernels of each kind; together 1."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            call()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: spent[kind] / whole for kind in (*KINDS, "other")}


def conv_flops(call: Callable[[], object]) -> int:
    """Operations (a multiplication and an addition are two) of all convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    counted = counter.get_flop_counts()["Global"]
    return sum(flops for name, flops in counted.items() if "convolution" in str(name))


def milliseconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def products() -> dict[str, tuple[Callable[[], object], int]]:
    """Plain matrix products, and their operations."""
    pairs = {n: (torch.randn(n, n), torch.randn(n, n)) for n in SIZES}
    return {f"{n} x {n}": ((lambda a=a, b=b: a @ b), 2 * n**3) for n, (a, b) in pairs.items()}


def measure(rounds: int) -> tuple[list[Part], dict[str, float]]:
    """The parts of a step, and operations a second of each matrix product."""
    keep_freed_memory()
    unet, guide = network(), freeze(classifier())
    guide = guide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, t = torch.randn(BATCH, *SHAPE), torch.full((BATCH,), 500)
    labels = torch.arange(BATCH) % N_LABELS

    @torch.inference_mode()
    def step() -> Tensor:
        prediction: Tensor = unet(x, t, return_dict=False)[0]
        return prediction

    calls = {
        "one call of the U-Net": step,
        "one gradient of guidance": lambda: by_autograd(guide, x, t, labels),
    }
    gemms = products()
    taken: dict[str, list[float]] = {name: [] for name in (*calls, *gemms)}
    for number in range(rounds + 3):
        for name, call in (*calls.items(), *((name, gemm) for name, (gemm, _) in gemms.items())):
            spent = milliseconds(call)
            if number >= 3:
                taken[name].append(spent)
    ms = {name: statistics.median(found) for name, found in taken.items()}
    with torch.no_grad():
        forward = [conv_flops(lambda: unet(x, t)), conv_flops(lambda: guide(x, t))]
    counted = (forward[0], 2 * forward[1])  # a gradient by x goes back through each once
    parts = [
        Part(name, ms[name], shares(call, rounds), n)
        for (name, call), n in zip(calls.items(), counted, strict=True)
    ]
    return parts, {name: 1000 * n / ms[name] for name, (_, n) in gemms.items()}


def report(parts: list[Part], rates: dict[str, float], rounds: int) -> str:
    """The table, what convolutions reach, and the machine."""
    lines = [
        "# Where the time of sampling goes",
        "",
        f"The U-Net and the classifier of fashion_mini with random weights, float32, {BATCH} "
        f"images, one thread; medians of {rounds} calls.",
        "",
        *machine.lines(machine.here()),
        f"- measured: {datetime.now(UTC):%Y-%m-%d}",
        "",
        "| | ms | " + " | ".join(f"{kind}, %" for kind in parts[0].shares) + " | "
        "convolutions, 1e9 operations | a second |",
        "|---" * (len(parts[0].shares) + 4) + "|",
    ]
    for part in parts:
        cells = [f"{100 * share:.0f}" for share in part.shares.values()]
        lines.append(
            f"| {part.title} | {part.ms:.1f} | {' | '.join(cells)} | {part.conv_flops / 1e9:.2f} | "
            f"{part.conv_rate / 1e9:.0f} |"
        )
    told = ", ".join(f"{rate / 1e9:.0f} ({name})" for name, rate in rates.items())
    reached = 100 * parts[0].conv_rate / max(rates.values())
    lines += [
        "",
        f"Plain float32 matrix products, 1e9 operations a second: {told}. The U-Net's convolutions "
        f"reach {reached:.0f} % of the best.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = report(*measure(asked.rounds), asked.rounds)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "profile.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
