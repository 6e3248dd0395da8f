"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import llmforge

_PACKAGES = ("numpy", "torch", "tokenizers", "mpi4py", "tensorrt")


def environment() -> dict[str, Any]:
    """Hardware and versions, as plain values for JSON; None for what cannot be found out.

    cpu: model name; cores: that this process may use; memory_bytes: of the machine; gpus: names.
    Does not import torch and starts no process.
    """
    return {
        "cpu": _first_match(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$")
        or platform.processor()
        or platform.machine(),
        "cores": _cores(),
        "memory_bytes": _memory(),
        "gpus": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "llmforge": llmforge.__version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    kilobytes = _first_match(Path("/proc/meminfo"), r"^MemTotal:\s*(\d+) kB$")
    return None if kilobytes is None else int(kilobytes) * 1024


def _gpus() -> list[str]:
    """Names from the NVIDIA driver; from torch where it is loaded and uses CUDA already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [name for file in files if (name := _first_match(file, r"^Model:\s*(.+)$"))]


def _first_match(path: Path, pattern: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
