"""CUDA C++ source → cubin or PTX through NVRTC, on any machine: no GPU and no toolkit are needed.

Results are kept in a cache directory, by a hash of everything that they depend on: the source with
what it includes, the definitions, the architecture and the compiler's version.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llmforge.errors import BuildError
from llmforge.replacing import replace_file

DEFAULT_CACHE = Path("~/.cache/llmforge/kernels")
_INCLUDE = re.compile(rb'^#include "([a-z_]+\.cuh)"', re.MULTILINE)
# Kernels with instructions that no later GPU has: what they are compiled for instead.
_EXACT = {
    ("wide_gemm.cu", "sm_90"): "sm_90a",
    ("wide_attention.cu", "sm_90"): "sm_90a",
}
_COMMENT = re.compile(rb"//[^\n]*")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class KernelSpec:
    """A kernel: the file in csrc, the function in it, and the macros that specialise it."""

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...]

    @property
    def key(self) -> str:
        """A file name for it: readable, and different for different kernels. So it is for different
        code (comments aside): an engine's kernel is found by it, and must take the arguments that
        are passed today."""
        text = repr((self.source, self.entry, self.defines, _code(self.source)))
        return f"{self.entry}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class CompileError(BuildError):
    """The compiler refused a kernel; `log` is all that it said."""

    def __init__(self, spec: KernelSpec, arch: str, log: str) -> None:
        first = next((line for line in log.splitlines() if "error" in line), "no message")
        super().__init__(f"kernel {spec.entry} does not compile for {arch}: {first.strip()}")
        self.log = log


@dataclass(frozen=True)
class Compiled:
    """`image`: a cubin, or PTX text. `log`: the compiler's report on registers and spills."""

    image: bytes
    log: str

    @property
    def spill_bytes(self) -> int:
        """Bytes of registers spilled to memory. The report has them for cubins only."""
        return sum(int(a) + int(b) for a, b in _SPILLS.findall(self.log))


def unavailable() -> str | None:
    """Why kernels cannot be compiled here, in a line, or None."""
    if importlib.util.find_spec("cuda") is None or not _has("cuda.bindings"):
        return "package cuda-bindings is not installed; run: pip install 'llmforge[cuda]'"
    try:
        compiler_version()
    except (RuntimeError, ImportError) as error:
        return f"NVRTC cannot be loaded ({_line(error)}); run: pip install nvidia-cuda-nvrtc"
    if not _include_directories():
        return "the CUDA headers are not installed; run: pip install nvidia-cuda-runtime"
    return None


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def compiler_version() -> str:
    """NVRTC's version, "13.0". Raises RuntimeError where the library cannot be loaded."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"nvrtcVersion failed: {status.name}")
    return f"{major}.{minor}"


def supported_archs() -> tuple[str, ...]:
    """What the compiler can make cubins for: "sm_80", "sm_90", ..."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, archs = nvrtc.nvrtcGetSupportedArchs()
    return tuple(f"sm_{arch}" for arch in archs[:count])


def arch_number(arch: str) -> int:
    """90 for "sm_90", "sm_90a" and "compute_90"."""
    return int(re.sub("[^0-9]", "", arch))


def compile_kernel(spec: KernelSpec, arch: str, cache: Path | None = None) -> Compiled:
    """The kernel for `arch`: "sm_90" gives a cubin, "compute_80" PTX that the driver of any later
    GPU compiles when it is loaded. `cache`: a directory to keep results in, as far as it can be
    written; None: keep nothing. Raises CompileError.
    """
    if cache is None:
        return _compile(spec, arch)
    path = cache.expanduser() / _digest(spec, arch)
    image, log = path.with_suffix(".image"), path.with_suffix(".log")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        except OSError:
            return _compile(spec, arch)
        if image.exists() and log.exists():
            return Compiled(image.read_bytes(), log.read_text())
        compiled = _compile(spec, arch)
        with contextlib.suppress(OSError):
            replace_file(log, compiled.log.encode())
            replace_file(image, compiled.image)
        return compiled


def _digest(spec: KernelSpec, arch: str) -> str:
    digest = hashlib.sha256(f"{compiler_version()} {arch} {_options(spec)!r}".encode())
    for name, text in sorted(source_texts(spec.source).items()):
        digest.update(f"\0{name}\0".encode() + text)
    return digest.hexdigest()


@functools.cache
def _code(name: str) -> str:
    """A digest of a file in csrc and of those that it includes, as the compiler sees them."""
    digest = hashlib.sha256()
    for text in source_texts(name).values():
        digest.update(b"\0" + b" ".join(_COMMENT.sub(b"", text).split()))
    return digest.hexdigest()


def source_texts(name: str) -> dict[str, bytes]:
    """The text of a file in csrc and of those that it includes, by name."""
    text = (resources.files("llmforge.kernels") / "csrc" / name).read_bytes()
    found = {name: text}
    for included in _INCLUDE.findall(text):
        found.update(source_texts(included.decode()))
    return found


def _options(spec: KernelSpec) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in spec.defines]
    return ["--std=c++17", "--ptxas-options=-v", "-DNDEBUG", *macros]


@functools.cache
def _include_directories() -> tuple[str, ...]:
    """Where cuda_bf16.h and cuda_fp16.h are."""
    roots: list[str] = []
    for package in ("nvidia.cu13", "nvidia.cuda_runtime"):
        if _has(package):
            spec = importlib.util.find_spec(package)
            roots.extend(spec.submodule_search_locations or () if spec else ())
    roots.append("/usr/local/cuda")
    found = [f"{root}/include" for root in roots if Path(root, "include/cuda_bf16.h").is_file()]
    return tuple(found[:1])


def _compile(spec: KernelSpec, arch: str) -> Compiled:
    from cuda.bindings import nvrtc

    sources = source_texts(spec.source)
    text = sources.pop(spec.source)
    headers = [name.encode() for name in sources]
    status, program = nvrtc.nvrtcCreateProgram(
        text, spec.source.encode(), len(headers), list(sources.values()), headers
    )
    assert int(status) == 0, status
    try:
        exact = _EXACT.get((spec.source, arch), arch)
        options = [f"--gpu-architecture={exact}", *_options(spec)]
        options += [f"-I{directory}" for directory in _include_directories()]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = _fetch(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        report = log.rstrip(b"\0").decode(errors="replace")
        if int(status) != 0:
            raise CompileError(spec, arch, report)
        if arch.startswith("compute_"):
            return Compiled(_fetch(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), report)
        return Compiled(_fetch(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), report)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetch(program: object, size_of: object, read: object) -> bytes:
    status, size = size_of(program)  # type: ignore[operator]
    assert int(status) == 0, status
    buffer = bytearray(size)
    (status,) = read(program, buffer)  # type: ignore[operator]
    assert int(status) == 0, status
    return bytes(buffer)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time compiles what `path` stands for; the others wait and find it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
