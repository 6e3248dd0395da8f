"""Graph → Program: a row for each op, and the patterns of nodes that one kernel computes together.

`lower` walks the nodes. At each it first tries the patterns (`PATTERNS`), which take several nodes
at once, then the node's row in `LOWERINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llmforge.checkpoint.config import RopeConfig
from llmforge.engine.cuda import collectives, experts, latent
from llmforge.engine.cuda.patterns import PATTERNS
from llmforge.engine.cuda.products import attend, norm, product
from llmforge.engine.cuda.program import Program, StepShape
from llmforge.engine.cuda.state import KernelChoice, Lowering
from llmforge.engine.cuda.step_ends import DRAWN
from llmforge.engine.step import Limits
from llmforge.kernels import attention
from llmforge.kernels import launch as kernels
from llmforge.kernels.launch import Launch, Operand
from llmforge.model.graph import Graph, Node


def lower(graph: Graph, limits: Limits, shape: StepShape, choice: KernelChoice) -> Program:
    """The program of a prepared graph for steps of this shape."""
    low = Lowering(graph, limits, shape, choice)
    index = 0
    while index < len(graph.nodes):
        for pattern in PATTERNS:
            if taken := pattern(low, index):
                index += taken
                break
        else:
            LOWERINGS[graph.nodes[index].op](low, graph.nodes[index])
            index += 1
    return low.finish()


def _embed(low: Lowering, node: Node) -> None:
    ids, weight = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    call = kernels.gather(out, weight, ids, first=node.attrs["start"], drawn=DRAWN)
    low.emit(call, node.outputs[0])
    collectives.share_drawn(low, DRAWN)


def _linear(low: Lowering, node: Node) -> None:
    bias = low.operand(node.inputs[2]) if node.inputs[2] else None
    product(low, node, low.new(node.outputs[0]), bias=bias)


def _split(low: Lowering, node: Node) -> None:
    low.split(node)


def _rms_norm(low: Lowering, node: Node) -> None:
    if node.outputs[0] in low.weighed:
        return  # the product that gave x has left what its readers need
    x, weight = (low.operand(name) for name in node.inputs)
    norm(low, node.outputs[0], x, weight, node.attrs["eps"])


def _add(low: Lowering, node: Node) -> None:
    x, y = (low.operand(name) for name in node.inputs)
    low.emit(kernels.add(low.new(node.outputs[0]), x, y), node.outputs[0])


def _add_rms_norm(low: Lowering, node: Node) -> None:
    x, residual, weight = (low.operand(name) for name in node.inputs)
    total, out = (low.new(name) for name in node.outputs)
    eps = node.attrs["eps"]
    call = kernels.rms_norm(out, x, weight, eps=eps, residual=residual, out_sum=total)
    low.emit(call, *node.outputs)


def _rope_table(low: Lowering, node: Node) -> None:
    rope = node.attrs["rope"]
    name = f"constant.{node.outputs[0]}"
    config = RopeConfig(**rope)
    trained = tuple(config.frequencies(1))
    longer = tuple(config.frequencies(config.original_max_position + 1))
    low.constants[name] = trained + (longer if config.scaling == "longrope" else ())
    count = len(low.constants[name])
    frequencies = Operand(name, (count,), "float32", count)
    positions, query_starts, prompt_lens = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    call = kernels.rope_table(out, positions, query_starts, prompt_lens, frequencies, rope=rope)
    low.emit_beside(call, node.outputs[0])


def _rope(low: Lowering, node: Node) -> None:
    x, table = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    low.emit(kernels.rope(out, x, table, head_dim=node.attrs["head_dim"]), node.outputs[0])


def _attention(low: Lowering, node: Node) -> None:
    """Without what precedes it: q is copied, k and v are stored."""
    q, k, v = (low.operand(name) for name in node.inputs[:3])
    cache = low.cache(node)
    name = f"{node.outputs[0]}.q"
    tensor = dataclasses.replace(low.graph.tensors[node.inputs[0]], name=name)
    low.graph = dataclasses.replace(low.graph, tensors={**low.graph.tensors, name: tensor})
    copied = low.new(name)
    low.emit(attention.qkv(copied, q, k, v, cache, low.operand("positions")))
    attend(low, node, copied, cache)


def _gated_activation(low: Lowering, node: Node) -> None:
    gate, up = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    call = kernels.gated_activation(out, gate, up, activation=node.attrs["activation"])
    low.emit(call, node.outputs[0])


def _layer_norm(low: Lowering, node: Node) -> None:
    x, weight = (low.operand(name) for name in node.inputs[:2])
    bias = low.operand(node.inputs[2]) if node.inputs[2] else None
    out = low.new(node.outputs[0])
    low.emit(kernels.layer_norm(out, x, weight, bias, **node.attrs), node.outputs[0])


def _rms_norm_by(low: Lowering, node: Node) -> None:
    x, sums, weight = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    low.emit(kernels.rms_norm_by(out, x, sums, weight, **node.attrs), node.outputs[0])


def _of_one(launch: Callable[..., Launch]) -> Callable[[Lowering, Node], None]:
    """The row of an op of one tensor, which one kernel computes."""

    def lower_node(low: Lowering, node: Node) -> None:
        x, out = low.operand(node.inputs[0]), low.new(node.outputs[0])
        low.emit(launch(out, x, **node.attrs), node.outputs[0])

    return lower_node


def _select_rows(low: Lowering, node: Node) -> None:
    x, rows = (low.operand(name) for name in node.inputs)
    if low.selects_all(node):
        shape = (*rows.shape, *x.shape[1:])
        low.operands[node.outputs[0]] = dataclasses.replace(x, shape=shape)
        return
    low.emit(kernels.gather(low.new(node.outputs[0]), x, rows), node.outputs[0])


COLLECTIVES: dict[str, Callable[[Lowering, Node], None]] = {
    "all_reduce": collectives.all_reduce,
    "all_gather": collectives.all_gather,
    "send": collectives.send,
    "recv": collectives.recv,
}

LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "embed": _embed,
    "linear": _linear,
    "split": _split,
    "rms_norm": _rms_norm,
    "add": _add,
    "add_rms_norm": _add_rms_norm,
    "rope_table": _rope_table,
    "rope": _rope,
    "attention": _attention,
    "scored_attention": _attention,
    "layer_norm": _layer_norm,
    "activation": _of_one(kernels.activation),
    "scale": _of_one(kernels.scale),
    "soft_cap": _of_one(kernels.soft_cap),
    "square_sum": _of_one(kernels.square_sum),
    "rms_norm_by": _rms_norm_by,
    "gated_activation": _gated_activation,
    "latent_attention": latent.latent_attention,
    "head_linear": latent.head_linear,
    "clamp": _of_one(kernels.clamp),
    "route": experts.route,
    "experts": experts.experts,
    "token_gate": experts.token_gate,
    "select_rows": _select_rows,
    **COLLECTIVES,
}
