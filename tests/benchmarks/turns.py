"""Contenders of a benchmark take turns, so that other load on the machine hits all alike.

    def test_search(benchmark):
        found = take_turns(
            benchmark,
            "50 nearest of 50,000 images for 2,000 queries",
            lambda: nearest(queries, reference, 50),
            {"faiss.IndexFlatL2": lambda: index.search(queries, 50)},
        )
        assert_same(*found.values())

In each round every contender runs once; the ratio of a round is the peer's seconds over ours, above
1 where ours is faster. What was measured lands in `benchmark.extra_info`, which `report.py` reads:

    what      what was done, for people
    clock     "CPU" (of all threads of this process) or "wall"
    threads   that contenders could use: torch's, which follow OMP_NUM_THREADS
    load      average of the last minute when it began
    seconds   {contender: [of each round]}, "ours" among them
    ratios    {peer: {"median", "lower", "upper"}}, of the rounds; lower and upper quartile
    more      {way: ratios} of further ways of ours against the same peers
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

OURS = "ours"
CLOCKS = {"CPU": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Timed:
    """What a contender returns that took its own time, say in another process."""

    seconds: float
    value: Any


def take_turns(
    benchmark: Any,
    what: str,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    *,
    more: Mapping[str, Callable[[], Any]] | None = None,
    rounds: int = 5,
    clock: Literal["CPU", "wall"] = "CPU",
    threads: int | None = None,
) -> dict[str, Any]:
    """Runs all contenders once to warm up, then `rounds` times; what each returned last.

    more: further ways of ours, such as with something prepared, which take turns as well.
    threads: that contenders may use, if torch does not know better. A contender that returns
    `Timed` is taken at its word. With `--benchmark-disable` each runs once, and there are no
    ratios.
    """
    import torch

    load = os.getloadavg()[0]
    more = more or {}
    contenders = {OURS: ours, **more, **peers}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}

    def turn(name: str) -> None:
        started = CLOCKS[clock]()
        value = contenders[name]()
        took = CLOCKS[clock]() - started
        if isinstance(value, Timed):
            took, value = value.seconds, value.value
        seconds[name].append(took)
        found[name] = value

    def others() -> None:
        for name in (*more, *peers):
            turn(name)

    benchmark.pedantic(lambda: turn(OURS), setup=others, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return found
    seconds = {name: times[1:] for name, times in seconds.items()}  # without the warm-up
    benchmark.extra_info |= {
        "what": what,
        "clock": clock,
        "threads": threads or torch.get_num_threads(),
        "load": load,
        "seconds": seconds,
        "ratios": {name: ratio(seconds[name], seconds[OURS]) for name in peers},
        "more": {way: {name: ratio(seconds[name], seconds[way]) for name in peers} for way in more},
    }
    print(f"\n{what}: {benchmark.extra_info['ratios']}")
    for way, ratios in benchmark.extra_info["more"].items():
        print(f"{way}: {ratios}")
    return found


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios, theirs / ours."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    if len(ratios) == 1:
        return dict.fromkeys(("median", "lower", "upper"), ratios[0])
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}
