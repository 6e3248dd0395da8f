"""The tensorrt and tensorrt-rtx targets: compiling lowers the rank's graph to TensorRT networks and
builds them; loading needs a GPU.

A rank's directory: graph.json, plan.json (RankPlan), an engine a segment, and kernels/, ours that
run beside them. tensorrt-rtx builds on a machine without a GPU, for several kinds of GPU at once;
tensorrt builds on the kind of GPU that will run the engine.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmforge.comm import Comm, local_ranks
from llmforge.engine.memory import MemoryPlan, largest_step, nbytes, plan_memory
from llmforge.engine.step import Limits
from llmforge.engine.store import GRAPH_FILE
from llmforge.engine.target import Checksums, Executable, Weights
from llmforge.engine.tensorrt import package as packages
from llmforge.engine.tensorrt.builder import BuildOptions, build_engine, timing_cache_path
from llmforge.engine.tensorrt.io import DECODE, PREFILL, profiles
from llmforge.engine.tensorrt.lowering.rank import Engine, RankLowering, model_dtype
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import KERNELS, PLAN_FILE, RankPlan
from llmforge.engine.tensorrt.segments import ATTENTION
from llmforge.engine.tensorrt.weight_file import WEIGHTS_FILE, WeightFile
from llmforge.engine.tensorrt.written_file import WrittenFile
from llmforge.errors import BuildError, SettingsError, TargetError
from llmforge.kernels import compile as compiler
from llmforge.kernels.images import ARCHS, PTX_ARCH, Index, write_images
from llmforge.model.graph import Graph
from llmforge.parallel import Topology
from llmforge.replacing import may_write
from llmforge.settings import BuildSettings

_INDEX_LIMIT = 2**31 - 1  # elements of a tensor that TensorRT can index
# The memory that building takes: so many times the weights (TensorRT's copy and what it makes of
# it; where the engine is not written as a stream, all of that too; where weights stay apart, hardly
# more than them), and the package itself.
# Measured: benchmarks/results/tensorrt_build.json.
_PEAK_STREAMED, _PEAK_WHOLE, _PEAK_APART, _PEAK_FIXED = 2.0, 3.2, 1.2, 8 * 10**8


class TensorRTTarget:
    """A TensorRT package as a target. `package`: to use instead of the installed one."""

    linear_cache = True
    compiles_apart = True
    needs_gpu = True

    def __init__(
        self, name: str, options: BuildOptions | None = None, package: Package | None = None
    ) -> None:
        self.name = name
        self._options = options or BuildOptions()
        self._given = package

    def available(self) -> str | None:
        """Quick: the package is looked for, not imported."""
        if self._given is None and (reason := packages.unavailable(self.name)):
            return reason
        return compiler.unavailable()

    def configured(self, settings: BuildSettings) -> TensorRTTarget:
        """Raises TargetError where the package builds only on a GPU and there is none."""
        package = self._package()
        package.check_archs(settings.arch)
        if not package.known_archs():
            _gpu_name()
        cache = settings.timing_cache
        if cache and not package.features.timing_cache:
            raise SettingsError(
                f"{package.name} {package.version} has no timing cache that works; "
                "leave out --timing-cache"
            )
        if cache and not may_write(Path(cache)):
            raise SettingsError(
                f"the timing cache {cache} cannot be written; name a file in a directory that you "
                "may write"
            )
        options = BuildOptions(
            archs=settings.arch or _default_archs(package),
            workspace_gb=settings.workspace_gb,
            optimization_level=settings.optimization_level,
            primitives=settings.primitives,
            weights_apart=settings.weights_apart,
            timing_cache=Path(cache) if cache else timing_cache_path(package),
        )
        return TensorRTTarget(self.name, options, package)

    def details(self) -> dict[str, Any]:
        package, options = self._package(), self._options
        level = options.optimization_level
        runs_on = ", ".join(options.archs) or "the kind of GPU that it was built on"
        return {
            "package": package.name,
            "version": package.version,
            "archs": list(options.archs),
            "layers": "primitives" if self._primitives(package) else "native",
            "optimization_level": package.default_optimization_level() if level is None else level,
            "workspace_gb": options.workspace_gb,
            "weights": "apart" if options.weights_apart else "in the engines",
            "needs": f"{package.name} {package.version} and an NVIDIA GPU: {runs_on}",
        }

    def prepare(self, graph: Graph) -> Graph:
        """As it is traced: TensorRT makes its own choice of what to merge and fuse, and weights
        that are not merged can be mapped instead of copied."""
        self._package().dtype(model_dtype(graph))
        return graph

    def memory(self, graph: Graph, limits: Limits) -> MemoryPlan:
        """Activations are an estimate, of the largest call: TensorRT decides what it keeps."""
        sizes = largest_step(limits)
        scores = _score_elements(graph, limits)
        if scores > _INDEX_LIMIT and self._primitives(self._package()):
            raise BuildError(
                f"attention scores of the largest step are {scores:,} elements, and TensorRT can "
                f"index {_INDEX_LIMIT:,}; build with smaller --max-num-tokens or --max-seq-len"
            )
        largest = profiles(limits)
        tokens = max(largest[kind].B[2] * largest[kind].S[2] for kind in (PREFILL, DECODE))
        call = dataclasses.replace(limits, max_num_tokens=tokens)
        return MemoryPlan(
            weights=sum(nbytes(p, sizes) for p in graph.parameters),
            kv_cache=sum(nbytes(s, sizes) for s in graph.states),
            activations=plan_memory(graph, call).activations
            + (4 * scores if self._primitives(self._package()) else 0),
        )

    def compile_peak(self, plan: MemoryPlan) -> int:
        streamed = self._package().features.stream_writer
        times = _PEAK_STREAMED if streamed else _PEAK_WHOLE
        if self._options.weights_apart:
            times = _PEAK_APART
        return int(times * plan.weights) + _PEAK_FIXED

    def compile(self, graph: Graph, weights: Weights, limits: Limits, out: Path) -> Checksums:
        package, options = self._package(), self._options
        (out / GRAPH_FILE).write_text(graph.to_json())

        def lowering(apart: WeightFile | None) -> RankLowering:
            only = options.primitives
            return RankLowering(graph, limits, weights, package, primitives=only, apart=apart)

        if not options.weights_apart:
            return self._built(lowering(None), out)
        with WrittenFile(out / WEIGHTS_FILE) as file:
            checksums = self._built(lowering(WeightFile(file)), out)
            return {**checksums, WEIGHTS_FILE: file.finish()}

    def _built(self, lowering: RankLowering, out: Path) -> Checksums:
        """Build the rank's engines, and write its plan and kernels."""
        package, options, weights = self._package(), self._options, lowering.weights
        checksums: dict[str, tuple[int, str]] = {}
        count = lowering.num_engines

        def build(engine: Engine) -> None:
            """Several at a time only where there is no progress monitor to share."""
            file = engine.step.file
            checksums[file] = build_engine(
                package,
                engine,
                profiles(lowering.limits),
                options,
                model_dtype(lowering.graph),
                out / file,
                weights,
                lambda share: weights.report((len(checksums) + share) / count),
            )
            weights.report(len(checksums) / count)

        if package.features.layers_per_engine is None:
            for engine in lowering.engines():
                build(engine)
        else:
            with ThreadPoolExecutor(min(count, len(os.sched_getaffinity(0)))) as pool:
                list(pool.map(build, lowering.engines()))
        plan = lowering.plan(options.archs, "" if options.archs else _gpu_name())
        plan = dataclasses.replace(plan, kernels=_write_kernels(plan, out))
        (out / PLAN_FILE).write_text(plan.to_json())
        return checksums

    def load(self, directory: Path, topology: Topology, limits: Limits, comm: Comm) -> Executable:
        from llmforge.engine.tensorrt.device import CudaDevice, count_gpus
        from llmforge.engine.tensorrt.executable import TensorRTExecutable

        package, device = self._package(), CudaDevice(local_ranks(comm)[0] % count_gpus())
        return TensorRTExecutable(directory, topology, limits, comm, package, device)

    def _package(self) -> Package:
        if self._given is None:
            self._given = Package.load(self.name)
        return self._given

    def _primitives(self, package: Package) -> bool:
        return self._options.primitives or not package.features.cache_update


class TensorRTRTXTarget(TensorRTTarget):
    """For the registry: the package tensorrt_rtx."""

    def __init__(self) -> None:
        super().__init__("tensorrt-rtx")


class StandardTensorRTTarget(TensorRTTarget):
    """For the registry: the package tensorrt."""

    def __init__(self) -> None:
        super().__init__("tensorrt")


def _score_elements(graph: Graph, limits: Limits) -> int:
    """The elements of the largest call's attention scores, over all heads."""
    heads = max(
        (
            int(graph.tensors[node.inputs[0]].shape[-1]) // _query_size(graph, node.inputs)
            for node in graph.nodes
            if node.op in ATTENTION
        ),
        default=0,
    )
    calls = profiles(limits)
    return max(heads * p.B[2] * p.S[2] * (limits.block_size + p.S[2]) for p in calls)


def _query_size(graph: Graph, inputs: tuple[str, ...]) -> int:
    """The features of a head's query: of the cache's entries, or of the latent part of them."""
    latent = graph.tensors[inputs[2]].shape[-1]
    cached = next(graph.tensors[name] for name in inputs if name in {s.name for s in graph.states})
    size, kv_heads = int(cached.shape[3]), int(cached.shape[2])
    return size if kv_heads * size == latent else int(latent)


def _default_archs(package: Package) -> tuple[str, ...]:
    """This machine's GPU, if the package can build for it, else all that it builds for by
    itself."""
    known = package.known_archs()
    try:
        local = _gpu_arch() if known else ""
    except TargetError:
        local = ""
    return (local,) if local in known else package.default_archs()


def _gpu_arch() -> str:
    """The architecture of this machine's first GPU. Raises TargetError where there is none."""
    from llmforge.engine.tensorrt.device import CudaDevice

    device = CudaDevice()
    try:
        major, minor = device.capability
        return f"sm_{major}{minor}"
    finally:
        device.close()


def _gpu_name() -> str:
    """The kind of this machine's first GPU. Raises TargetError where there is none."""
    from llmforge.engine.tensorrt.device import CudaDevice

    device = CudaDevice()
    try:
        return device.description
    finally:
        device.close()


def _write_kernels(plan: RankPlan, out: Path) -> Index:
    from llmforge.engine.tensorrt.kernels import engine_kernels

    specs = engine_kernels(plan)
    wanted = dict.fromkeys((*(plan.archs or ARCHS), PTX_ARCH))
    return write_images({a: specs for a in wanted}, out / KERNELS, compiler.DEFAULT_CACHE)
