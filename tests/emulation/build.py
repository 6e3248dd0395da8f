"""CUDA C++ → a shared library that emulates a kernel on this processor, by g++."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmforge.kernels.compile import KernelSpec, locked, source_texts

INCLUDE = Path(__file__).with_name("include")
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-fwrapv", "-w",
    "-ftrivial-auto-var-init=pattern",  # what a thread reads before it has written it is wild
)  # fmt: skip

# What C++ for this processor has no place for, and what stands in for it.
_REPLACED = (
    (re.compile(r"#include <cuda_\w+\.h>"), ""),
    (re.compile(r'extern "C" __global__'), "__global__"),
    (
        re.compile(r"extern __shared__ (?:(?:__align__|alignas)\(\d+\) )?(\w+) (\w+)\[\];"),
        r"\1* const \2 = (\1*)emulation::dynamic_shared;",
    ),
)


@functools.cache
def unavailable() -> str | None:
    """Why no kernel can be emulated here, in a line, or None."""
    if platform.machine() != "x86_64":
        return f"the emulation of kernels is for x86-64, not {platform.machine()}"
    if shutil.which("g++") is None:
        return "the emulation of kernels needs g++"
    if int(_version().split(".")[0]) < 12:
        return f"the emulation of kernels needs g++ 12 or later, not {_version()}"
    return None


@functools.cache
def _version() -> str:
    done = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def library(spec: KernelSpec, arch: str = "sm_90", text: str | None = None) -> Path:
    """The library of a kernel, compiled now or earlier. `text`: its source, where that is not in
    csrc; it includes common.cuh. Raises RuntimeError with what g++ says."""
    sources = source_texts(spec.source if text is None else "common.cuh")
    if text is not None:
        sources[spec.source] = text.encode()
    texts = {name: _adapted(text.decode()) for name, text in sources.items()}
    for own in ("ptx.cuh", "wgmma.cuh", "wgmma_values.cuh"):  # the emulation has its own
        texts.pop(own, None)
    texts["kernel.cpp"] = _wrapper(spec, int(arch.removeprefix("sm_")))
    digest = hashlib.sha256(f"{_version()} {FLAGS}".encode())
    for name, text in sorted(texts.items()):
        digest.update(f"\0{name}\0{text}".encode())
    for path in sorted(INCLUDE.iterdir()):
        digest.update(path.read_bytes())
    root = Path(tempfile.gettempdir()) / f"llmforge-emulation-{os.getuid()}"
    folder = root / f"{spec.entry}-{digest.hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "kernel.so"
    with locked(folder / "lock"):
        if not made.exists():
            for name, text in texts.items():
                (folder / name).write_text(text)
            _compile(folder, spec)
    return made


def libraries(specs: list[KernelSpec], arch: str = "sm_90") -> dict[str, Path]:
    """The same of several, by key, compiled side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda spec: library(spec, arch), specs)
        return {spec.key: path for spec, path in zip(specs, made, strict=True)}


def _adapted(text: str) -> str:
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    return text


def _wrapper(spec: KernelSpec, arch: int) -> str:
    defines = "".join(f"#define {name} {value}\n" for name, value in spec.defines)
    return f"""#include "emulation.h"
#define __CUDA_ARCH__ {arch}0
{defines}
namespace {{
#include "{spec.source}"
}}
extern "C" void emulated_hide(const emulation::Range* ranges, size_t count, char* copy) {{
    emulation::ranges = ranges, emulation::range_count = count, emulation::hidden_copy = copy;
}}
extern "C" const char* emulated_launch(void** arguments, const unsigned* grid, unsigned threads,
                                       size_t shared_bytes, char* stacks, uint64_t seed) {{
    return emulation::guarded([&] {{
        emulation::run_grid([](void** a) {{ emulation::call({spec.entry}, a); }}, arguments, grid,
                            threads, shared_bytes, stacks, seed);
    }});
}}
"""


def _compile(folder: Path, spec: KernelSpec) -> None:
    unfinished = folder / f"{os.getpid()}.so"
    command = ["g++", *FLAGS, f"-I{INCLUDE}", "-o", str(unfinished), str(folder / "kernel.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernel {spec.entry} cannot be emulated: {done.stderr[:4000]}")
    unfinished.rename(folder / "kernel.so")
