"""Patterns of nodes that one kernel computes together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmforge.engine.cuda.collectives import all_reduce_add
from llmforge.engine.cuda.decode import fused_attention
from llmforge.engine.cuda.products import attend, norm, product, streams, weighed_norm
from llmforge.engine.cuda.state import Lowering
from llmforge.kernels import attention
from llmforge.kernels.attention import QkvSteps
from llmforge.model.graph import Node


@dataclass(frozen=True)
class _Qkv:
    """linear with a bias (maybe), split, norms of q and k (maybe), ropes, attention."""

    linear: Node | None
    split: Node
    norms: tuple[Node, ...]
    ropes: tuple[Node, Node]
    attention: Node

    @property
    def count(self) -> int:
        return (self.linear is not None) + 1 + len(self.norms) + 2 + 1


def _match_qkv(low: Lowering, index: int) -> _Qkv | None:
    nodes = low.graph.nodes[index : index + 7]
    linear = None
    if nodes[0].op == "linear" and nodes[0].inputs[2]:
        linear, nodes = nodes[0], nodes[1:]
    if not nodes or nodes[0].op != "split" or len(nodes[0].outputs) != 3:
        return None
    split = nodes[0]
    if linear and (split.inputs[0] != linear.outputs[0] or not low.only_reader(split.inputs[0])):
        return None
    q, k, v = split.outputs
    norms = tuple(n for n in nodes[1:3] if n.op == "rms_norm")
    rest = nodes[1 + len(norms) :]
    if norms:
        if [n.inputs[0] for n in norms] != [q, k]:
            return None
        q, k = (n.outputs[0] for n in norms)
    if [n.op for n in rest[:2]] != ["rope", "rope"] or len(rest) < 3:
        return None
    if rest[2].op not in ("attention", "scored_attention"):
        return None
    ropes, attended = (rest[0], rest[1]), rest[2]
    if [n.inputs[0] for n in ropes] != [q, k] or ropes[0].inputs[1] != ropes[1].inputs[1]:
        return None
    rotated = tuple(n.outputs[0] for n in ropes)
    if attended.inputs[:3] != (*rotated, v):
        return None
    weights = [low.graph.tensors[n.inputs[1]] for n in norms]
    if any(weight.shape != (attended.attrs["head_dim"],) for weight in weights):
        return None  # a norm of all heads together
    inner = (*split.outputs, *(n.outputs[0] for n in norms), *rotated)
    if not all(low.only_reader(name) for name in inner):
        return None
    return _Qkv(linear, split, norms, ropes, attended)


def _qkv_attention(low: Lowering, index: int) -> int:
    """The product's bias, qk-norm, rope and the cache writes in one kernel, then attention; or all
    of it in one."""
    found = _match_qkv(low, index)
    if found is None:
        return 0
    bias = None
    if found.linear:
        # Without the bias it is not the graph's tensor, so it goes by no name.
        product(low, found.linear, low.new(found.linear.outputs[0]), bias=None, named=False)
        bias = low.operand(found.linear.inputs[2])
    low.split(found.split)
    q, k, v = (low.operand(name) for name in found.split.outputs)
    norms = [low.operand(n.inputs[1]) for n in found.norms]
    cache = low.cache(found.attention)
    steps = QkvSteps(
        table=low.operand(found.ropes[0].inputs[1]),
        bias=bias,
        q_norm=norms[0] if norms else None,
        k_norm=norms[1] if norms else None,
        eps=found.norms[0].attrs["eps"] if found.norms else 0.0,
    )
    if fused_attention(low, found.attention, (q, k, v), cache, steps):
        return found.count
    rotated = low.new(found.ropes[0].outputs[0])
    epilogue = attention.qkv(rotated, q, k, v, cache, low.operand("positions"), steps)
    low.emit(epilogue, rotated.buffer.removeprefix("arena."))
    attend(low, found.attention, rotated, cache)
    return found.count


def _linear_gated(low: Lowering, index: int) -> int:
    """gate and up in one streamed product, which also applies the activation."""
    nodes = low.graph.nodes[index : index + 3]
    if [n.op for n in nodes] != ["linear", "split", "gated_activation"]:
        return 0
    linear, split, gated = nodes
    gate_up = linear.outputs[0]
    chained = split.inputs == (gate_up,) and gated.inputs == split.outputs
    if not chained or not all(low.only_reader(name) for name in (gate_up, *split.outputs)):
        return 0
    features = low.graph.tensors[gate_up].shape[-1]
    whole_tiles = isinstance(features, int) and features % 16 == 0
    if not whole_tiles or len(set(split.attrs["sizes"])) != 1 or not streams(low, linear):
        return 0
    out = low.new(gated.outputs[0])
    bias = low.operand(linear.inputs[2]) if linear.inputs[2] else None
    product(low, linear, out, bias=bias, activation=gated.attrs["activation"])
    return 3


def _linear_add(low: Lowering, index: int) -> int:
    """A streamed product that adds the residual; the norm behind the sum is left to its readers, or
    they and the product share it."""
    nodes = low.graph.nodes[index : index + 2]
    if nodes[0].op != "linear" or len(nodes) < 2 or nodes[1].op not in ("add", "add_rms_norm"):
        return 0
    linear, added = nodes
    result, pair = linear.outputs[0], added.inputs[:2]
    if result not in pair or pair[0] == pair[1] or not low.only_reader(result):
        return 0
    residual = low.operands.get(pair[0] if pair[1] == result else pair[1])
    if residual is None or len(residual.shape) != 2 or not streams(low, linear):
        return 0
    if not residual.contiguous:
        return 0
    bias = low.operand(linear.inputs[2]) if linear.inputs[2] else None
    total = low.new(added.outputs[0])
    left = weighed_norm(low, linear, added)
    product(low, linear, total, bias=bias, residual=residual, next_norm=left)
    if added.op == "add_rms_norm" and left is None:
        norm(low, added.outputs[1], total, low.operand(added.inputs[2]), added.attrs["eps"])
    return 2


PATTERNS: tuple[Callable[[Lowering, int], int], ...] = (
    _qkv_attention,
    _linear_gated,
    _linear_add,
    all_reduce_add,
)
"""Each returns how many nodes it has lowered, from `index` on; 0 where it does not apply."""
