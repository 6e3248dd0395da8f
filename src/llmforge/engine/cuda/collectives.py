"""Lowering of the ops that join ranks."""

from __future__ import annotations

from llmforge.engine.cuda.program import Transfer
from llmforge.engine.cuda.state import Lowering
from llmforge.kernels import collectives as kernels
from llmforge.kernels.collectives import Collective, Group
from llmforge.kernels.launch import Dim, Operand
from llmforge.model.graph import Node


def all_reduce(low: Lowering, node: Node) -> None:
    x, out = low.operand(node.inputs[0]), low.new(node.outputs[0])
    group = _group(low, node, x)
    _join(low, kernels.all_reduce(out, x, group), group, x, node.outputs[0])


def all_gather(low: Lowering, node: Node) -> None:
    x, out = low.operand(node.inputs[0]), low.new(node.outputs[0])
    group = _group(low, node, x)
    _join(low, kernels.all_gather(out, x, group), group, x, node.outputs[0])


def send(low: Lowering, node: Node) -> None:
    x = low.operand(node.inputs[0])
    if not low.shape.links.messages:
        low.emit(Transfer("send", x, node.attrs["to"]))
        return
    made = kernels.send(x, low.largest(x.shape[0]))
    low.mail_slot = max(low.mail_slot, made.slot_bytes)
    low.emit(made.launch)


def recv(low: Lowering, node: Node) -> None:
    out = low.new(node.outputs[0])
    if not low.shape.links.messages:
        low.emit(Transfer("receive", out, node.attrs["source"]), node.outputs[0])
        return
    made = kernels.receive(out, low.largest(out.shape[0]))
    low.mail_slot = max(low.mail_slot, made.slot_bytes)
    low.emit(made.launch, node.outputs[0])


def share_drawn(low: Lowering, drawn: Operand) -> None:
    """Let the program end with what brings the tokens that rank 0 draws to the other ranks of its
    group."""
    joined = (n.attrs["ranks"] for n in low.graph.nodes if n.op in ("all_reduce", "all_gather"))
    if (ranks := max(joined, default=1)) == 1:
        return
    group = _group_of(low, ranks, "rows")
    made = kernels.broadcast(drawn, group)
    low.group_slot = max(low.group_slot, made.slot_bytes)
    low.sharing = (made.launch,) if group.direct else (Transfer("gather", drawn), made.launch)


def all_reduce_add(low: Lowering, index: int) -> int:
    """A pattern: an all-reduce, then maybe a bias, then maybe the residual, and RMSNorm of that."""
    reduced, *rest = low.graph.nodes[index : index + 3]
    if reduced.op != "all_reduce":
        return 0
    x, current, taken = low.operand(reduced.inputs[0]), reduced.outputs[0], 1
    group, bias = _group(low, reduced, x), None
    if rest and rest[0].op == "add" and rest[0].inputs[0] == current and low.only_reader(current):
        other = low.operand(rest[0].inputs[1])
        if len(other.shape) == 1:
            bias, current, rest, taken = other, rest[0].outputs[0], rest[1:], 2
    added = rest[0] if rest else None
    residual = _residual(low, current, added)
    if added is None or residual is None:
        if bias is None:
            return 0
        made = kernels.all_reduce(low.new(current), x, group, bias=bias)
        _join(low, made, group, x, current)
        return taken
    total = low.new(added.outputs[0])
    if added.op == "add":
        made = kernels.all_reduce(total, x, group, bias=bias, residual=residual)
    else:
        made = kernels.all_reduce(
            low.new(added.outputs[1]),
            x,
            group,
            bias=bias,
            residual=residual,
            weight=low.operand(added.inputs[2]),
            out_sum=total,
            eps=added.attrs["eps"],
        )
    _join(low, made, group, x, *added.outputs)
    return taken + 1


def _residual(low: Lowering, name: str, added: Node | None) -> Operand | None:
    """What `added` adds to the tensor `name`, where the kernel can do that."""
    if added is None or added.op not in ("add", "add_rms_norm") or not low.only_reader(name):
        return None
    pair = added.inputs[:2]
    if name not in pair or pair[0] == pair[1]:
        return None
    other = low.operands.get(pair[0] if pair[1] == name else pair[1])
    return other if other and len(other.shape) == 2 and other.contiguous else None


def _group(low: Lowering, node: Node, x: Operand) -> Group:
    return _group_of(low, node.attrs["ranks"], x.shape[0])


def _group_of(low: Lowering, ranks: int, rows: Dim) -> Group:
    direct = low.shape.links.group and ranks <= kernels.MAX_RANKS
    return Group(ranks, direct, low.largest(rows))


def _join(low: Lowering, made: Collective, group: Group, x: Operand, *tensors: str) -> None:
    low.group_slot = max(low.group_slot, made.slot_bytes)
    if not group.direct:
        low.emit(Transfer("gather", x))
    low.emit(made.launch, *tensors)
