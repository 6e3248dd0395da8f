"""Runs a graph on the CPU: each node's row of the kernel table, in order, freeing as it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmforge.engine.cpu.experts import Experts, HeadLinear, Route
from llmforge.engine.cpu.kernels import KERNELS, StepContext
from llmforge.engine.cpu.linear import linear_of
from llmforge.engine.memory import last_uses
from llmforge.model.graph import Graph
from llmforge.model.reference import Context, Meaning

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Instruction:
    """A node, its kernel, and the tensors that nothing needs after it."""

    kernel: Meaning
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    free: tuple[str, ...]


class Executor:
    """A graph bound to its parameters and states (the KV cache), ready to run step after step."""

    def __init__(self, graph: Graph, fixed: Mapping[str, Tensor]) -> None:
        """`fixed` holds every parameter and state of the graph by name. Weights of products are
        packed, and not kept beside that unless another op reads them."""
        self.graph = graph
        last = last_uses(graph)
        packed: dict[tuple[str, ...], Meaning] = {}
        self._program = []
        for index, node in enumerate(graph.nodes):
            inputs, kernel = node.inputs, KERNELS[node.op]
            if node.op in PACKED:
                positions, pack = PACKED[node.op]
                weights = tuple(inputs[i] for i in positions)
                if weights not in packed:
                    packed[weights] = pack(*(fixed[name] for name in weights))
                kernel = packed[weights]
                inputs = tuple(n for i, n in enumerate(inputs) if i not in positions)
            names = dict.fromkeys((*node.inputs, *node.outputs))
            free = tuple(n for n in names if n and n not in fixed and last[n] == index)
            self._program.append(_Instruction(kernel, inputs, node.outputs, node.attrs, free))
        read = {name for instruction in self._program for name in instruction.inputs}
        self._fixed = {name: tensor for name, tensor in fixed.items() if name in read}

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


def _linear(weight: Tensor) -> Meaning:
    """The op `linear` with its weight given: inputs (x, bias)."""
    linear = linear_of(weight)

    def kernel(inputs: Sequence[Any], attrs: Mapping[str, Any], _: Context) -> tuple[Tensor]:
        return (linear(*inputs),)

    return kernel


# Ops whose weights are packed as the engine loads: which inputs these are, and what makes of them
# a kernel that takes the other inputs.
PACKED: dict[str, tuple[tuple[int, ...], Callable[..., Meaning]]] = {
    "linear": ((1,), _linear),
    "route": ((1,), Route),
    "experts": ((3, 4), Experts),
    "head_linear": ((1,), HeadLinear),
}
