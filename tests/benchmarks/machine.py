"""What numbers of speed depend on: the processor, memory and packages; no name of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("membench", "torch", "numpy", "faiss-cpu", "numba", "scikit-learn", "diffusers")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""Of the processor, those that decide how quick a matrix product is."""


def added() -> dict[str, Any]:
    """What pytest-benchmark's description of a machine lacks: cores, memory, versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "versions": dict(filter(None, map(_version, PACKAGES))),
    }


def here() -> dict[str, Any]:
    """This machine as a saved benchmark describes it."""
    import cpuinfo  # comes with pytest-benchmark

    return {
        "cpu": cpuinfo.get_cpu_info(),
        "python_version": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    } | added()


def described(info: Mapping[str, Any]) -> dict[str, str]:
    """A saved benchmark's `machine_info` in words."""
    cpu = info["cpu"]
    flags = [flag for flag in FLAGS if flag in cpu.get("flags", ())]
    versions = {"Python": info["python_version"], **info["versions"]}
    return {
        "processor": cpu["brand_raw"],
        "cores": str(info["cores"]),
        "memory": f"{info['memory_bytes'] / 2**30:.0f} GiB",
        "instructions": ", ".join(flags) or "none of " + ", ".join(FLAGS),
        "system": f"{info['system']}, {info['machine']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def lines(info: Mapping[str, Any]) -> list[str]:
    """The same as items of a Markdown list."""
    return [f"- {name}: {value}" for name, value in described(info).items()]


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None
