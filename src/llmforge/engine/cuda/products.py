"""Lowering of what both rows and patterns are made of: products, norms and attention."""

from __future__ import annotations

from functools import partial

from llmforge.engine.cuda.program import Matmul
from llmforge.engine.cuda.state import MAX_SPLITS, DeferredNorm, Lowering, ProductKernel
from llmforge.kernels import attention, stream
from llmforge.kernels import launch as kernels
from llmforge.kernels.attention import Cache, SplitScratch
from llmforge.kernels.gemv import gemv, gemv_plan
from llmforge.kernels.launch import Operand
from llmforge.model.graph import Node

_BLOCKS_WANTED = 264  # two for each multiprocessor of the largest GPUs


def kernel_of(low: Lowering, node: Node) -> ProductKernel:
    """What computes a linear node in this program."""
    weight = low.operand(node.inputs[1])
    if not low.shape.decode or not low.shape.bulk_copies:
        return "torch"
    wanted: ProductKernel = "stream_gemm"
    if low.shape.tokens == 1:
        wanted = low.products.one_row
    elif low.shape.tokens > low.stream_rows:
        wanted = "torch"
    if wanted == "gemv" and gemv_plan(weight.dtype, weight.features, low.products.gemv) is None:
        wanted = "stream_gemm"
    if wanted == "stream_gemm" and stream.stream_plan(weight.dtype, weight.features) is None:
        wanted = "torch"
    return wanted


def streams(low: Lowering, node: Node) -> bool:
    """Whether the kernel of a linear node is one of ours, which fuse what is around it."""
    return kernel_of(low, node) != "torch"


def _norms(low: Lowering, node: Node) -> bool:
    """Whether the node is a product that can compute the norm of its x."""
    if node.op != "linear":
        return False
    kernel, weight = kernel_of(low, node), low.operand(node.inputs[1])
    if kernel == "stream_gemm":
        plan = stream.stream_plan(weight.dtype, weight.features)
        return plan is not None and plan.split == 1
    return kernel == "gemv"


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
    kernel = kernel_of(low, linear)
    if kernel == "torch":
        assert residual is None and activation is None, "only our own kernels fuse these"
        low.emit(Matmul(low.operand(x_name), weight, bias, out), *computed)
        return
    norm = low.deferred.get(x_name)
    x = norm.x if norm else low.operand(x_name)
    if kernel == "gemv":
        launch = partial(gemv, out, x, weight, low.products.gemv)
    else:
        sums = Operand("scratch.sums", (1,), "float32", 1)
        arrived = Operand("scratch.arrived", (1,), "int32", 1)
        scratch = stream.StreamScratch(sums, arrived)
        launch = partial(stream.stream_gemm, out, x, weight, scratch)
    call = launch(
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
    whole = weight.features == x.features and x.contiguous and name not in low.graph.outputs
    if whole and readers and all(_norms(low, reader) for reader in readers):
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
