"""Launches of gemv.cu: products of one row, as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    Size,
    require,
    same_dtype,
    specialised,
)

Release = Literal["at once", "with x", "with copies"]
RELEASES: tuple[Release, ...] = ("at once", "with x", "with copies")

# Of a multiprocessor's 228 KB of shared memory: for the blocks of a product that is alone, two of
# which do not fit, and for those of one that is not, which fit beside.
ALONE_BYTES = 117 << 10
SHARED_BYTES = 110 << 10
OVERHEAD_BYTES = 2 << 10  # of a block, for its barriers and the system
_LOAD_BYTES = 512  # that a warp loads at once
_MAX_WARPS = 16
_MAX_STAGES = 8


@dataclass(frozen=True)
class GemvTuning:
    """What a measurement is to choose; benchmarks/cuda_products.py is one.

    warps: of a block. piece: the most bytes of one copy, less where shared memory does not hold all
    rings. stages: slots of a warp's ring. blocks: of a multiprocessor, which share its memory.
    early, evict_first, release: EARLY, EVICT_FIRST and RELEASE of gemv.cu."""

    warps: int = 8
    piece: int = 4096
    stages: int = 3
    blocks: int = 1
    early: bool = True
    evict_first: bool = True
    release: Release = "at once"

    def __post_init__(self) -> None:
        require(0 < self.warps <= _MAX_WARPS, f"gemv: 1 to {_MAX_WARPS} warps")
        require(self.piece > 0 and self.piece % _LOAD_BYTES == 0, "gemv: pieces of 512 bytes")
        require(0 < self.stages <= _MAX_STAGES, f"gemv: 1 to {_MAX_STAGES} stages")
        require(self.blocks > 0, "gemv: at least one block a multiprocessor")
        require(self.release in RELEASES, f"gemv: release {self.release!r}")


DEFAULT_TUNING = GemvTuning()


@dataclass(frozen=True)
class GemvPlan:
    """How gemv.cu divides rows of weights: in pieces of so many bytes, the last of which may be
    shorter. shared_bytes: what a block asks for."""

    piece: int
    shared_bytes: int


def gemv_plan(dtype: str, k: int, tuning: GemvTuning, *, alone: bool = False) -> GemvPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32" or k % 8:
        return None
    row, slots = 2 * k, tuning.warps * tuning.stages
    most = (ALONE_BYTES if alone else SHARED_BYTES) // tuning.blocks - OVERHEAD_BYTES
    longest = min(tuning.piece, (most - row) // slots // _LOAD_BYTES * _LOAD_BYTES)
    if longest <= 0:
        return None
    parts = -(-row // longest)
    piece = -(-row // (parts * _LOAD_BYTES)) * _LOAD_BYTES
    single = alone and tuning.blocks == 1
    return GemvPlan(piece, most if single else slots * piece + row)


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
    plan = gemv_plan(dtype, k, tuning, alone=alone)
    assert plan is not None, f"gemv_plan takes no products over {k} {dtype}"
    gated = activation is not None
    require(x.features == k and x.offset % 8 == 0, "gemv: x is [1, k], aligned to 16 bytes")
    require(weight.contiguous and weight.offset == 0, "gemv: weights lie whole")
    require(norm_weight is None or norm_weight.features == k, "gemv: a norm of all of x")
    require(not gated or features % 2 == 0, "gemv: as many rows of gate as of up")
    require(not (gated and residual), "gemv: gated or residual, not both")
    require(out.features == (features // 2 if gated else features), "gemv: out's features")
    require(residual is None or residual.features == out.features, "gemv: residual")
    defines = {
        "K": k, "WARPS": tuning.warps, "PIECE": plan.piece, "STAGES": tuning.stages,
        "NORM": int(norm_weight is not None), "BIAS": int(bias is not None),
        "RESIDUAL": int(residual is not None), "GATED": int(gated), "EARLY": int(tuning.early),
        "EVICT_FIRST": int(tuning.evict_first), "RELEASE": RELEASES.index(tuning.release),
    }  # fmt: skip
    if activation is not None:
        defines[f"ACTIVATION_{activation.upper()}"] = 1
    arguments = (out, x, weight, bias, residual, norm_weight, features, Float(eps))
    spec = specialised("gemv.cu", "gemv", dtype, **defines)
    grid = (Size("processors", tuning.blocks), 1, 1)
    return Launch(spec, arguments, grid, tuning.warps * 32, plan.shared_bytes)
