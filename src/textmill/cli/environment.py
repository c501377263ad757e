"""What this program runs on, as lines for a bug report (`--env`). Names no host, user or key."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from textmill import __version__

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "grpcio", "starlette", "uvicorn")


def lines() -> list[str]:
    found = [
        f"textmill: {__version__}",
        f"python: {sys.version.split()[0]}",
        f"system: {platform.system()} {platform.release()} {platform.machine()}",
        f"cpu: {cpu_name()} ({len(os.sched_getaffinity(0))} usable)",
        f"cpu features: {' '.join(cpu_features()) or 'unknown'}",
    ]
    return found + [f"{name}: {version(name)}" for name in PACKAGES]


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo, or nothing."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        return ""
    return ""


def cpu_name() -> str:
    return cpu_field("model name") or platform.machine()


def cpu_features() -> list[str]:
    """Those that the kernels choose by."""
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8")
    present = set(cpu_field("flags").split())
    return [name for name in wanted if name in present]
