"""Launches of wide_gemm.cu: products of 33 to 256 rows on GPUs of compute capability 9.0."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import (
    Launch,
    Operand,
    TensorMap,
    extent,
    require,
    same_dtype,
    specialised,
)
from llmforge.kernels.product import fused_defines
from llmforge.kernels.stream import StreamScratch

_ROWS_PER_GROUP = 64
_SHARED_BYTES = (227 << 10) - 2048  # of a block: its barriers, and to where the slots can begin
_MAX_STAGES = 8


@dataclass(frozen=True)
class WidePlan:
    """How wide_gemm.cu divides a product: ROWS, COLUMNS, SPLIT, CLUSTER and RUN there."""

    rows: int
    columns: int
    split: int = 1
    cluster: int = 1
    run: int = 1
    blocks: int = 132  # at most: one a multiprocessor

    @property
    def stages(self) -> int:
        return min(_SHARED_BYTES // self.slot_bytes, _MAX_STAGES)

    @property
    def slot_bytes(self) -> int:
        return (self.rows + self.columns) * self.run * 128

    def tiles(self, features: int) -> int:
        """With those that fill up a cluster."""
        return -(-features // (self.columns * self.cluster)) * self.cluster

    def scratch_floats(self, features: int) -> int:
        """Elements of `partial`, for weights of so many rows."""
        if self.split == 1:
            return 1
        return self.tiles(features) * self.split * self.rows * self.columns


def wide_gemm(
    out: Operand,
    x: Operand,
    weight: Operand,
    scratch: StreamScratch,
    plan: WidePlan,
    most_rows: int,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    activation: str | None = None,
) -> Launch:
    """out = x weightᵀ + bias for at most `plan.rows` rows; the options are those of
    `stream.stream_gemm`. most_rows: how many rows of x there is memory for."""
    dtype = same_dtype(out, x, weight, bias, residual)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    require(dtype != "float32", "wide_gemm: 16 bits an element")
    require(k % (64 * plan.run * plan.split) == 0, "wide_gemm: whole 64 columns in every part")
    require(plan.stages > 1, "wide_gemm: slots for two chunks")
    require(x.features == k and x.contiguous, "wide_gemm: x is [rows, k], contiguous")
    require(x.offset % 8 == 0, "wide_gemm: x is aligned to 16 bytes")
    pairs = (out.features, out.row_stride, out.offset)
    require(all(n % 2 == 0 for n in pairs), "wide_gemm: features are stored in pairs")
    require(residual is None or residual.row_stride == out.row_stride, "wide_gemm: strides")
    require(residual is None or residual.offset % 2 == 0, "wide_gemm: residuals are read in pairs")
    fused = fused_defines(
        "wide_gemm", out, weight, bias=bias, residual=residual, norm_weight=None,
        activation=activation,
    )  # fmt: skip
    halves = 2 if activation else 1
    whole = (1, halves, plan.columns // halves, 64)
    weights = TensorMap(weight, halves, whole if plan.run == 1 else (plan.run, 1, 8, 64))
    rows = TensorMap(x, 1, (1, 1, plan.rows // plan.cluster, 64), most_rows)
    blocks = min(plan.tiles(features) * plan.split, plan.blocks // plan.cluster * plan.cluster)
    arguments = (
        out, rows, weights, bias, residual, scratch.partial, scratch.counters,
        extent(x.shape[0]), features, out.row_stride,
    )  # fmt: skip
    spec = specialised(
        "wide_gemm.cu", "wide_gemm", dtype, K=k, ROWS=plan.rows, COLUMNS=plan.columns,
        SPLIT=plan.split, RUN=plan.run, STAGES=plan.stages, CLUSTER=plan.cluster, **fused,
    )  # fmt: skip
    shared = plan.stages * plan.slot_bytes + 1024
    threads = plan.rows // _ROWS_PER_GROUP * 128 + 32
    return Launch(spec, arguments, (blocks, 1, 1), threads, shared)
