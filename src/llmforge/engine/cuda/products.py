"""Lowering of what both rows and patterns are made of: products, norms and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llmforge.engine.cuda.program import Matmul
from llmforge.engine.cuda.prompts import prompt_attention
from llmforge.engine.cuda.state import (
    MAX_SPLITS,
    SUMS,
    DeferredNorm,
    Lowering,
    ProductKernel,
    WeighedNorm,
)
from llmforge.kernels import attention, stream, wide
from llmforge.kernels import launch as kernels
from llmforge.kernels.attention import Cache, SplitScratch
from llmforge.kernels.gemv import gemv, gemv_plan
from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.rows import rows_gemm, rows_plan, rows_scratch_floats
from llmforge.kernels.stream import StreamScratch
from llmforge.kernels.wide import InputNorm, NextNorm
from llmforge.model.graph import Node

_BLOCKS_WANTED = 264  # two for each multiprocessor of the largest GPUs


def kernel_of(low: Lowering, node: Node) -> ProductKernel:
    """What computes a linear node in this program."""
    weight, wanted = low.operand(node.inputs[1]), low.product_kernel()
    dtype, k = weight.dtype, weight.features
    if wanted == "gemv" and gemv_plan(dtype, k, low.choice.gemv) is None:
        wanted = "stream_gemm"
    if wanted == "rows_gemm" and rows_plan(dtype, k, low.choice.rows) is None:
        wanted = "stream_gemm"
    if wanted == "wide_gemm" and _wide_plan(low, node) is None:
        wanted = "torch"
    if wanted == "stream_gemm" and stream.stream_plan(dtype, k) is None:
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
    if kernel in ("torch", "wide_gemm"):
        return False
    if kernel == "rows_gemm":
        return weight.dtype == "bfloat16"
    return kernel == "gemv" or _split(low, kernel, weight) == 1


def _split(low: Lowering, kernel: ProductKernel, weight: Operand) -> int:
    """How many blocks share each row of weights, in a kernel that takes these."""
    if kernel == "rows_gemm":
        rows = rows_plan(weight.dtype, weight.features, low.choice.rows)
        assert rows is not None
        return rows.split
    plan = stream.stream_plan(weight.dtype, weight.features)
    assert plan is not None
    return plan.split


def _wide_plan(low: Lowering, node: Node) -> wide.WidePlan | None:
    """How wide_gemm.cu divides a linear node of this program; None where it does not, or where the
    rows are those that are wanted of a prompt, which are few."""
    weight, count = low.operand(node.inputs[1]), low.graph.tensors[node.inputs[0]].shape[0]
    rows, features, gated = low.largest(count), weight.shape[0], _is_gated(low, node)
    assert isinstance(features, int)
    if count != "tokens" and not low.shape.decode:
        return None
    if rows > low.choice.wide.most_rows and not gated:
        return None
    return wide.wide_plan(weight.dtype, rows, features, weight.features, gated=gated)


def _is_gated(low: Lowering, node: Node) -> bool:
    """Whether a linear node's output is gate and up."""
    split = low.only_reader(node.outputs[0])
    if split is None or split.op != "split":
        return False
    readers = [low.only_reader(name) for name in split.outputs]
    return all(reader is not None and reader.op == "gated_activation" for reader in readers)


def product(
    low: Lowering,
    linear: Node,
    out: Operand,
    *,
    bias: Operand | None,
    residual: Operand | None = None,
    activation: str | None = None,
    next_norm: NextNorm | None = None,
    named: bool = True,
) -> None:
    """The product of a linear node, with what is fused behind it, by the kernel that suits.
    next_norm: from `weighed_norm`."""
    x_name, weight = linear.inputs[0], low.operand(linear.inputs[1])
    computed = (out.buffer.removeprefix("arena."),) if named else ()
    kernel = kernel_of(low, linear)
    if kernel == "torch":
        assert residual is None and activation is None, "only our own kernels fuse these"
        low.emit(Matmul(low.operand(x_name), weight, bias, out), *computed)
        return
    if kernel == "wide_gemm":
        call = _wide(
            low, linear, out, bias=bias, residual=residual, activation=activation,
            next_norm=next_norm,
        )  # fmt: skip
        low.emit(call, *computed)
        return
    norm = low.deferred.get(x_name)
    x = norm.x if norm else low.operand(x_name)
    call = _launch_of(low, kernel, out, x, weight)(
        bias=bias,
        residual=residual,
        norm_weight=norm.weight if norm else None,
        eps=norm.eps if norm else 0.0,
        activation=activation,
        alone=low.streamed % 2 == 1,
    )
    low.streamed += 1
    low.emit(call, *computed)


def _launch_of(
    low: Lowering, kernel: ProductKernel, out: Operand, x: Operand, weight: Operand
) -> Callable[..., Launch]:
    """The launch of one of our kernels, but for what is fused into it."""
    if kernel == "gemv":
        return partial(gemv, out, x, weight, low.choice.gemv)
    features, split = weight.shape[0], _split(low, kernel, weight)
    assert isinstance(features, int)
    if kernel == "rows_gemm":
        scratch = _scratch(rows_scratch_floats(features, split))
        return partial(rows_gemm, out, x, weight, scratch, low.choice.rows)
    scratch = _scratch(stream.stream_scratch_floats(features, split) if split > 1 else 1)
    return partial(stream.stream_gemm, out, x, weight, scratch)


def _wide(low: Lowering, linear: Node, out: Operand, **fused: Any) -> Launch:
    weight, normed = low.operand(linear.inputs[1]), low.weighed.get(linear.inputs[0])
    x = normed.weighed if normed else low.operand(linear.inputs[0])
    plan, features = _wide_plan(low, linear), weight.shape[0]
    assert plan is not None and isinstance(features, int)
    scratch, norm = _scratch(plan.scratch_floats(features)), normed.norm if normed else None
    return wide.wide_gemm(
        out, x, weight, scratch, plan, low.largest(x.shape[0]), norm=norm, **fused
    )


def weighed_norm(low: Lowering, linear: Node, added: Node) -> NextNorm | None:
    """What the product of a linear node is to leave of the RMSNorm of `added`, its sum with the
    residual, where the products that read that norm finish it; else None."""
    found = _norm_of(low, added)
    if found is None:
        return None
    name, weight, eps = found
    readers = low.readers.get(name, [])
    fit = [n.op == "linear" and kernel_of(low, n) == "wide_gemm" for n in (linear, *readers)]
    if not readers or not all(fit) or name in low.graph.outputs:
        return None
    total = low.graph.tensors[added.outputs[0]]
    plan = _wide_plan(low, linear)
    if plan is None or total.dtype != "bfloat16" or weight.features != total.shape[-1]:
        return None
    squares = wide.squares_shape(plan, weight.features)
    left = NextNorm(
        weight,
        low.temporary(f"{name}.weighed", total.shape, total.dtype),
        low.temporary(f"{name}.squares", squares, "float32"),
    )
    low.weighed[name] = WeighedNorm(left.weighed, InputNorm(left.squares, eps))
    return left


def _norm_of(low: Lowering, added: Node) -> tuple[str, Operand, float] | None:
    """The name of the RMSNorm of a sum, its weights and eps."""
    if added.op == "add_rms_norm":
        return added.outputs[1], low.operand(added.inputs[2]), added.attrs["eps"]
    reader = low.only_reader(added.outputs[0])
    if reader and low.selects_all(reader):
        reader = low.only_reader(reader.outputs[0])
    if reader is None or reader.op != "rms_norm":
        return None
    return reader.outputs[0], low.operand(reader.inputs[1]), reader.attrs["eps"]


def _scratch(floats: int) -> StreamScratch:
    return StreamScratch(
        Operand(SUMS, (floats,), "float32", floats), Operand("scratch.arrived", (1,), "int32", 1)
    )


def norm(low: Lowering, name: str, x: Operand, weight: Operand, eps: float) -> None:
    """The RMSNorm `name` of x, left to its readers where all of them can compute it."""
    readers = low.readers.get(name, [])
    whole = weight.features == x.features and x.contiguous and name not in low.graph.outputs
    if whole and readers and all(_norms(low, reader) for reader in readers):
        low.deferred[name] = DeferredNorm(x, weight, eps)
        return
    low.emit(kernels.rms_norm(low.new(name), x, weight, eps=eps), name)


def attend(low: Lowering, node: Node, q: Operand, cache: Cache) -> None:
    """Attention to the cache, which has the new keys and values already."""
    if prompt_attention(low, node, q, cache):
        return
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
