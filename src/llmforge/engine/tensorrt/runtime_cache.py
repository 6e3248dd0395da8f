"""What tensorrt_rtx compiles for this GPU when an engine is loaded, kept from run to run.

Its engines are compiled to the end on the GPU that runs them, shape by shape. Decode calls have a
few shapes and are recorded in CUDA graphs, so their kernels are made for just these shapes before
that; prefill calls come in any length and use kernels for all of them.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from llmforge.engine.tensorrt.cache_file import cache_path
from llmforge.engine.tensorrt.io import DECODE
from llmforge.engine.tensorrt.package import Package
from llmforge.replacing import replace_file


def runtime_cache_path(package: Package, gpu: str) -> Path:
    """Where what was compiled for this kind of GPU is kept."""
    kind = re.sub(r"\W+", "-", gpu)
    return cache_path("runtime", f"{package.name}-{package.version}-{kind}")


class RuntimeCache:
    """One cache for all contexts of a rank, in a file. What cannot be read counts as empty, and
    a file that cannot be written is left out: only time is lost."""

    def __init__(self, package: Package, path: Path) -> None:
        self._package, self._path = package, path
        self._cache: Any = None
        self._read = b""

    def config(self, engine: Any, profile: int) -> Any:
        """The configuration of a context of the engine for calls of this profile."""
        trt = self._package.trt
        config = engine.create_runtime_config()
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._read = self._path.read_bytes()
            if self._read and not self._cache.deserialize(self._read):
                self._package.messages.errors.clear()  # of another driver, or damaged
        config.set_runtime_cache(self._cache)
        specialise = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            specialise.EAGER if profile == DECODE else specialise.NONE
        )
        return config

    def store(self) -> None:
        """Write the file anew where there is more to keep than was read."""
        blob = b"" if self._cache is None else bytes(self._cache.serialize())
        if not blob or blob == self._read:
            return
        with contextlib.suppress(OSError):
            replace_file(self._path, blob)
