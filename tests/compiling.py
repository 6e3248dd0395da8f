"""Kernels compiled side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from llmforge.kernels.compile import Compiled, KernelSpec, compile_kernel


def compile_all(specs: Iterable[KernelSpec], arch: str) -> list[Compiled]:
    """What each gives for `arch`, in order."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda spec: compile_kernel(spec, arch), specs))
