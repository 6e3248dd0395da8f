"""The launches of decode_plan.cu and decode_attention.cu: a decode step's attention with all that
precedes it, and how the step's keys are divided for that."""

from __future__ import annotations

from collections.abc import Iterator
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

MAX_BLOCKS = 8 * 192  # of a grid; the largest GPUs have fewer than 192 multiprocessors
_PROCESSORS = 132  # for which the warps of a block are chosen
_UNIT = 16  # keys that a warp takes at a time
_MAX_STAGES = 16
_STATIC_BYTES = 48 << 10
_SYSTEM_BYTES = 1 << 10  # of a block
_PLAN_THREADS = 512
LEAST_ROOM = 99 << 10  # shared memory of a multiprocessor on the GPUs that have least


@dataclass(frozen=True)
class DecodeTuning:
    """warps: of a block; None: as many as suit the number of sequences and kv heads. ring_bytes: of
    a multiprocessor's rings; few_ring_bytes: the same for so few sequences that a block has all of
    a multiprocessor's warps, and is to leave room for the blocks of the products before and behind.
    pair_cost, join_cost: what a part of a sequence's keys, and dividing them, counts
    (decode_plan.cu)."""

    warps: int | None = None
    ring_bytes: int = 128 << 10
    few_ring_bytes: int = 64 << 10
    pair_cost: int = 5
    join_cost: int = 4


DEFAULT_TUNING = DecodeTuning()


@dataclass(frozen=True)
class DecodePlan:
    """The most sequences of a step; warps of a block, slots of each one's ring, the block's dynamic
    shared memory, blocks of a multiprocessor, and DecodeTuning's costs."""

    sequences: int
    warps: int
    stages: int
    shared_bytes: int
    blocks: int
    pair_cost: int
    join_cost: int

    @property
    def grid(self) -> Size:
        """Blocks, of which each has a part of the keys."""
        return Size("processors", self.blocks, most=MAX_BLOCKS)

    @property
    def block_ints(self) -> int:
        """PLAN_INTS of decode_plan.cuh."""
        return 8 + -(-self.warps // 4) * 4


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
    """The plan for steps of at most so many sequences where a multiprocessor has `room` bytes of
    shared memory, or None where the kernel does not take them."""
    group = heads // kv_heads
    if dtype == "float32" or head_dim % 8 or rope_dim % 4 or group > 16:
        return None
    if (2 * sequences + 1) * 4 > _STATIC_BYTES:
        return None
    # Long rows fill the registers, many rows the shared memory in which warps join.
    most = 8 if head_dim <= 128 and group <= 8 and room > LEAST_ROOM else 4
    slot = _UNIT * -(-head_dim // 64) * 64 * DTYPE_BYTES[dtype]
    for warps in _suiting(most, sequences * kv_heads, tuning.warps):
        ring_bytes = tuning.few_ring_bytes if warps == most else tuning.ring_bytes
        stages = min(min(ring_bytes, room * 2 // 3) // (most * slot), _MAX_STAGES)
        # Parts, a head a warp; heads and their biases, norms, angles.
        static = warps * (group * (head_dim + 4) * 4 + head_dim * 4)
        static += (2 * (group + 2) + 2) * head_dim * DTYPE_BYTES[dtype] + rope_dim * 4 + 256
        dynamic = warps * stages * slot
        blocks = min(most // warps, room // (static + dynamic + _SYSTEM_BYTES))
        if stages > 1 and static <= _STATIC_BYTES and blocks > 0:
            costs = tuning.pair_cost, tuning.join_cost
            return DecodePlan(sequences, warps, stages, dynamic, blocks, *costs)
    return None


def _suiting(most: int, pairs: int, wanted: int | None) -> Iterator[int]:
    """Warps of a block, the best first, where a multiprocessor has room for `most`: so many that
    each block has about one pair of sequence and kv head."""
    warps = wanted or most
    while warps > 1 and not wanted and warps * pairs > most * _PROCESSORS:
        warps //= 2
    while warps:
        yield warps
        warps //= 2


@dataclass(frozen=True)
class PartScratch:
    """What blocks that share a sequence's keys need to join their parts: `partial` float32
    [2 MAX_BLOCKS, part_size], `counters` int32 zeros, MAX_BLOCKS of them."""

    partial: Operand
    counters: Operand


def part_size(heads: int, kv_heads: int, head_dim: int) -> int:
    """Floats of the part of a sequence and kv head."""
    return heads // kv_heads * (head_dim + 4)


def divide_keys(out: Operand, cache: Cache, plan: DecodePlan, *, window: int | None) -> Launch:
    """What each block of `decode_attention` has of a step's keys: out int32 [MAX_BLOCKS,
    plan.block_ints]."""
    require(out.dtype == "int32" and out.features == plan.block_ints, "decode_plan: out")
    spec = specialised(
        "decode_plan.cu", "decode_plan", "float32",
        WARPS=plan.warps, BLOCKS=plan.blocks, MOST=MAX_BLOCKS, PAIR_COST=plan.pair_cost,
        JOIN_COST=plan.join_cost, WINDOW=window or 0, KV_HEADS=cache.kv_heads,
        BLOCK_SIZE=cache.block_size, TABLE_STRIDE=cache.table_stride,
    )  # fmt: skip
    sizes = Size("sequences"), Size("processors")
    arguments = (out, cache.kv_lens, cache.block_table, *sizes)
    shared = (2 * plan.sequences + 1) * 4
    return Launch(spec, arguments, (1, 1, 1), _PLAN_THREADS, shared)


def decode_attention(
    out: Operand,
    q: Operand,
    k: Operand,
    v: Operand,
    cache: Cache,
    division: Operand,
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
    them; k and v go into the cache. division: by `divide_keys` for this plan and window, earlier in
    the step, in memory that nothing else writes. `soft_cap` and `sinks` (one a head) change the
    scores as scored_attention does."""
    dtype = same_dtype(out, q, k, v, cache.keys, cache.values, *steps.operands[:3], sinks)
    heads, kv_heads = q.features // cache.head_dim, cache.kv_heads
    require(k.features == v.features == kv_heads * cache.head_dim, "decode_attention: k, v, cache")
    require(out.contiguous and out.features == q.features, "decode_attention: out is as q")
    aligned = load_width(q, k, v, run=cache.head_dim) * DTYPE_BYTES[dtype] == 16
    require(aligned, "decode_attention: heads start at multiples of 16 bytes")
    floats = part_size(heads, kv_heads, cache.head_dim)
    require(scratch.partial.features == floats, "decode_attention: parts of another size")
    require(division.features == plan.block_ints, "decode_attention: a division for other blocks")
    spec = specialised(
        "decode_attention.cu", "decode_attention", dtype,
        HEADS=heads, GROUP=heads // kv_heads, WINDOW=window or 0, WARPS=plan.warps,
        BLOCKS=plan.blocks, STAGES=plan.stages, CAP=int(soft_cap is not None),
        SINKS=int(sinks is not None), **steps.defines, **cache.defines,
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        out, cache.keys, cache.values, q, k, v, *steps.operands, sinks, cache.kv_lens,
        cache.block_table, division, scratch.partial, scratch.counters, Size("sequences"),
        q.row_stride, k.row_stride, v.row_stride, Float(steps.eps), Float(scale),
        Float(soft_cap or 0.0),
    )  # fmt: skip
    return Launch(spec, arguments, (plan.grid, 1, 1), plan.warps * 32, plan.shared_bytes)
