"""Launches of rows_gemm.cu: products of 2 to 8 rows, as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    Size,
    extent,
    require,
    same_dtype,
    specialised,
)
from llmforge.kernels.product import (
    ALONE_BYTES,
    OVERHEAD_BYTES,
    SHARED_BYTES,
    RingTuning,
    fused_defines,
)
from llmforge.kernels.stream import StreamScratch

_TILE = 8  # output features that a warp multiplies at once; also the most rows of x
_PIECE_BYTES = 128  # that a copy is a multiple of
_MAX_STAGES = 16
_MAX_SPLIT = 8
# Of x, that the lanes of a block keep in half of their registers, where two blocks share those of a
# multiprocessor.
_KEPT = 4096
_SUMS_BYTES = 64 * 4  # of a tile, that a warp hands over


@dataclass(frozen=True)
class RowsTuning(RingTuning):
    """What a measurement is to choose; benchmarks/cuda_products.py is one.

    warps: of a block. piece: the most bytes of one copy, less where shared memory does not hold all
    rings. stages: slots of a warp's ring."""

    warps: int = 8
    piece: int = 512
    stages: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.warps in (4, 8), "rows_gemm: 4 or 8 warps")
        whole = self.piece > 0 and self.piece % _PIECE_BYTES == 0
        require(whole, f"rows_gemm: pieces of {_PIECE_BYTES} bytes")
        require(0 < self.stages <= _MAX_STAGES, f"rows_gemm: 1 to {_MAX_STAGES} stages")


DEFAULT_ROWS = RowsTuning()


@dataclass(frozen=True)
class RowsPlan:
    """How rows_gemm.cu divides a product: SPLIT, PIECE and AREA there. shared_bytes: what a block
    asks for."""

    split: int
    piece: int
    area: int
    shared_bytes: int


def rows_plan(dtype: str, k: int, tuning: RowsTuning, *, alone: bool = False) -> RowsPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32":
        return None
    for split in range(1, _MAX_SPLIT + 1):
        part, rest = divmod(k, split * tuning.warps)
        if rest == 0 and part % 64 == 0 and part * tuning.warps <= _KEPT:
            return _divided(split, 2 * part, tuning, alone)
    return None


def _divided(split: int, row: int, tuning: RowsTuning, alone: bool) -> RowsPlan | None:
    """The plan for warps that multiply `row` bytes of each row."""
    # Two rounds of sums, of gate and of up; or the weights of the norm.
    area = max(4 * _SUMS_BYTES, row)
    most = (ALONE_BYTES if alone else SHARED_BYTES) - OVERHEAD_BYTES
    slot = (most // tuning.warps - area) // tuning.stages
    longest = min(tuning.piece, (slot // _TILE - 16) // _PIECE_BYTES * _PIECE_BYTES)
    if longest <= 0:
        return None
    pieces = -(-row // longest)
    piece = -(-row // (pieces * _PIECE_BYTES)) * _PIECE_BYTES
    used = tuning.warps * (tuning.stages * _TILE * (piece + 16) + area)
    return RowsPlan(split, piece, area, most if alone else used)


def rows_gemm(
    out: Operand,
    x: Operand,
    weight: Operand,
    scratch: StreamScratch,
    tuning: RowsTuning,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    norm_weight: Operand | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    alone: bool = False,
) -> Launch:
    """out = x weightᵀ + bias for at most 8 rows; the options are those of `stream.stream_gemm`."""
    dtype = same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    plan = rows_plan(dtype, k, tuning, alone=alone)
    assert plan is not None, f"rows_plan takes no products over {k} {dtype}"
    require(x.features == k and x.contiguous, "rows_gemm: x is [rows, k], contiguous")
    require(x.offset % 8 == 0, "rows_gemm: x is aligned to 16 bytes")
    require(norm_weight is None or norm_weight.features == k, "rows_gemm: a norm of all of x")
    require(norm_weight is None or plan.split == 1, "rows_gemm: a norm needs all of k")
    require(residual is None or residual.row_stride == out.row_stride, "rows_gemm: strides")
    fused = fused_defines(
        "rows_gemm", out, weight,
        bias=bias, residual=residual, norm_weight=norm_weight, activation=activation,
    )  # fmt: skip
    arguments = (
        out, x, weight, bias, residual, norm_weight, scratch.partial, scratch.counters,
        extent(x.shape[0]), features, out.row_stride, Float(eps),
    )  # fmt: skip
    spec = specialised(
        "rows_gemm.cu", "rows_gemm", dtype, K=k, SPLIT=plan.split, WARPS=tuning.warps,
        PIECE=plan.piece, STAGES=tuning.stages, AREA=plan.area, **fused, **tuning.ring_defines,
    )  # fmt: skip
    grid = (Size("processors"), 1, 1)
    return Launch(spec, arguments, grid, tuning.warps * 32, plan.shared_bytes)
