"""What an engine directory holds besides weights: the graph, and the kernels for this GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from llmforge.engine.cuda.target import KERNELS, PLAN_FILE, PTX_ARCH, image_name
from llmforge.errors import StoreError
from llmforge.kernels.compile import arch_number
from llmforge.kernels.driver import Module
from llmforge.model.graph import Graph


def read_graph(path: Path) -> Graph:
    try:
        return Graph.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is corrupt ({error}); build the engine again with: llmforge build"
        ) from error


def load_modules(directory: Path, device: torch.device) -> tuple[dict[str, Module], str]:
    """The engine's kernels for this GPU, by key, and the architecture that they are for."""
    torch.zeros(1, device=device)  # makes the context that modules are loaded into
    try:
        kernels = json.loads((directory / PLAN_FILE).read_text())["kernels"]
        arch = best_arch(list(kernels), torch.cuda.get_device_capability(device))
        images = directory / KERNELS
        return {
            key: Module((images / image_name(key, arch)).read_bytes(), entry)
            for key, entry in kernels[arch].items()
        }, arch
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{directory / PLAN_FILE} or a kernel beside it is corrupt ({error}); "
            "build the engine again with: llmforge build"
        ) from error


def best_arch(archs: Sequence[str], capability: tuple[int, int]) -> str:
    """Of an engine's architectures, the best for a GPU of this capability: cubins run on GPUs of
    the same major and the same or a later minor version; PTX on any later one."""
    major, minor = capability
    fitting = [
        arch
        for arch in archs
        if arch.startswith("sm_")
        and arch_number(arch) // 10 == major
        and (arch_number(arch) % 10 < minor + (arch[-1] != "a"))
        and (arch[-1] != "a" or arch_number(arch) % 10 == minor)
    ]
    return max(fitting, key=lambda arch: (arch_number(arch), arch)) if fitting else PTX_ARCH
