"""The cpu target: compiling writes the graph and the rank's weights; loading maps them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmforge.comm import Comm
from llmforge.engine.cpu.executor import Executor, as_tensors, step_sizes
from llmforge.engine.cpu.kernels import StepContext
from llmforge.engine.memory import largest_step
from llmforge.engine.step import Limits, StepBatch, StepResult
from llmforge.engine.target import Executable, Weights
from llmforge.errors import StoreError
from llmforge.model.graph import Graph
from llmforge.model.passes import apply, fuse_add_norm, merge_linears
from llmforge.model.reference import DTYPES
from llmforge.safetensors_io import SafetensorsFile, SafetensorsWriter

PASSES = (merge_linears, fuse_add_norm)
GRAPH_FILE = "graph.json"
WEIGHTS_FILE = "weights.safetensors"


class CpuTarget:
    """Plain torch on the CPU; always available, since torch is a dependency of llmforge."""

    name = "cpu"

    def available(self) -> str | None:
        return None

    def prepare(self, graph: Graph) -> Graph:
        return apply(graph, PASSES)

    def compile(self, graph: Graph, weights: Weights, limits: Limits, out: Path) -> None:
        (out / GRAPH_FILE).write_text(graph.to_json())
        entries = [(p.name, p.dtype, p.shape) for p in graph.parameters]
        writer = SafetensorsWriter(out / WEIGHTS_FILE, entries, {"format": "pt"})
        for parameter in graph.parameters:
            writer.write(parameter.name, weights.read(parameter))
        writer.close()

    def load(self, directory: Path, limits: Limits, comm: Comm) -> Executable:
        return CpuExecutable(directory, limits, comm)


class CpuExecutable:
    """One rank on the CPU. Its weights are mapped from the file, so ranks on one machine that
    hold the same bytes, and later runs, share the page cache."""

    def __init__(self, directory: Path, limits: Limits, comm: Comm) -> None:
        self.limits = limits
        try:
            self._graph = Graph.from_json((directory / GRAPH_FILE).read_text())
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{directory / GRAPH_FILE} is corrupt: {error}") from error
