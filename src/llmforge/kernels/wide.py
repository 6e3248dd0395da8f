"""Launches of wide_gemm.cu: products of 33 to 128 rows on GPUs of compute capability 9.0; and of
parts_norm.cu, which adds what it has divided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    TensorMap,
    block_threads,
    extent,
    require,
    same_dtype,
    specialised,
)
from llmforge.kernels.product import fused_defines
from llmforge.kernels.stream import StreamScratch

MIN_WIDE_ROWS, WIDE_ROWS = 33, 128  # of x
_GROUP = 64  # rows of x that a warpgroup multiplies
_SHARED_BYTES = (227 << 10) - 2048  # of a block: its barriers, and to where the slots can begin
_MAX_STAGES = 16
_MAX_COLUMNS = 256
_MAX_SPLIT = 8
_COUNTERS = 1024  # in `StreamScratch.counters`
# Of an H200. Others of compute capability 9.0 have as many multiprocessors or fewer.
_PROCESSORS = 132
# Bytes a microsecond that a multiprocessor, and all of them from memory, were seen to take in.
_PROCESSOR_RATE, _MEMORY_RATE, _CACHE_RATE = 66e3, 4.4e6, 5e6


@dataclass(frozen=True)
class WidePlan:
    """How wide_gemm.cu divides a product: ROWS, COLUMNS, SPLIT and PARTS there."""

    rows: int
    columns: int
    split: int = 1
    parts: bool = False
    blocks: int = _PROCESSORS  # at most

    @property
    def stages(self) -> int:
        return min(_SHARED_BYTES // self._slot_bytes, _MAX_STAGES)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self._slot_bytes + 1024

    @property
    def _slot_bytes(self) -> int:
        return (self.columns + self.rows) * 128

    def tiles(self, features: int) -> int:
        return -(-features // self.columns)

    def scratch_floats(self, features: int) -> int:
        """Elements of `partial`, for weights of so many rows."""
        if self.parts:
            return self.split * self.rows * features
        return self.tiles(features) * self.split * self.rows * self.columns

    def microseconds(self, features: int, k: int) -> float:
        """About what a product takes, to compare plans by."""
        items = self.tiles(features) * self.split
        rounds = -(-items // self.blocks)
        taken = rounds * (k // self.split) * (self.columns + self.rows) * 2 / _PROCESSOR_RATE
        read = features * k * 2 / _MEMORY_RATE
        added = 0.0
        if self.parts:
            added = 2 * self.split * features * self.rows * 4 / _CACHE_RATE
        elif self.split > 1:  # by one block of those that share a tile, with little under way
            added = 1.5 * self.split * self.columns * self.rows * 4 / _PROCESSOR_RATE
        return max(taken, read) + 0.1 * taken + added


def wide_plan(
    dtype: str, rows: int, features: int, k: int, *, gated: bool = False, parts: bool = False
) -> WidePlan | None:
    """The plan for weights [features, k], or None where the kernel does not take the product.
    parts: what comes behind can add parts of the sums."""
    if dtype == "float32" or k % 64 or features % (8 if gated else 4) or rows > WIDE_ROWS:
        return None
    plans = list(_plans(-(-rows // _GROUP) * _GROUP, features, k, gated, parts))
    return min(plans, key=lambda plan: plan.microseconds(features, k))


def _plans(rows: int, features: int, k: int, gated: bool, parts: bool) -> Iterator[WidePlan]:
    step = 32 if gated else 16
    for columns in range(step, _MAX_COLUMNS + 1, step):
        for split in range(1, _MAX_SPLIT + 1):
            plan = WidePlan(rows, columns, split, parts and split > 1)
            items = plan.tiles(features) * split
            counters = plan.tiles(features) * (rows // 16)
            fits = items <= plan.blocks and (plan.parts or counters <= _COUNTERS)
            if k // 64 % split == 0 and (split == 1 or fits):
                yield plan


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
    `stream.stream_gemm`. With `plan.parts` instead scratch.partial [split, plan.rows, features] =
    the sums over each part of k. most_rows: how many rows of x there is memory for."""
    dtype = same_dtype(out, x, weight, bias, residual)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    require(dtype != "float32", "wide_gemm: 16 bits an element")
    require(k % (64 * plan.split) == 0, "wide_gemm: whole 64 columns in every part")
    require(x.features == k and x.contiguous, "wide_gemm: x is [rows, k], contiguous")
    require(x.offset % 8 == 0, "wide_gemm: x is aligned to 16 bytes")
    stored = (out.features, *(n for o in (out, residual) if o for n in (o.row_stride, o.offset)))
    require(all(n % 4 == 0 for n in stored), "wide_gemm: features are stored by fours")
    require(residual is None or residual.row_stride == out.row_stride, "wide_gemm: strides")
    require(not plan.parts or not (bias or residual or activation), "wide_gemm: parts are sums")
    fused = fused_defines(
        "wide_gemm", out, weight, bias=bias, residual=residual, norm_weight=None,
        activation=activation,
    )  # fmt: skip
    del fused["NORM"]
    halves = 2 if activation else 1
    require(plan.columns % (16 * halves) == 0, "wide_gemm: columns of a tile")
    weights = TensorMap(weight, halves, (1, halves, plan.columns // halves, 64))
    rows = TensorMap(x, 1, (1, 1, plan.rows, 64), most_rows)
    arguments = (
        out, rows, weights, bias, residual, scratch.partial, scratch.counters,
        extent(x.shape[0]), features, out.row_stride,
    )  # fmt: skip
    spec = specialised(
        "wide_gemm.cu", "wide_gemm", dtype, K=k, ROWS=plan.rows, COLUMNS=plan.columns,
        SPLIT=plan.split, PARTS=int(plan.parts), STAGES=plan.stages, **fused,
    )  # fmt: skip
    blocks = min(plan.tiles(features) * plan.split, plan.blocks)
    threads = plan.rows // _GROUP * 128 + 32
    return Launch(spec, arguments, (blocks, 1, 1), threads, plan.shared_bytes)


def parts_norm(
    out: Operand,
    out_sum: Operand,
    parts: Operand,
    residual: Operand,
    weight: Operand,
    plan: WidePlan,
    *,
    eps: float,
) -> Launch:
    """out_sum = the sum of the parts of a product + residual; out = RMSNorm(out_sum) weight."""
    dtype = same_dtype(out, out_sum, residual, weight)
    features = weight.features
    matrices = (out, out_sum, residual)
    require(all(m.features == features for m in matrices), "parts_norm: shapes differ")
    aligned = all(m.contiguous and m.offset % 8 == 0 for m in matrices)
    require(aligned and features % 8 == 0, "parts_norm: contiguous rows of whole 16 bytes")
    threads = block_threads(features // 8, 512)
    spec = specialised(
        "parts_norm.cu", "parts_norm", dtype,
        FEATURES=features, PARTS=plan.split, PART_ROWS=plan.rows, THREADS=threads,
    )  # fmt: skip
    arguments = (out, out_sum, parts, residual, weight, Float(eps))
    return Launch(spec, arguments, (extent(out.shape[0]), 1, 1), threads)
