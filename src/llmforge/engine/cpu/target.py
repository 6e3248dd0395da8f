"""The cpu target: compiling writes the graph and the rank's weights; loading maps them."""

from __future__ import annotations

import mmap
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llmforge.artifact import GB
from llmforge.comm import Comm, local_ranks
from llmforge.engine.cpu.attention import attention_workspace, new_cache
from llmforge.engine.cpu.executor import Executor
from llmforge.engine.cpu.experts import experts_workspace
from llmforge.engine.cpu.kernels import StepContext
from llmforge.engine.memory import MemoryPlan, largest_step, nbytes, plan_memory
from llmforge.engine.step import Limits, StepBatch, StepResult
from llmforge.engine.store import GRAPH_FILE, read_graph
from llmforge.engine.target import Checksums, Executable, Weights
from llmforge.errors import MemoryLimitError, StoreError
from llmforge.model.graph import Graph
from llmforge.model.passes import apply, fuse_add_norm, merge_linears
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology
from llmforge.safetensors_io import SafetensorsFile, SafetensorsWriter
from llmforge.settings import BuildSettings

PASSES = (merge_linears, fuse_add_norm)
WEIGHTS_FILE = "weights.safetensors"


class CpuTarget:
    """Plain torch on the CPU: available wherever torch is."""

    name = "cpu"
    linear_cache = False
    compiles_apart = False
    needs_gpu = False

    def configured(self, settings: BuildSettings) -> CpuTarget:
        return self

    def details(self) -> dict[str, Any]:
        return {}

    def available(self) -> str | None:
        return None

    def prepare(self, graph: Graph) -> Graph:
        return apply(graph, PASSES)

    def memory(self, graph: Graph, limits: Limits) -> MemoryPlan:
        """Besides what the graph needs: a weight that is looked up and multiplied (a tied
        embedding) is held in both forms, and a router's in float32; the cache has a zero block;
        attention gathers keys and masks scores; a mixture sorts its tokens by expert."""
        plan, sizes = plan_memory(graph, limits), largest_step(limits)
        readers = graph.consumers()
        both = [p for p in graph.parameters if len({n.op for n in readers[p.name]}) > 1]
        routers = [graph.tensors[n.inputs[1]] for n in graph.nodes if n.op == "route"]
        wide = [replace(router, dtype="float32") for router in routers]
        work = attention_workspace(graph, limits) + experts_workspace(graph, limits)
        return MemoryPlan(
            weights=plan.weights + sum(nbytes(p, sizes) for p in (*both, *wide)),
            kv_cache=plan.kv_cache // limits.num_blocks * (limits.num_blocks + 1),
            activations=plan.activations + work,
        )

    def compile_peak(self, plan: MemoryPlan) -> int:
        return plan.weights

    def compile(self, graph: Graph, weights: Weights, limits: Limits, out: Path) -> Checksums:
        (out / GRAPH_FILE).write_text(graph.to_json())
        entries = [(p.name, p.dtype, p.sizes) for p in graph.parameters]
        with SafetensorsWriter(out / WEIGHTS_FILE, entries, {"format": "pt"}) as writer:
            for parameter in graph.parameters:
                writer.write(parameter.name, weights.read(parameter))
            return {WEIGHTS_FILE: writer.close()}

    def load(self, directory: Path, topology: Topology, limits: Limits, comm: Comm) -> Executable:
        return CpuExecutable(directory, topology, limits, comm)


class CpuExecutable:
    """One rank on the CPU."""

    def __init__(self, directory: Path, topology: Topology, limits: Limits, comm: Comm) -> None:
        self.limits = limits
        self._comm = comm
        self._tensor_group = comm.split(topology.stage(comm.rank))
        graph = read_graph(directory)
        _check_memory(CpuTarget().memory(graph, limits), comm)
        share = cores_of_rank(local_ranks(comm)[1])
        torch.set_num_threads(min(share, torch.get_num_threads()))
        sizes = largest_step(limits)
        states = {
            state.name: new_cache(
                [sizes[d] if isinstance(d, str) else d for d in state.shape], DTYPES[state.dtype]
            )
            for state in graph.states
        }
        weights = map_weights(directory / WEIGHTS_FILE, graph)
        self._executor = Executor(graph, {**weights, **states})

    def step(self, batch: StepBatch) -> StepResult:
        graph = self._executor.graph
        inputs = {t.name: torch.from_numpy(getattr(batch, t.name)) for t in graph.inputs}
        sizes = {
            dim: size
            for tensor in graph.inputs
            for dim, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(dim, str)
        }
        with torch.inference_mode():
            outputs = self._executor.run(inputs, StepContext(self._comm, self._tensor_group, sizes))
        if self._comm.rank != 0:
            return StepResult()
        return StepResult(logits=outputs[0].float().numpy())

    def close(self) -> None:
        del self._executor


def _check_memory(plan: MemoryPlan, comm: Comm) -> None:
    """Raises MemoryLimitError where the ranks of this machine need more than it has free."""
    here = platform.node()
    needed = sum(total for node, total in comm.gather((here, plan.total)) if node == here)
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryLimitError(
            f"the engine needs {needed / GB:.2f} GB of memory on this machine and "
            f"{available / GB:.2f} GB are free; build it with smaller limits (--max-batch-size, "
            "--max-seq-len, --max-num-tokens, --kv-cache-tokens) or run on a larger machine"
        )


def map_weights(path: Path, graph: Graph) -> dict[str, torch.Tensor]:
    """The graph's parameters, mapped from the file: pages are read as they are first used, and
    ranks or runs on one machine share them. Raises StoreError where the file is not the graph's."""
    infos = SafetensorsFile(path).tensors
    expected = {p.name: (p.dtype, p.shape) for p in graph.parameters}
    if {name: (info.dtype, info.shape) for name, info in infos.items()} != expected:
        raise StoreError(f"{path} does not hold the weights of its graph; build the engine again")
    with open(path, "rb") as file:
        # Copy-on-write, because torch wants writable memory; nothing is ever written.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: torch.frombuffer(
            mapped,
            dtype=DTYPES[info.dtype],
            count=info.nbytes // DTYPES[info.dtype].itemsize,
            offset=info.start,
        ).view(info.shape)
        for name, info in infos.items()
    }


def cores_of_rank(local_ranks: int) -> int:
    """How many threads one of `local_ranks` ranks on this machine should use: its share of the
    cores that this process may run on."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)
