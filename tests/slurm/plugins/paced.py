"""Random at a set pace, and a tally of every batch: what the tests of faults run.

Environment: MEMBENCH_TALLY, a file that gets a line when a batch begins and when it ends;
MEMBENCH_PACE, seconds a batch takes at least; MEMBENCH_BREAK, the first image of a batch that fails
at every try; MEMBENCH_BREAK_SEED, the run's seed for which it does.
"""

import fcntl
import json
import os
import time
from typing import Any

from membench.lab import Lab, Surrogate
from membench.plugins import extraction


def note(event: str, target: str, seed: int, first: int) -> None:
    """Append one line, whole, whoever else does."""
    line = {"event": event, "target": target, "seed": seed, "first": first}
    line |= {"at": time.time(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    with open(os.environ["MEMBENCH_TALLY"], "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(line) + "\n")


def paced_sample(self: Lab, rows: range, *arguments: Any) -> Any:
    seed, began = arguments[4], time.monotonic()
    note("begin", self.target.name, seed, rows.start)
    broken = os.environ.get("MEMBENCH_BREAK") == str(rows.start)
    if broken and os.environ.get("MEMBENCH_BREAK_SEED") == str(seed):
        raise ValueError("this batch always fails")
    result = sample(self, rows, *arguments)
    time.sleep(max(0.0, float(os.environ["MEMBENCH_PACE"]) + began - time.monotonic()))
    note("end", self.target.name, seed, rows.start)
    return result


if "MEMBENCH_TALLY" in os.environ and Lab.sample is not paced_sample:
    sample = Lab.sample
    Lab.sample = paced_sample  # type: ignore[method-assign]


@extraction(title="Paced", paper="none; plain sampling, watched")
def paced(lab: Lab) -> Surrogate | None:
    """Plain samples of the target."""
    return None
