"""An engine's compiled kernels on disk: a cubin a kernel and architecture, and PTX for GPUs that
none of the architectures fits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llmforge import __version__
from llmforge.errors import BuildError, StoreError
from llmforge.kernels.compile import KernelSpec, arch_number, compile_kernel, supported_archs

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
PTX_ARCH = "compute_80"

M = TypeVar("M")

# For each architecture, the function of every kernel by the kernel's key.
Index = Mapping[str, Mapping[str, str]]


def write_images(
    kernels: Mapping[str, Sequence[KernelSpec]], directory: Path, cache: Path | None
) -> Index:
    """Compile each architecture's kernels into the new `directory`. Raises CompileError."""
    directory.mkdir()
    jobs = [(spec, arch) for arch, specs in kernels.items() for spec in specs]

    def compile_one(job: tuple[KernelSpec, str]) -> None:
        spec, arch = job
        compiled = compile_kernel(spec, arch, cache)
        (directory / image_name(spec.key, arch)).write_bytes(compiled.image)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, jobs))
    return {arch: {spec.key: spec.entry for spec in specs} for arch, specs in kernels.items()}


def read_images(
    index: Mapping[str, Mapping[str, str]], directory: Path, capability: tuple[int, int]
) -> tuple[dict[str, tuple[bytes, str]], str]:
    """(image, function) of each kernel by key for a GPU of this capability, and the architecture
    that they are for."""
    arch = best_arch(list(index), capability)
    images = {
        key: ((directory / image_name(key, arch)).read_bytes(), entry)
        for key, entry in index[arch].items()
    }
    return images, arch


def of_engine(loaded: Mapping[str, M], spec: KernelSpec) -> M:
    """Of an engine's kernels by key, the one that is to be launched. Raises StoreError where there
    is none: today's code is not what the engine was built with."""
    if (found := loaded.get(spec.key)) is None:
        raise StoreError(
            "the engine was built by a llmforge with other kernels: it does not have the "
            f"{spec.entry} that llmforge {__version__} launches; build the engine again with: "
            "llmforge build"
        )
    return found


def image_name(key: str, arch: str) -> str:
    """The file of a compiled kernel."""
    return f"{key}.ptx" if arch == PTX_ARCH else f"{key}.{arch}.cubin"


def best_arch(archs: Sequence[str], capability: tuple[int, int]) -> str:
    """Of an engine's architectures, the best for a GPU of this capability: cubins run on GPUs of
    the same major and the same or a later minor version, those of an architecture like
    "sm_90a" on that alone; PTX on any later one."""

    def fits(arch: str) -> bool:
        major, minor = divmod(arch_number(arch), 10)
        later = minor < capability[1] and not arch.endswith("a")
        return major == capability[0] and (minor == capability[1] or later)

    fitting = [arch for arch in archs if arch.startswith("sm_") and fits(arch)]
    return max(fitting, key=lambda arch: (arch_number(arch), arch)) if fitting else PTX_ARCH


def check_archs(archs: Sequence[str]) -> None:
    """Raises BuildError for what the compiler cannot make cubins for, or kernels are not for."""
    supported = [arch for arch in supported_archs() if arch_number(arch) >= arch_number(PTX_ARCH)]
    if unknown := [arch for arch in archs if arch.removesuffix("a") not in supported]:
        raise BuildError(
            f"the cuda target cannot build for the architecture {unknown[0]!r}; "
            f"allowed: {', '.join(supported)}"
        )
