"""Lowering of mixtures of experts."""

from __future__ import annotations

from llmforge.engine.cuda.state import Lowering
from llmforge.kernels import experts as kernels
from llmforge.kernels.experts import Experts, GroupedScratch
from llmforge.model.graph import Node

# Up to this many tokens, few of them choose the same expert, and what each reads of the experts'
# weights is more than reading them once only where it is little.
_STREAMED_TOKENS = 8


def route(low: Lowering, node: Node) -> None:
    x, weight, bias, correction = (low.optional(name) for name in node.inputs)
    assert x is not None and weight is not None
    experts = int(weight.shape[0])
    logits = low.temporary(f"{node.outputs[0]}.logits", (x.shape[0], experts), "float32")
    low.emit(kernels.router_logits(logits, x, weight, bias, tokens=low.largest(x.shape[0])))
    ids, weights = (low.new(name) for name in node.outputs)
    low.emit(kernels.choose(ids, weights, logits, correction, node.attrs), *node.outputs)


def experts(low: Lowering, node: Node) -> None:
    x, ids, weights, gate_up, down = (low.operand(name) for name in node.inputs[:5])
    up_bias, down_bias = (low.optional(name) for name in node.inputs[5:])
    held = Experts(gate_up, down, up_bias, down_bias, ids.features, **node.attrs)
    rows, name = x.shape[0], node.outputs[0]
    tokens, pairs = low.largest(rows), ids.features
    activated = low.temporary(f"{name}.activated", (rows, pairs * held.inner), x.dtype)
    if low.shape.decode and tokens <= _STREAMED_TOKENS:
        up, out_of = held.stream(low.new(name), x, ids, weights, activated)
        low.emit(up)
        low.emit(out_of, name)
        return
    scratch = GroupedScratch(
        order=low.temporary(f"{name}.order", (rows, pairs), "int32"),
        tiles=low.temporary(f"{name}.tiles", (1 + 3 * held.tiles(tokens),), "int32"),
        activated=activated,
        products=low.temporary(f"{name}.products", (rows, pairs * held.hidden), x.dtype),
    )
    *first, last = held.grouped(low.new(name), x, ids, weights, scratch, tokens=tokens)
    for launch in first:
        low.emit(launch)
    low.emit(last, name)


def token_gate(low: Lowering, node: Node) -> None:
    x, by, weight = (low.operand(name) for name in node.inputs)
    low.emit(kernels.token_gate(low.new(node.outputs[0]), x, by, weight), node.outputs[0])
