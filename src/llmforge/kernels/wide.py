"""Launches of wide_gemm.cu: products of 17 to 128 rows on GPUs of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
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

MIN_WIDE_ROWS, WIDE_ROWS = 17, 128  # of x: steps of fewer have not been measured
_GROUP = 64  # rows of x that a warpgroup multiplies
_SHARED_BYTES = (227 << 10) - 2048  # of a block: its barriers, and to where the slots can begin
_MAX_STAGES = 16
_MAX_COLUMNS = 256
_MAX_SPLIT = 8
_COUNTERS = 1024  # in `StreamScratch.counters`
# Of an H200. Others of compute capability 9.0 have as many multiprocessors or fewer.
_PROCESSORS = 132
# Bytes a microsecond that a multiprocessor, and all of them from memory, were seen to take in.
_PROCESSOR_RATE, _MEMORY_RATE = 66e3, 4.4e6


@dataclass(frozen=True)
class WidePlan:
    """How wide_gemm.cu divides a product: ROWS, COLUMNS and SPLIT there."""

    rows: int
    columns: int
    split: int = 1
    blocks: int = _PROCESSORS  # at most

    @property
    def groups(self) -> int:
        """Warpgroups."""
        return -(-self.rows // _GROUP)

    @property
    def stages(self) -> int:
        return min(_SHARED_BYTES // self._slot_bytes, _MAX_STAGES)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self._slot_bytes + 1024

    @property
    def _slot_bytes(self) -> int:
        return (self.columns + self.groups * _GROUP) * 128

    def tiles(self, features: int) -> int:
        return -(-features // self.columns)

    def scratch_floats(self, features: int) -> int:
        """Elements of `partial`, for weights of so many rows."""
        return self.tiles(features) * self.split * self.groups * _GROUP * self.columns

    def microseconds(self, features: int, k: int) -> float:
        """About what a product takes, to compare plans by."""
        items = self.tiles(features) * self.split
        rounds = -(-items // self.blocks)
        taken = rounds * (k // self.split) * (self.columns + self.rows) * 2 / _PROCESSOR_RATE
        read = features * k * 2 / _MEMORY_RATE
        added = 0.0
        if self.split > 1:  # by one block of those that share a tile, with little under way
            added = 1.5 * self.split * self.columns * self.groups * _GROUP * 4 / _PROCESSOR_RATE
        return max(taken, read) + 0.1 * taken + added


def wide_plan(
    dtype: str, rows: int, features: int, k: int, *, gated: bool = False
) -> WidePlan | None:
    """The plan for weights [features, k], or None where the kernel does not take the product."""
    if dtype == "float32" or k % 64 or features % (8 if gated else 4) or rows > WIDE_ROWS:
        return None
    plans = _plans(-(-rows // 8) * 8, features, k, gated)
    return min(plans, key=lambda plan: plan.microseconds(features, k))


def _plans(rows: int, features: int, k: int, gated: bool) -> Iterator[WidePlan]:
    step = 32 if gated else 16
    for columns in range(step, _MAX_COLUMNS + 1, step):
        for split in range(1, _MAX_SPLIT + 1):
            plan = WidePlan(rows, columns, split)
            tiles = plan.tiles(features)
            fits = tiles * split <= plan.blocks and tiles * plan.groups * 4 <= _COUNTERS
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
    `stream.stream_gemm`. most_rows: how many rows of x there is memory for."""
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
        SPLIT=plan.split, STAGES=plan.stages, **fused,
    )  # fmt: skip
    blocks = min(plan.tiles(features) * plan.split, plan.blocks)
    threads = plan.groups * 128 + 32
    return Launch(spec, arguments, (blocks, 1, 1), threads, plan.shared_bytes)
