"""An engine's kernels for this GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmforge.engine.cuda.target import KERNELS, PLAN_FILE
from llmforge.errors import StoreError
from llmforge.kernels.driver import Module
from llmforge.kernels.images import read_images


def load_modules(directory: Path, device: torch.device) -> tuple[dict[str, Module], str]:
    """The engine's kernels for this GPU, by key, and the architecture that they are for."""
    torch.zeros(1, device=device)  # makes the context that modules are loaded into
    try:
        kernels = json.loads((directory / PLAN_FILE).read_text())["kernels"]
        capability = torch.cuda.get_device_capability(device)
        images, arch = read_images(kernels, directory / KERNELS, capability)
        return {key: Module(image, entry) for key, (image, entry) in images.items()}, arch
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{directory / PLAN_FILE} or a kernel beside it is corrupt ({error}); "
            "build the engine again with: llmforge build"
        ) from error
