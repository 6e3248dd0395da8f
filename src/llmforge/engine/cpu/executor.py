"""Runs a graph on the CPU: each node's row of the kernel table, in order, freeing as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmforge.engine.cpu.kernels import KERNELS, StepContext
from llmforge.engine.memory import last_uses
from llmforge.model.graph import Graph

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Instruction:
    """A node, its kernel, and the tensors that nothing needs after it."""

    kernel: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    free: tuple[str, ...]


class Executor:
    """A graph bound to its parameters and states (the KV cache), ready to run step after step."""

    def __init__(self, graph: Graph, fixed: Mapping[str, Tensor]) -> None:
        """`fixed` holds every parameter and state of the graph by name."""
        self.graph = graph
        self._fixed = dict(fixed)
        last = last_uses(graph)
        self._program = []
        for index, node in enumerate(graph.nodes):
            names = dict.fromkeys((*node.inputs, *node.outputs))
            free = tuple(n for n in names if n and n not in fixed and last[n] == index)
            kernel = KERNELS[node.op]
            self._program.append(
                _Instruction(kernel, node.inputs, node.outputs, node.attrs, free)
            )

    def run(
        self,
        inputs: Mapping[str, Tensor],
        context: StepContext,
        *,
        stop_after: int | None = None,
    ) -> list[Tensor]:
        """The graph's outputs; with `stop_after`, the outputs of that node instead, and nothing
        after it is run (to find the first node where two targets differ)."""
        values: dict[str, Any] = {**self._fixed, **inputs, "": None}
        for index, instruction in enumerate(self._program):
            arguments = [values[name] for name in instruction.inputs]
            results = instruction.kernel(arguments, instruction.attrs, context)
            if index == stop_after:
                return list(results)
            values.update(zip(instruction.outputs, results, strict=True))
            del arguments, results
            for name in instruction.free:
                del values[name]
        return [values[name] for name in self.graph.outputs]
