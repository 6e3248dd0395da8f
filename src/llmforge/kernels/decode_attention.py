"""The launch of decode_attention.cu: a decode step's attention with all that precedes it."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.attention import Cache, QkvSteps
from llmforge.kernels.launch import (
    DTYPE_BYTES,
    Argument,
    Float,
    Launch,
    Operand,
    Size,
    load_width,
    require,
    same_dtype,
    specialised,
)

MAX_BLOCKS = 512  # of a grid; two a multiprocessor
_UNIT = 16  # keys that a warp takes at a time
_MAX_STAGES = 8
_STATIC_BYTES = 48 << 10
LEAST_ROOM = 99 << 10  # shared memory of a block on the GPUs that have least


@dataclass(frozen=True)
class DecodeTuning:
    """ring_bytes: of a block's rings. join_cost: what dividing the keys of a sequence counts, in
    halves of 16 keys (decode_plan.cuh)."""

    ring_bytes: int = 64 << 10
    join_cost: int = 32


DEFAULT_TUNING = DecodeTuning()


@dataclass(frozen=True)
class DecodePlan:
    """Warps of a block, slots of each one's ring, the block's dynamic shared memory, and
    DecodeTuning's join_cost."""

    warps: int
    stages: int
    shared_bytes: int
    join_cost: int


def decode_plan(
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope_dim: int,
    sequences: int,
    tuning: DecodeTuning = DEFAULT_TUNING,
    room: int = LEAST_ROOM,
) -> DecodePlan | None:
    """The plan for steps of at most so many sequences in `room` bytes of shared memory, or None
    where the kernel does not take them."""
    group = heads // kv_heads
    if dtype == "float32" or head_dim % 8 or rope_dim % 4 or group > 16:
        return None
    # Long rows fill the registers, many rows the shared memory in which warps join.
    warps = 4 if head_dim <= 128 and group <= 8 else 2
    slot = 2 * _UNIT * -(-head_dim // 64) * 64 * DTYPE_BYTES[dtype]
    stages = min(tuning.ring_bytes // (warps * slot), _MAX_STAGES)
    parts = warps * group * (head_dim + 2) * 4
    # Heads and their biases, norms, angles, and a head a warp.
    rows = (2 * (group + 2) + 2) * head_dim * DTYPE_BYTES[dtype]
    static = parts + rows + rope_dim * 4 + warps * head_dim * 4 + 256
    dynamic = warps * stages * slot + (2 * sequences + 1) * 4
    if stages < 2 or static > _STATIC_BYTES or static + dynamic > room:
        return None
    return DecodePlan(warps, stages, dynamic, tuning.join_cost)


@dataclass(frozen=True)
class PartScratch:
    """What blocks that share a sequence's keys need to join their parts: `partial` float32
    [2 MAX_BLOCKS, part_size], `counters` int32 zeros, MAX_BLOCKS of them."""

    partial: Operand
    counters: Operand


def part_size(heads: int, kv_heads: int, head_dim: int) -> int:
    """Floats of the part of a sequence and kv head."""
    return heads // kv_heads * (head_dim + 2)


def decode_attention(
    out: Operand,
    q: Operand,
    k: Operand,
    v: Operand,
    cache: Cache,
    scratch: PartScratch,
    plan: DecodePlan,
    steps: QkvSteps,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    sinks: Operand | None = None,
) -> Launch:
    """Attention of one new token a sequence, from the rows of q | k | v as attention.qkv takes
    them; k and v go into the cache. `soft_cap` and `sinks` (one a head) change the scores as
    scored_attention does."""
    dtype = same_dtype(out, q, k, v, cache.keys, cache.values, *steps.operands[:3], sinks)
    heads, kv_heads = q.features // cache.head_dim, cache.kv_heads
    require(k.features == v.features == kv_heads * cache.head_dim, "decode_attention: k, v, cache")
    require(out.contiguous and out.features == q.features, "decode_attention: out is as q")
    aligned = load_width(q, k, v, run=cache.head_dim) * DTYPE_BYTES[dtype] == 16
    require(aligned, "decode_attention: heads start at multiples of 16 bytes")
    floats = part_size(heads, kv_heads, cache.head_dim)
    require(scratch.partial.features == floats, "decode_attention: parts of another size")
    spec = specialised(
        "decode_attention.cu", "decode_attention", dtype,
        HEADS=heads, GROUP=heads // kv_heads, WINDOW=window or 0, WARPS=plan.warps,
        STAGES=plan.stages, JOIN_COST=plan.join_cost, CAP=int(soft_cap is not None),
        SINKS=int(sinks is not None), **steps.defines, **cache.defines,
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        out, cache.keys, cache.values, q, k, v, *steps.operands, sinks,
        cache.kv_lens, cache.block_table, scratch.partial, scratch.counters, Size("sequences"),
        q.row_stride, k.row_stride, v.row_stride, Float(steps.eps), Float(scale),
        Float(soft_cap or 0.0),
    )  # fmt: skip
    grid = (Size("processors", 2, most=MAX_BLOCKS), 1, 1)
    return Launch(spec, arguments, grid, plan.warps * 32, plan.shared_bytes)
