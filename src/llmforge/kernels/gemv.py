"""Launches of gemv.cu: products of one row, as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    Size,
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

_LOAD_BYTES = 512  # that a warp loads at once
_MAX_WARPS = 16
_MAX_STAGES = 8


@dataclass(frozen=True)
class GemvTuning:
    """What a measurement is to choose; benchmarks/cuda_products.py is one.

    warps: of a block. piece: the most bytes of one copy, less where shared memory does not hold all
    rings. stages: slots of a warp's ring; narrow_stages: those of gated products over at most
    `narrow` elements, whose rows are of few pieces."""

    warps: int = 8
    piece: int = 2048
    stages: int = 4
    narrow_stages: int = 6
    narrow: int = 2048

    def __post_init__(self) -> None:
        require(0 < self.warps <= _MAX_WARPS, f"gemv: 1 to {_MAX_WARPS} warps")
        require(self.piece > 0 and self.piece % _LOAD_BYTES == 0, "gemv: pieces of 512 bytes")
        for stages in (self.stages, self.narrow_stages):
            require(0 < stages <= _MAX_STAGES, f"gemv: 1 to {_MAX_STAGES} stages")

    def stages_of(self, k: int, *, gated: bool) -> int:
        """Slots of a warp's ring for products over `k` elements."""
        return self.narrow_stages if gated and k <= self.narrow else self.stages


DEFAULT_TUNING = GemvTuning()


@dataclass(frozen=True)
class GemvPlan:
    """How gemv.cu divides rows of weights: in pieces of so many bytes, the last of which may be
    shorter. stages: slots of a warp's ring. shared_bytes: what a block asks for."""

    piece: int
    stages: int
    shared_bytes: int


def gemv_plan(
    dtype: str, k: int, tuning: GemvTuning, *, gated: bool = False, alone: bool = False
) -> GemvPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32" or k % 8:
        return None
    stages = tuning.stages_of(k, gated=gated)
    row, slots = 2 * k, tuning.warps * stages
    most = (ALONE_BYTES if alone else SHARED_BYTES) - OVERHEAD_BYTES
    longest = min(tuning.piece, (most - row) // slots // _LOAD_BYTES * _LOAD_BYTES)
    if longest <= 0:
        return None
    parts = -(-row // longest)
    piece = -(-row // (parts * _LOAD_BYTES)) * _LOAD_BYTES
    return GemvPlan(piece, stages, most if alone else slots * piece + row)


def gemv(
    out: Operand,
    x: Operand,
    weight: Operand,
    tuning: GemvTuning,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    norm_weight: Operand | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    alone: bool = False,
) -> Launch:
    """out = x weightᵀ + bias for one row; the options are those of `stream.stream_gemm`."""
    dtype = same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    plan = gemv_plan(dtype, k, tuning, gated=activation is not None, alone=alone)
    assert plan is not None, f"gemv_plan takes no products over {k} {dtype}"
    require(x.features == k and x.offset % 8 == 0, "gemv: x is [1, k], aligned to 16 bytes")
    require(norm_weight is None or norm_weight.features == k, "gemv: a norm of all of x")
    require(residual is None or residual.features == out.features, "gemv: residual")
    fused = fused_defines(
        "gemv", out, weight,
        bias=bias, residual=residual, norm_weight=norm_weight, activation=activation,
    )  # fmt: skip
    arguments = (out, x, weight, bias, residual, norm_weight, features, Float(eps))
    spec = specialised(
        "gemv.cu", "gemv", dtype, K=k, WARPS=tuning.warps, PIECE=plan.piece,
        STAGES=plan.stages, **fused,
    )  # fmt: skip
    grid = (Size("processors"), 1, 1)
    return Launch(spec, arguments, grid, tuning.warps * 32, plan.shared_bytes)
