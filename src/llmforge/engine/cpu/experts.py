"""The experts of a mixture, a product an expert over the tokens that chose it.

The tokens of an expert are multiplied together, with packed weights (linear.py), so that a token's
bits do not depend on which others chose the same expert. What a token's experts give is kept by
choice and summed in the order of the choices, which is the token's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmforge.checkpoint.config import DTYPE_BYTES
from llmforge.engine.cpu.linear import Linear, linear_of
from llmforge.engine.step import Limits
from llmforge.model.graph import Graph
from llmforge.model.reference import choose_experts, expert_activation

Tensor = torch.Tensor


class Experts:
    """The op `experts` with its weights given: inputs (x, ids, weights, and two biases)."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self._hidden = down.shape[1]
        self._gate_up: list[Linear] = [linear_of(weight) for weight in gate_up]
        self._down: list[Linear] = [linear_of(weight) for weight in down]

    def __call__(self, inputs: Sequence[Any], attrs: Mapping[str, Any], _: Any) -> tuple[Tensor]:
        x, ids, weights, gate_up_bias, down_bias = inputs
        top_k = ids.shape[1]
        local = ids.flatten() - attrs["first"]
        # Sorted by expert, the choices of those that are held here stand end to end.
        order = local.argsort(stable=True)
        counts = torch.bincount(
            local[(local >= 0) & (local < len(self._down))], minlength=len(self._down)
        )
        start = int((local < 0).sum())
        results = torch.zeros((len(local), self._hidden))
        for expert, count in enumerate(counts.tolist()):
            if not count:
                continue
            choices = order[start : start + count]
            start += count
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            both = self._gate_up[expert](x[choices // top_k], bias)
            activated = expert_activation(both, attrs["activation"], attrs["alpha"], attrs["limit"])
            bias = None if down_bias is None else down_bias[expert]
            out = self._down[expert](activated, bias)
            results[choices] = out.float() * weights.flatten()[choices, None]
        total = results.view(len(x), top_k, self._hidden)
        summed = total[:, 0].clone()
        for choice in range(1, top_k):
            summed += total[:, choice]
        return (summed.to(x.dtype),)


class Route:
    """The op `route` with its weight given: inputs (x, bias, correction)."""

    def __init__(self, weight: Tensor) -> None:
        self._linear = linear_of(weight.float())

    def __call__(
        self, inputs: Sequence[Any], attrs: Mapping[str, Any], _: Any
    ) -> tuple[Tensor, Tensor]:
        x, bias, correction = inputs
        logits = self._linear(x.float(), None if bias is None else bias.float())
        return choose_experts(logits, correction, **attrs)


class HeadLinear:
    """The op `head_linear` with its weight given: input (x,)."""

    def __init__(self, weight: Tensor) -> None:
        self._heads = [linear_of(head) for head in weight]

    def __call__(self, inputs: Sequence[Any], attrs: Mapping[str, Any], _: Any) -> tuple[Tensor]:
        [x] = inputs
        parts = x.chunk(len(self._heads), dim=-1)
        products = (head(part, None) for head, part in zip(self._heads, parts, strict=True))
        return (torch.cat(tuple(products), dim=-1),)


def experts_workspace(graph: Graph, limits: Limits) -> int:
    """The most bytes that one mixture needs in one step besides its inputs and its output: what
    every choice gives, and what the largest expert, which may be all tokens', holds."""
    most = 0
    for node in graph.nodes:
        if node.op == "experts":
            x, ids, gate_up = (graph.tensors[node.inputs[i]] for i in (0, 1, 3))
            hidden, both = int(gate_up.shape[2]), int(gate_up.shape[1])
            # Of every choice what its expert gives; of a token their sum, and that in its dtype;
            # of a row of the expert what is read, gate and up with what becomes of them, and the
            # result before and after it is weighted.
            wide = (int(ids.shape[1]) + 3) * hidden * DTYPE_BYTES["float32"]
            narrow = (3 * hidden + 3 * both) * DTYPE_BYTES[x.dtype]
            most = max(most, limits.max_num_tokens * (wide + narrow))
    return most
