"""How much memory a rank needs, from its graph and the engine's limits alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmforge.checkpoint.config import DTYPE_BYTES
from llmforge.engine.step import Limits
from llmforge.model.graph import Graph, Tensor


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's memory in bytes."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def largest_step(limits: Limits) -> dict[str, int]:
    """The largest sizes that the symbolic dimensions of a graph take under these limits."""
    return {
        "tokens": limits.max_num_tokens,
        "sequences": limits.max_batch_size,
        "sequences + 1": limits.max_batch_size + 1,
        "table_width": limits.max_blocks_per_seq,
        "rows": limits.max_batch_size,
        "blocks": limits.num_blocks,
        "block_size": limits.block_size,
    }


def nbytes(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """The bytes of a tensor, its symbolic dimensions being of these sizes."""
    shape = (sizes[d] if isinstance(d, str) else d for d in tensor.shape)
    return math.prod(shape) * DTYPE_BYTES[tensor.dtype]


def plan_memory(graph: Graph, limits: Limits) -> MemoryPlan:
    """What the graph itself needs: each parameter and state once, and of activations the most
    that is alive at one node of the largest step, the node's own inputs and outputs included."""
    sizes = largest_step(limits)
    return MemoryPlan(
        weights=sum(nbytes(p, sizes) for p in graph.parameters),
        kv_cache=sum(nbytes(s, sizes) for s in graph.states),
        activations=_peak_alive(graph, {n: nbytes(t, sizes) for n, t in graph.tensors.items()}),
    )


def last_uses(graph: Graph) -> dict[str, int]:
    """For every computed tensor, the index of the last node that needs it; the graph's outputs
    are needed to the end."""
    last = {}
    for index, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs):
            last[name] = index
    for name in graph.outputs:
        last[name] = len(graph.nodes)
    return last


def _peak_alive(graph: Graph, size: Mapping[str, int]) -> int:
    fixed = {t.name for t in (*graph.inputs, *graph.states, *graph.parameters)}
    last = last_uses(graph)
    alive = sum(size[t.name] for t in graph.inputs)
    peak = alive
    for index, node in enumerate(graph.nodes):
        alive += sum(size[name] for name in node.outputs)
        peak = max(peak, alive)
        for name in {*node.inputs, *node.outputs}:
            if name and name not in fixed and last[name] == index:
                alive -= size[name]
    return peak
