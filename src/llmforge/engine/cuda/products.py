"""Lowering of what both rows and patterns are made of: products, norms and attention."""

from __future__ import annotations

from llmforge.engine.cuda.program import Matmul
from llmforge.engine.cuda.state import MAX_SPLITS, DeferredNorm, Lowering
from llmforge.kernels import attention, stream
from llmforge.kernels import launch as kernels
from llmforge.kernels.attention import Cache, SplitScratch
from llmforge.kernels.launch import Operand
from llmforge.model.graph import Node

_BLOCKS_WANTED = 264  # two for each multiprocessor of the largest GPUs


def streams(low: Lowering, node: Node) -> bool:
    """Whether a linear node is one for stream_gemm.cu in this program."""
    weight = low.operand(node.inputs[1])
    plan = stream.stream_plan(weight.dtype, weight.features)
    few = low.shape.decode and low.shape.tokens <= low.stream_rows
    if plan is None or not few or not low.shape.bulk_copies:
        return False
    return node.inputs[0] not in low.deferred or plan.split == 1


def product(
    low: Lowering,
    linear: Node,
    out: Operand,
    *,
    bias: Operand | None,
    residual: Operand | None = None,
    activation: str | None = None,
    named: bool = True,
) -> None:
    """The product of a linear node, with what is fused behind it, by the kernel that suits."""
    x_name, weight = linear.inputs[0], low.operand(linear.inputs[1])
    computed = (out.buffer.removeprefix("arena."),) if named else ()
    if not streams(low, linear):
        assert residual is None and activation is None, "only streamed products fuse these"
        low.emit(Matmul(low.operand(x_name), weight, bias, out), *computed)
        return
    norm = low.deferred.get(x_name)
    scratch = stream.StreamScratch(
        Operand("scratch.sums", (1,), "float32", 1), Operand("scratch.arrived", (1,), "int32", 1)
    )
    call = stream.stream_gemm(
        out,
        norm.x if norm else low.operand(x_name),
        weight,
        scratch,
        bias=bias,
        residual=residual,
        norm_weight=norm.weight if norm else None,
        eps=norm.eps if norm else 0.0,
        activation=activation,
        alone=low.streamed % 2 == 1,
    )
    low.streamed += 1
    low.emit(call, *computed)


def norm(low: Lowering, name: str, x: Operand, weight: Operand, eps: float) -> None:
    """The RMSNorm `name` of x, left to its readers where all of them can compute it."""
    readers = low.readers.get(name, [])
    plan = stream.stream_plan(x.dtype, x.features)
    whole = weight.features == x.features and x.contiguous and name not in low.graph.outputs
    streamed = all(n.op == "linear" and streams(low, n) for n in readers)
    if whole and streamed and plan and plan.split == 1:
        low.deferred[name] = DeferredNorm(x, weight, eps)
        return
    low.emit(kernels.rms_norm(low.new(name), x, weight, eps=eps), name)


def attend(low: Lowering, node: Node, q: Operand, cache: Cache) -> None:
    out = low.new(node.outputs[0])
    slopes = None
    if node.attrs.get("slopes"):
        name = f"constant.{node.outputs[0]}"
        low.constants[name] = tuple(node.attrs["slopes"])
        slopes = Operand(name, (len(node.attrs["slopes"]),), "float32", 1)
    split = None
    if low.shape.decode:
        blocks = low.shape.sequences * cache.kv_heads
        splits = max(1, min(MAX_SPLITS, -(-_BLOCKS_WANTED // blocks)))
        partial = Operand("scratch.partial", (1,), "float32", 1)
        split = SplitScratch(partial, Operand("scratch.counters", (1,), "int32", 1), splits)
    scale, window = node.attrs["scale"], node.attrs["window"]
    call = attention.attention(
        out,
        q,
        cache,
        scale=scale,
        window=window,
        split=split,
        soft_cap=node.attrs.get("soft_cap"),
        slopes=slopes,
        sinks=low.optional(node.inputs[8]) if node.op == "scored_attention" else None,
    )
    low.emit(call, node.outputs[0])
