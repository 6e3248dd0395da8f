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
    fused_defines,
)
from llmforge.kernels.stream import StreamScratch

_WARPS = 8
_TILE = 8  # rows of weights that are multiplied at once; also the most rows of x
_PIECE_BYTES = 64 * _WARPS  # that a copy is a multiple of: 32 elements for each warp
_MAX_STAGES = 16
_MAX_SPLIT = 8
# Of x, that the lanes of a block keep in half of their registers, where two blocks share those of a
# multiprocessor.
_KEPT = 4096
_SUMS_BYTES = _WARPS * _TILE * 8 * 4  # of a tile, that the warps hand over


@dataclass(frozen=True)
class RowsTuning:
    """What a measurement is to choose; benchmarks/cuda_products.py is one.

    piece: the most bytes of one copy. stages: slots of a block's ring, of a piece of 8 rows each.
    More than 60 KB of slots are slower, although they fit."""

    piece: int = 2048
    stages: int = 3

    def __post_init__(self) -> None:
        whole = self.piece > 0 and self.piece % _PIECE_BYTES == 0
        require(whole, f"rows_gemm: pieces of {_PIECE_BYTES} bytes")
        require(0 < self.stages <= _MAX_STAGES, f"rows_gemm: 1 to {_MAX_STAGES} stages")


DEFAULT_ROWS = RowsTuning()


@dataclass(frozen=True)
class RowsPlan:
    """How rows_gemm.cu divides a product: SPLIT and PIECE there. shared_bytes: what a block asks
    for."""

    split: int
    piece: int
    shared_bytes: int


def rows_plan(dtype: str, k: int, tuning: RowsTuning, *, alone: bool = False) -> RowsPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32":
        return None
    for split in range(1, _MAX_SPLIT + 1):
        columns, rest = divmod(k, split)
        if rest == 0 and columns % (32 * _WARPS) == 0 and columns <= _KEPT:
            return _divided(split, columns, tuning, alone)
    return None


def _divided(split: int, columns: int, tuning: RowsTuning, alone: bool) -> RowsPlan | None:
    """The plan for blocks that multiply so many columns."""
    # The sums; before there are any, the weights of the norm.
    area = max(_SUMS_BYTES, 2 * columns)
    piece = min(tuning.piece, 2 * columns)
    pitch = -(-piece // 128) * 128 + 64
    used = tuning.stages * _TILE * pitch + area
    most = (ALONE_BYTES if alone else SHARED_BYTES) - OVERHEAD_BYTES
    return RowsPlan(split, piece, most if alone else used) if used <= most else None


def rows_scratch_floats(features: int, split: int) -> int:
    """Elements of `partial` for weights of so many rows: sums and squares of 8 rows of x."""
    return split * (features + 1) * 8 if split > 1 else 1


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
    """out = x weightᵀ + bias for at most 8 rows; the options are those of `stream.stream_gemm`. A
    norm is of bfloat16 alone: x times its weights, not yet divided, may be too much for float16."""
    dtype = same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    plan = rows_plan(dtype, k, tuning, alone=alone)
    assert plan is not None, f"rows_plan takes no products over {k} {dtype}"
    require(x.features == k and x.contiguous, "rows_gemm: x is [rows, k], contiguous")
    require(x.offset % 8 == 0, "rows_gemm: x is aligned to 16 bytes")
    require(norm_weight is None or norm_weight.features == k, "rows_gemm: a norm of all of x")
    require(norm_weight is None or dtype == "bfloat16", "rows_gemm: a norm of bfloat16")
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
        "rows_gemm.cu", "rows_gemm", dtype,
        K=k, SPLIT=plan.split, PIECE=plan.piece, STAGES=tuning.stages, **fused,
    )  # fmt: skip
    grid = (Size("processors"), 1, 1)
    return Launch(spec, arguments, grid, _WARPS * 32, plan.shared_bytes)
