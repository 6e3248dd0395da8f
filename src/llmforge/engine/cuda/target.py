"""The cuda target: compiling lowers the graph, compiles its kernels and writes the rank's weights;
loading needs a GPU.

A rank's directory: graph.json, weights.safetensors, plan.json (the kernels: file names by key) and
kernels/ (a cubin a kernel and architecture, and PTX for architectures that have none).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmforge.comm import Comm
from llmforge.engine.cuda.lowering import COLLECTIVES, lower
from llmforge.engine.cuda.program import Links, Program, StepShape
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.step_ends import deliver_launch, fetch_launch, sampling_launch
from llmforge.engine.memory import MemoryPlan, largest_step, nbytes
from llmforge.engine.step import Limits
from llmforge.engine.store import GRAPH_FILE
from llmforge.engine.target import Checksums, Executable, Weights
from llmforge.errors import BuildError, TargetError
from llmforge.kernels import compile as compiler
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.experts import unfit_route
from llmforge.kernels.images import ARCHS, PTX_ARCH, check_archs, write_images
from llmforge.model.graph import Graph
from llmforge.model.passes import apply, fuse_add_norm, merge_linears
from llmforge.parallel import Topology
from llmforge.safetensors_io import SafetensorsWriter
from llmforge.settings import BuildSettings

PASSES = (merge_linears, fuse_add_norm)
WEIGHTS_FILE = "weights.safetensors"
PLAN_FILE = "plan.json"
KERNELS = "kernels"
_ALL_DIRECT = Links()


class CudaTarget:
    """Our kernels on an NVIDIA GPU of compute capability 8.0 or more."""

    name = "cuda"
    linear_cache = False
    compiles_apart = False
    needs_gpu = True

    def __init__(
        self, archs: Sequence[str] = (), cache: Path | None = compiler.DEFAULT_CACHE
    ) -> None:
        """archs: architectures to make cubins for; none: that of this machine's GPU, or where
        there is none all of `ARCHS`. cache: where compiled kernels are kept."""
        self._archs = archs
        self._cache = cache

    def configured(self, settings: BuildSettings) -> CudaTarget:
        check_archs(settings.arch)
        return CudaTarget(settings.arch, self._cache)

    def details(self) -> dict[str, Any]:
        return {"archs": list(self._archs or _local_arch() or ARCHS)}

    def available(self) -> str | None:
        """Building needs the compiler only; `load` says what it lacks."""
        return compiler.unavailable()

    def prepare(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "route":
                experts = int(graph.tensors[node.inputs[1]].shape[0])
                if reason := unfit_route(node.attrs, experts):
                    raise BuildError(
                        f"the cuda target cannot choose experts like this model ({reason}); "
                        "build for the target cpu"
                    )
        return apply(graph, PASSES)

    def memory(self, graph: Graph, limits: Limits) -> MemoryPlan:
        """Weights, KV cache with the spare block, and the buffers that all steps share."""
        sizes = largest_step(limits)
        sizes["blocks"] += 1
        lowered = programs(graph, limits, PTX_ARCH)
        # Two slots of each: kernels/csrc/exchange.cuh.
        shared = 2 * (max(p.group_slot for p in lowered) + max(p.mail_slot for p in lowered))
        return MemoryPlan(
            weights=sum(nbytes(p, sizes) for p in graph.parameters),
            kv_cache=sum(nbytes(s, sizes) for s in graph.states),
            activations=max(p.arena_bytes for p in lowered) + shared,
        )

    def compile_peak(self, plan: MemoryPlan) -> int:
        return plan.weights

    def compile(self, graph: Graph, weights: Weights, limits: Limits, out: Path) -> Checksums:
        (out / GRAPH_FILE).write_text(graph.to_json())
        archs = tuple(self._archs or _local_arch() or ARCHS)
        write_kernels(graph, limits, archs, out, self._cache)
        entries = [(p.name, p.dtype, p.sizes) for p in graph.parameters]
        with SafetensorsWriter(out / WEIGHTS_FILE, entries, {"format": "pt"}) as writer:
            for parameter in graph.parameters:
                writer.write(parameter.name, weights.read(parameter))
            return {WEIGHTS_FILE: writer.close()}

    def load(self, directory: Path, topology: Topology, limits: Limits, comm: Comm) -> Executable:
        if reason := _no_gpu():
            raise TargetError(f"this engine is for the target cuda and cannot run here: {reason}")
        from llmforge.engine.cuda.executable import CudaExecutable

        return CudaExecutable.open(directory, topology, limits, comm)


def _no_gpu() -> str | None:
    """Why engines cannot be loaded here, in a line, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU, or its driver is not loaded"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"its GPU has compute capability {major}.{minor}; at least 8.0 is needed"
    return None


def _local_arch() -> tuple[str, ...]:
    """The architecture of this machine's first GPU, if there is one."""
    if _no_gpu():
        return ()
    import torch

    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def decode_buckets(limits: Limits) -> tuple[int, ...]:
    """Batch sizes that decode steps are prepared for: each step takes the next larger one."""
    most = min(limits.max_batch_size, limits.max_num_tokens)
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    sizes += range(192, most, 64)
    return (*(size for size in sizes if size < most), most)


def programs(
    graph: Graph,
    limits: Limits,
    arch: str,
    links: Links = _ALL_DIRECT,
    choice: KernelChoice = MEASURED,
) -> list[Program]:
    """The programs of an engine on GPUs of `arch`: that of any step, maybe one of any short step,
    then those of the decode buckets."""
    # Compute capability 12.0 has them too, but 100 KB of shared memory where the others have 228.
    bulk_copies = 90 <= compiler.arch_number(arch) < 120
    warpgroups = compiler.arch_number(arch) == 90
    lengths = [limits.max_num_tokens]
    short = choice.wide.prompt_rows
    if warpgroups and choice.many_rows != "torch" and limits.max_num_tokens > short:
        lengths.append(short)
    general = [
        StepShape(tokens, limits.max_batch_size, False, links=links, warpgroups=warpgroups)
        for tokens in lengths
    ]
    decodes = [
        StepShape(size, size, True, bulk_copies, links, warpgroups)
        for size in decode_buckets(limits)
    ]
    return [lower(graph, limits, shape, choice) for shape in (*general, *decodes)]


def engine_kernels(
    graph: Graph, limits: Limits, arch: str, choice: KernelChoice = MEASURED
) -> dict[str, KernelSpec]:
    """Every kernel that an engine of this graph may launch on GPUs of `arch`, by key. How ranks
    reach each other shows where it runs."""
    kernels: dict[str, KernelSpec] = {}
    joined = any(node.op in COLLECTIVES for node in graph.nodes)
    for links in (_ALL_DIRECT, Links(group=False, messages=False))[: 2 if joined else 1]:
        for program in programs(graph, limits, arch, links, choice):
            kernels.update(program.kernels)
            ends = [fetch_launch(program), deliver_launch(limits.max_batch_size)]
            if program.outputs:
                ends.append(sampling_launch(program))
            kernels.update({launch.kernel.key: launch.kernel for launch in ends})
    return kernels


def write_kernels(
    graph: Graph, limits: Limits, archs: Sequence[str], out: Path, cache: Path | None
) -> None:
    """Compile the graph's kernels for all `archs`, and to PTX, into `out`. Raises CompileError."""
    kernels = {
        arch: list(engine_kernels(graph, limits, arch).values()) for arch in (*archs, PTX_ARCH)
    }
    index = write_images(kernels, out / KERNELS, cache)
    plan = {"compiler": compiler.compiler_version(), "kernels": index}
    (out / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n")
