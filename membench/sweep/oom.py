"""Whether the kernel has killed processes of this control group for their memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def oom_kills() -> int:
    """How many processes the kernel has killed there for their memory; 0 where it does not tell."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":  # cgroup v1
            path = Path(f"/sys/fs/cgroup/memory{place}/memory.oom_control")
        elif not controllers:
            path = Path(f"/sys/fs/cgroup{place}/memory.events")
        else:
            continue
        with suppress(OSError, ValueError, KeyError):
            return int(dict(row.split() for row in path.read_text().splitlines())["oom_kill"])
    return 0
