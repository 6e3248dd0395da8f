"""Building a rank's engines: network → serialized engine, written as it comes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.engine.target import Weights
from llmforge.engine.tensorrt.cache_file import cache_path
from llmforge.engine.tensorrt.io import Profile
from llmforge.engine.tensorrt.lowering.rank import Engine
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.written_file import WrittenFile
from llmforge.errors import BuildError
from llmforge.replacing import replace_file

_RELEASE_SECONDS = 0.1

Fraction = Callable[[float], None]
"""Called with how much of an engine is done, from 0 to 1."""


@dataclass(frozen=True)
class BuildOptions:
    """What the user chose: see BuildSettings."""

    archs: tuple[str, ...] = ()
    workspace_gb: float | None = None
    optimization_level: int | None = None
    primitives: bool = False
    timing_cache: Path | None = None
    weights_apart: bool = False


def build_engine(
    package: Package,
    engine: Engine,
    profiles: tuple[Profile, ...],
    options: BuildOptions,
    dtype: str,
    path: Path,
    weights: Weights,
    report: Fraction,
) -> tuple[int, str]:
    """Write the engine to `path`; its size and checksum. Raises BuildError where TensorRT fails or
    logs an error.

    TensorRT copies the weights, one after the other. What it has read of the mapped ones is let go
    meanwhile, or they would be in memory twice.
    """
    builder, network = engine.network.builder, engine.network.network
    config = package.create_config(
        builder, dtype, options.archs, options.workspace_gb, options.optimization_level
    )
    for profile in profiles:
        _add_profile(builder, config, engine, profile)
    monitor = _monitor(package, report)
    if monitor is not None:
        config.progress_monitor = monitor
    cache = _load_timing_cache(package, config, options.timing_cache)
    with WrittenFile(path) as file, _repeatedly(weights.release):
        built = package.build(builder, network, config, file.write)
        package.messages.check(f"{path.name} cannot be built")
        if not built:
            raise BuildError(package.messages.reason(f"{path.name} cannot be built"))
        result = file.finish()
    if cache is not None and options.timing_cache is not None:
        # Where it cannot be written only time is lost, at the next build.
        with contextlib.suppress(OSError):
            replace_file(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return result


@contextlib.contextmanager
def _repeatedly(function: Callable[[], None]) -> Iterator[None]:
    """Calls the function again and again from a thread of its own."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(_RELEASE_SECONDS):
            function()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _add_profile(builder: Any, config: Any, engine: Engine, profile: Profile) -> None:
    added = builder.create_optimization_profile()
    for name, shape in engine.shapes.items():
        if any(isinstance(size, str) for size in shape):
            added.set_shape(name, *profile.shapes(shape))
    config.add_optimization_profile(added)


def _monitor(package: Package, report: Fraction) -> Any:
    """An IProgressMonitor that reports the outermost phase's steps; None where there is none."""
    if not package.features.progress_monitor:
        return None
    trt = package.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._outermost: str | None = None
            self._steps = 1

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                if self._outermost is None:
                    self._outermost, self._steps = name, max(steps, 1)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name == self._outermost:
                    report((step + 1) / self._steps)
            return True

        def phase_finish(self, name: str) -> None:
            with self._lock:
                if name == self._outermost:
                    self._outermost = None

    return Monitor()


def timing_cache_path(package: Package) -> Path | None:
    """Where what this version measured is kept; it says itself of which GPU it is."""
    if not package.features.timing_cache:
        return None
    return cache_path("timing", f"{package.name}-{package.version}")


def _load_timing_cache(package: Package, config: Any, path: Path | None) -> Any:
    """The measurements of earlier builds, attached to the configuration. What cannot be read or
    is of another GPU counts as none."""
    if path is None or not package.features.timing_cache:
        return None
    try:
        blob = path.read_bytes()
    except OSError:
        blob = b""
    cache = config.create_timing_cache(blob)
    if not config.set_timing_cache(cache, False):
        package.messages.errors.clear()
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
