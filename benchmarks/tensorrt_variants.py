"""What might have TensorRT 8.6 build sooner, one change of its configuration each. Its builder
compiles a float16 network for three formats of its inputs and outputs, in each profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmforge.checkpoint.store import Checkpoint
from llmforge.engine.build import resolve_limits
from llmforge.engine.tensorrt.builder import BuildOptions
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.target import TensorRTTarget
from llmforge.engine.weights import RankWeights
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.settings import BuildSettings

Seen = list[list[int]]


def nothing(trt: Any, config: Any, seen: Seen) -> None:
    """As the target builds."""


def one_format(trt: Any, config: Any, seen: Seen) -> None:
    """Offered several formats, take float16 as it lies. `seen`: of each offer how many there were,
    and how many were taken."""

    class Selector(trt.IAlgorithmSelector):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IAlgorithmSelector.__init__(self)

        def select_algorithms(self, context: Any, choices: Sequence[Any]) -> list[int]:
            edges = context.num_inputs + context.num_outputs
            taken = plain(choices, edges, trt.DataType.HALF)
            seen.append([len(choices), len(taken)])
            return taken

        def report_algorithms(self, contexts: Any, choices: Any) -> None:
            """Nothing is kept of it."""

    _held.append(Selector())
    config.algorithm_selector = _held[-1]


_held: list[Any] = []  # selectors, which TensorRT does not keep alive


def plain(choices: Sequence[Any], edges: int, half: Any) -> list[int]:
    """The choices in which some edge is of this type and none is in groups of channels; all, where
    there is no such."""
    found = []
    for index, choice in enumerate(choices):
        infos = [choice.get_algorithm_io_info(edge) for edge in range(edges)]
        grouped = any(info.vectorized_dim != -1 for info in infos)
        if not grouped and any(info.dtype == half for info in infos):
            found.append(index)
    return found or list(range(len(choices)))


def faster_shapes(trt: Any, config: Any, seen: Seen) -> None:
    config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, True)


def older_shapes(trt: Any, config: Any, seen: Seen) -> None:
    config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)


def refit(trt: Any, config: Any, seen: Seen) -> None:
    """Weights that can be exchanged later: TensorRT then fuses less (its issue 2936)."""
    config.set_flag(trt.BuilderFlag.REFIT)


VARIANTS: dict[str, Callable[[Any, Any, Seen], None]] = {
    "nothing": nothing,
    "one-format": one_format,
    "faster-shapes": faster_shapes,
    "older-shapes": older_shapes,
    "refit": refit,
}


def build_variant(
    target_name: str, variant: str, checkpoint_directory: Path, out: Path, limits: dict[str, int]
) -> dict[str, Any]:
    """Seconds and size of a build, in this process."""
    package, seen = Package.load(target_name), list[list[int]]()
    create_config = package.create_config

    def changed(*given: Any) -> Any:
        config = create_config(*given)
        VARIANTS[variant](package.trt, config, seen)
        return config

    package.create_config = changed  # type: ignore[method-assign]
    checkpoint, topology = Checkpoint.open(checkpoint_directory), Topology(1, 1)
    settings = BuildSettings(target=target_name, **limits)  # type: ignore[arg-type]
    decided = resolve_limits(checkpoint.config, settings, print, linear_cache=True)
    target = TensorRTTarget(target_name, BuildOptions(), package)
    graph = target.prepare(trace(checkpoint.config, topology, 0))
    out.mkdir()
    started = time.perf_counter()
    done = target.compile(graph, RankWeights(checkpoint, topology, 0), decided, out)
    return {
        "build_s": time.perf_counter() - started,
        "engine_bytes": sum(size for size, _ in done.values()),
        "offers": seen,
    }
