"""Launches of wide_gemm.cu: products of 9 to 256 rows on GPUs of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmforge.kernels.launch import (
    Float,
    Launch,
    Operand,
    TensorMap,
    extent,
    require,
    same_dtype,
    specialised,
)
from llmforge.kernels.product import OVERHEAD_BYTES, fused_defines
from llmforge.kernels.stream import StreamScratch

WIDE_ROWS = 256  # of x, at most
_GROUP = 64  # rows of x that a warpgroup multiplies
_ALL_BYTES = 227 << 10  # of shared memory, for a block
_MIN_STAGES, _MAX_STAGES = 3, 16
_MAX_COLUMNS = 256
# Columns of a tile times warpgroups: their sums take half of the registers.
_MOST_SUMS = 512
_MAX_SPLIT = 8
_COUNTERS = 1024  # in `StreamScratch.counters`
# Of an H200. Others of compute capability 9.0 have as many multiprocessors or fewer.
_PROCESSORS = 132
_CHUNK = 0.17  # microseconds that a slot takes at least
# A microsecond's operations of a multiprocessor's tensor cores under lasting load, and bytes that a
# multiprocessor, and all of them from memory, were seen to take in.
_OPERATION_RATE, _PROCESSOR_RATE, _MEMORY_RATE = 6e6, 66e3, 4.4e6


@dataclass(frozen=True)
class WideTuning:
    """What a measurement is to choose. least_rows, most_rows: of the decode steps whose products
    the kernel computes; gated_rows: the most where gate and up come with their activation.
    prompt_rows: the most of other steps."""

    least_rows: int = 9
    most_rows: int = 192
    gated_rows: int = WIDE_ROWS
    prompt_rows: int = 128


DEFAULT_WIDE = WideTuning()


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
        fixed = self._fixed_bytes + OVERHEAD_BYTES
        return min((_ALL_BYTES - fixed) // self._slot_bytes, _MAX_STAGES)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self._slot_bytes + self._fixed_bytes

    @property
    def _fixed_bytes(self) -> int:
        """To where the slots can begin, and what whole warpgroups read behind them."""
        return 1024 + (self.groups * _GROUP - self.rows) * 128

    @property
    def _slot_bytes(self) -> int:
        return (self.columns + self.rows) * 128

    def tiles(self, features: int) -> int:
        return -(-features // self.columns)

    def scratch_floats(self, features: int) -> int:
        """Elements of `partial`, for weights of so many rows."""
        return self.tiles(features) * self.split * self.groups * _GROUP * self.columns

    def microseconds(self, features: int, k: int) -> float:
        """About what a product takes, to compare plans by."""
        items = self.tiles(features) * self.split
        rounds = -(-items // self.blocks)
        length = rounds * (k // self.split)  # that a block goes through
        taken = length * (self.columns + self.rows) * 2 / _PROCESSOR_RATE
        taken = max(taken, length // 64 * _CHUNK)
        multiplied = length * self.columns * self.groups * _GROUP * 2 / _OPERATION_RATE
        read = features * k * 2 / _MEMORY_RATE
        added = 0.0
        if self.split > 1:  # by one block of those that share a tile, with little under way
            added = 1.5 * self.split * self.columns * self.groups * _GROUP * 4 / _PROCESSOR_RATE
        return max(taken, multiplied, read) + 0.1 * taken + added


def wide_plan(
    dtype: str, rows: int, features: int, k: int, *, gated: bool = False
) -> WidePlan | None:
    """The plan for weights [features, k], or None where the kernel does not take the product."""
    if dtype == "float32" or k % 64 or features % (8 if gated else 4) or rows > WIDE_ROWS:
        return None
    plans = _plans(-(-rows // 8) * 8, features, k)
    return min(plans, key=lambda plan: plan.microseconds(features, k))


def _plans(rows: int, features: int, k: int) -> Iterator[WidePlan]:
    for columns in range(16, _MAX_COLUMNS + 1, 16):
        for split in range(1, _MAX_SPLIT + 1):
            plan = WidePlan(rows, columns, split)
            tiles = plan.tiles(features)
            fits = tiles * split <= plan.blocks and tiles * plan.groups * 4 <= _COUNTERS
            held = plan.stages >= _MIN_STAGES and columns * plan.groups <= _MOST_SUMS
            if held and k // 64 % split == 0 and (split == 1 or fits):
                yield plan


@dataclass(frozen=True)
class NextNorm:
    """What a product leaves of the RMSNorm of its output: `weighed`, the output times the norm's
    weights, and `squares` [tiles, rows], sums of its squares. `weight`: those weights."""

    weight: Operand
    weighed: Operand
    squares: Operand


@dataclass(frozen=True)
class InputNorm:
    """The RMSNorm that a product finishes whose x is weighed: see NextNorm."""

    squares: Operand
    eps: float


def squares_shape(plan: WidePlan, features: int) -> tuple[int, int]:
    """That of NextNorm's squares, for weights of so many rows."""
    return plan.tiles(features), plan.groups * _GROUP


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
    norm: InputNorm | None = None,
    next_norm: NextNorm | None = None,
) -> Launch:
    """out = x weightᵀ + bias for at most `plan.rows` rows; the options are those of
    `stream.stream_gemm`. most_rows: how many rows of x there is memory for. norm: x is what an
    earlier product left as `next_norm`; such are bfloat16 alone, for what is weighed may be too
    much for float16."""
    weights = (next_norm.weight, next_norm.weighed) if next_norm else ()
    dtype = same_dtype(out, x, weight, bias, residual, *weights)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    require(dtype != "float32", "wide_gemm: 16 bits an element")
    require(k % (64 * plan.split) == 0, "wide_gemm: whole 64 columns in every part")
    require(x.features == k and x.contiguous, "wide_gemm: x is [rows, k], contiguous")
    require(x.offset % 8 == 0, "wide_gemm: x is aligned to 16 bytes")
    require(not (norm or next_norm) or dtype == "bfloat16", "wide_gemm: a norm of bfloat16")
    require(norm is None or norm.squares.shape[1] == plan.groups * _GROUP, "wide_gemm: squares")
    if next_norm:
        require(activation is None and out.contiguous, "wide_gemm: weighs whole rows")
        require(next_norm.weighed.row_stride == out.row_stride, "wide_gemm: strides")
        require(next_norm.squares.shape == squares_shape(plan, features), "wide_gemm: squares")
    stored = (out.features, *(n for o in (out, residual) if o for n in (o.row_stride, o.offset)))
    require(all(n % 4 == 0 for n in stored), "wide_gemm: features are stored by fours")
    require(residual is None or residual.row_stride == out.row_stride, "wide_gemm: strides")
    fused = fused_defines(
        "wide_gemm", out, weight, bias=bias, residual=residual, norm_weight=None,
        activation=activation,
    )  # fmt: skip
    norms = norm.squares.shape[0] if norm else 0
    assert isinstance(norms, int)
    fused |= {"NORM": norms, "WEIGHS": int(next_norm is not None)}
    halves = 2 if activation else 1
    require(plan.columns % 16 == 0, "wide_gemm: columns of a tile")
    weight_map = TensorMap(weight, halves, (1, halves, plan.columns // halves, 64))
    rows = TensorMap(x, 1, (1, 1, plan.rows, 64), most_rows)
    left = (next_norm.weighed, next_norm.weight, next_norm.squares) if next_norm else (None,) * 3
    arguments = (
        out, rows, weight_map, bias, residual, *left, norm.squares if norm else None,
        scratch.partial, scratch.counters, extent(x.shape[0]), features, out.row_stride,
        Float(norm.eps if norm else 0.0),
    )  # fmt: skip
    spec = specialised(
        "wide_gemm.cu", "wide_gemm", dtype, K=k, ROWS=plan.rows, COLUMNS=plan.columns,
        SPLIT=plan.split, STAGES=plan.stages, **fused,
    )  # fmt: skip
    blocks = min(plan.tiles(features) * plan.split, plan.blocks)
    threads = plan.groups * 128 + (64 if norm else 32)
    return Launch(spec, arguments, (blocks, 1, 1), threads, plan.shared_bytes)
