"""Launches of stream_gemm.cu: products of few rows, as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    Size,
    TensorMap,
    extent,
    require,
    same_dtype,
    specialised,
)
from llmforge.kernels.product import fused_defines


@dataclass(frozen=True)
class StreamPlan:
    """How stream_gemm.cu divides a product over K elements; see there."""

    split: int
    chunk: int
    stages: int

    @property
    def stage_bytes(self) -> int:
        return 16 * self.chunk * 2


STREAM_ROWS = 8  # rows of x that the kernel takes
_STREAM_WARPS = 4
_MAX_SLICE = 1024  # elements of x that a warp keeps: 128 registers a lane
_MAX_SPLIT = 8
_RING_BYTES = 96 << 10  # of shared memory, so that blocks of two kernels fit a multiprocessor
# With the kernel's other 4 KB just over half of a multiprocessor's 228 KB of shared memory.
_ALONE_BYTES = 109 << 10


def stream_plan(dtype: str, k: int) -> StreamPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32":
        return None
    for split in range(1, _MAX_SPLIT + 1):
        slice_size, rest = divmod(k, split * _STREAM_WARPS)
        if rest == 0 and slice_size % 64 == 0 and slice_size <= _MAX_SLICE:
            sizes = [c for c in range(64, 257, 64) if slice_size % c == 0]
            chunk = sizes[-1]
            one = StreamPlan(split, chunk, 1)
            stages = min(_RING_BYTES // (_STREAM_WARPS * one.stage_bytes), 16)
            return replace(one, stages=stages)
    return None


@dataclass(frozen=True)
class StreamScratch:
    """What blocks that share a product need to add their sums: `partial` float32, `counters`
    int32 zeros."""

    partial: Operand
    counters: Operand


def stream_scratch_floats(features: int, split: int) -> int:
    """Elements of `partial` for a product with these output features."""
    return split * -(-features // 16) * 128


def stream_gemm(
    out: Operand,
    x: Operand,
    weight: Operand,
    scratch: StreamScratch,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    norm_weight: Operand | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    alone: bool = False,
) -> Launch:
    """out = x weightᵀ + bias for at most STREAM_ROWS rows; with `norm_weight`, of x's RMSNorm; with
    `residual`, plus that; with `activation`, gated: the weights are those of gate | up.

    alone: take so much shared memory that no two blocks of this launch fit a multiprocessor. Where
    every second product does, the blocks of each spread evenly, one to a multiprocessor, although
    they start while those of the product before still run: a block that is not alone finds room for
    just one beside each that is."""
    dtype = same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    plan = stream_plan(dtype, k)
    assert plan is not None, f"stream_plan takes no products over {k} {dtype}"
    require(x.features == k and x.contiguous, "stream_gemm: x is [rows, k], contiguous")
    require(norm_weight is None or plan.split == 1, "stream_gemm: a norm needs all of k")
    gated = activation is not None
    require(not gated or features % 16 == 0, "stream_gemm: gate and up in whole tiles")
    require(residual is None or residual.row_stride == out.row_stride, "stream_gemm: strides")
    fused = fused_defines(
        "stream_gemm", out, weight,
        bias=bias, residual=residual, norm_weight=norm_weight, activation=activation,
    )  # fmt: skip
    rows, halves = x.shape[0], 2 if gated else 1
    weights = TensorMap(weight, halves, (plan.chunk // 64, halves, 16 // halves, 64))
    arguments = (
        out, x, weights, bias, residual, norm_weight, scratch.partial, scratch.counters,
        extent(rows), features, out.row_stride, Float(eps),
    )  # fmt: skip
    shared = _STREAM_WARPS * plan.stages * plan.stage_bytes + 1024
    if alone:
        shared = max(shared, _ALONE_BYTES)
    spec = specialised(
        "stream_gemm.cu", "stream_gemm", dtype, K=k, SPLIT=plan.split, WARPS=_STREAM_WARPS,
        CHUNK=plan.chunk, STAGES=plan.stages, **fused,
    )  # fmt: skip
    return Launch(spec, arguments, (Size("processors"), 1, 1), _STREAM_WARPS * 32, shared)
