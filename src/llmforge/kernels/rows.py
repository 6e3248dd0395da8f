"""Launches of rows_gemm.cu: products of 2 to 32 rows, as fast as the weights can be read."""

from __future__ import annotations

from collections.abc import Iterator
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

MOST_ROWS = 32  # of x
_WARPS = 8
_UNIT = 32 * _WARPS  # columns that a block's warps share evenly
# Elements of x that the lanes of a block keep in half of their registers, where two blocks share those
# of a multiprocessor; and the fewest that are worth a phase of their own.
_KEPT = 4096 * 8
_LEAST_KEPT = _KEPT // 4
_MAX_SPLIT = 4
_SUMS_BYTES = 16 << 10  # of a block for a second tile's sums too
_LEAST_STAGES = 2
_MAX_STAGES = 16

# What the plan estimates with: see `_microseconds`. Of an H200.
_PROCESSORS = 132
_MEMORY = 4.42e6  # bytes a microsecond
_L2_CACHE = 5.5e6
_PROCESSOR = 0.08e6  # what one multiprocessor reads of the L2 cache
_MEETING = 2.0  # microseconds until the last block of a group knows that it is the last


@dataclass(frozen=True)
class RowsTuning:
    """What a measurement is to choose; benchmarks/cuda_products.py is one.

    piece: the most bytes of one copy. ring: the most bytes of a block's rings. team: warps that
    share a ring. tile: rows of weights that are multiplied at once, 8 or 16."""

    piece: int = 1024
    ring: int = 100 << 10
    team: int = 8
    tile: int = 16

    def __post_init__(self) -> None:
        require(self.team in (1, 2, 4, 8), "rows_gemm: teams of 1, 2, 4 or 8 warps")
        require(self.tile in (8, 16), "rows_gemm: tiles of 8 or 16 rows")
        unit = 64 * self.team
        require(self.piece > 0 and self.piece % unit == 0, f"rows_gemm: pieces of {unit} bytes")

    def slots(self, piece: int) -> int:
        """Bytes of a slot of every ring."""
        return _WARPS // self.team * self.tile * (-(-piece // 128) * 128 + 64)


DEFAULT_ROWS = RowsTuning()


@dataclass(frozen=True)
class RowsPlan:
    """How rows_gemm.cu divides a product: EIGHTS, SPLIT, PHASES, COLUMNS, PIECE and STAGES there.
    shared_bytes: what a block asks for."""

    eights: int
    split: int
    phases: int
    columns: int
    team: int
    tile: int
    piece: int
    stages: int
    buffers: int
    shared_bytes: int

    def scratch_floats(self, features: int) -> int:
        """Elements of `StreamScratch.partial` for weights of so many rows."""
        if self.split == self.phases == 1:
            return 1
        return self.split * (features + 1) * 8 * self.eights


def rows_plan(
    dtype: str, weights: tuple[int, int], rows: int, tuning: RowsTuning, *, alone: bool = False
) -> RowsPlan | None:
    """The plan for weights [features, k] and at most `rows` rows, or None where the kernel does not
    take them."""
    if dtype == "float32" or rows > MOST_ROWS:
        return None
    eights = -(-rows // 8)
    divisions = list(_divisions(weights[1], eights))
    if not divisions:
        return None
    split, phases = min(divisions, key=lambda d: (_microseconds(weights, eights, d[0]), d))
    columns = weights[1] // split // phases
    most = (ALONE_BYTES if alone else SHARED_BYTES) - OVERHEAD_BYTES
    # The warps' sums of a tile, or the weights of the norm.
    sums = _WARPS * tuning.tile * eights * 8 * 4
    buffers = 2 if 2 * sums <= _SUMS_BYTES else 1
    area = max(buffers * sums, 2 * columns)
    piece = min(tuning.piece, 2 * columns // _WARPS * tuning.team)
    slots = tuning.slots(piece)
    stages = min(_MAX_STAGES, tuning.ring // slots, (most - area) // slots)
    if stages < _LEAST_STAGES:
        return None
    return RowsPlan(
        eights, split, phases, columns, tuning.team, tuning.tile, piece, stages, buffers,
        most if alone else stages * slots + area,
    )  # fmt: skip


def _divisions(k: int, eights: int) -> Iterator[tuple[int, int]]:
    """The ways to divide k among blocks, each with the fewest phases in which they can go through
    their part of it."""
    for split in range(1, _MAX_SPLIT + 1):
        units, rest = divmod(k, split * _UNIT)
        for phases in range(1, units + 1 if rest == 0 else 1):
            kept = units // phases * _UNIT * eights * 8
            if units % phases == 0 and kept <= _KEPT:
                if phases == 1 or kept >= _LEAST_KEPT:
                    yield split, phases
                break


def _microseconds(weights: tuple[int, int], eights: int, split: int) -> float:
    """What a product with so many blocks to a group is estimated to take: the weights from memory,
    or from the L2 cache with what every block reads of x; and the time in which the last block of a
    group adds the others' sums."""
    features, k = weights
    read, x = 2 * features * k, _PROCESSORS * 16 * eights * k // split
    sums = 0.0
    if split > 1:
        parts = split * (features * split / _PROCESSORS) * 8 * eights * 4
        sums = _MEETING + parts / _PROCESSOR
    return max(read / _MEMORY, (read + x) / _L2_CACHE) + sums


def rows_gemm(
    out: Operand,
    x: Operand,
    weight: Operand,
    scratch: StreamScratch,
    plan: RowsPlan,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    norm_weight: Operand | None = None,
    eps: float = 0.0,
    activation: str | None = None,
) -> Launch:
    """out = x weightᵀ + bias for at most as many rows as the plan is for; the options are those of
    `stream.stream_gemm`. A norm is of bfloat16 alone: x times its weights, before it is divided,
    may be too much for float16."""
    dtype = same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    require(k == plan.split * plan.phases * plan.columns, "rows_gemm: another product's plan")
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
        "rows_gemm.cu", "rows_gemm", dtype, K=k, EIGHTS=plan.eights, SPLIT=plan.split,
        PHASES=plan.phases, COLUMNS=plan.columns, PIECE=plan.piece, STAGES=plan.stages,
        TEAM=plan.team, TILE_ROWS=plan.tile, BUFFERS=plan.buffers, **fused,
    )  # fmt: skip
    grid = (Size("processors"), 1, 1)
    return Launch(spec, arguments, grid, _WARPS * 32, plan.shared_bytes)
