"""The launches of attention_plan.cu and wide_attention.cu: attention of prompts, and of prompts and
single tokens together, on GPUs of compute capability 9.0."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.attention import Cache
from llmforge.kernels.launch import (
    DTYPE_BYTES,
    Float,
    HeadsMap,
    Launch,
    Operand,
    Size,
    require,
    same_dtype,
    specialised,
)

_WARPGROUPS, _ROWS = 2, 64  # of a block, that multiply, and the rows of each
_THREADS = (_WARPGROUPS + 1) * 128
_SHARED_BYTES = (227 << 10) - 2048  # of a block: its barriers, and to where the tiles can begin
_MAX_STAGES = 4  # of a ring
_MIN_TILES = 4  # of keys and of values: one is multiplied while another comes
_PLAN_THREADS = 1024
ITEM_INTS = 4  # of the plan, an item


@dataclass(frozen=True)
class AttentionPlan:
    """How wide_attention.cu works on heads of this size: query heads a kv head, and KEYS of a tile
    there."""

    group: int
    head_dim: int
    keys: int

    @property
    def tokens(self) -> int:
        """Of an item at most."""
        return _WARPGROUPS * (_ROWS // self.group)

    @property
    def stages(self) -> tuple[int, int, int]:
        """KEY_STAGES, VALUE_STAGES and QUERY_STAGES in wide_attention.cu."""
        queries = 2 if self._tiles_beside(2) >= _MIN_TILES else 1
        tiles = min(self._tiles_beside(queries), 2 * _MAX_STAGES)
        return -(-tiles // 2), tiles // 2, queries

    @property
    def shared_bytes(self) -> int:
        keys, values, queries = self.stages
        return (keys + values) * self._tile_bytes + queries * self._query_bytes + 1024

    def _tiles_beside(self, queries: int) -> int:
        """For how many tiles there is room beside the queries of so many items."""
        return (_SHARED_BYTES - queries * self._query_bytes) // self._tile_bytes

    @property
    def _row_bytes(self) -> int:
        return -(-self.head_dim // 64) * 128

    @property
    def _tile_bytes(self) -> int:
        return self.keys * self._row_bytes

    @property
    def _query_bytes(self) -> int:
        return _WARPGROUPS * _ROWS * self._row_bytes

    def items(self, tokens: int, sequences: int) -> int:
        """Of a step at most."""
        return min(tokens, tokens // self.tokens + sequences)

    def page(self, block_size: int) -> int:
        """PAGE in wide_attention.cu."""
        return min(block_size, self.keys)


def wide_attention_plan(
    dtype: str, heads: int, kv_heads: int, head_dim: int, block_size: int, keys: int | None = None
) -> AttentionPlan | None:
    """The plan for such a cache, or None where the kernel does not take it. `keys`: of a
    tile, where not as many as were fastest."""
    group = heads // kv_heads
    if dtype == "float32" or head_dim % 16 or head_dim > 256 or group > _ROWS:
        return None
    plan = AttentionPlan(group, head_dim, keys or (128 if head_dim <= 128 else 64))
    page = plan.page(block_size)
    if block_size % page or plan.keys % page or page % 8 or plan.keys // page > 32:
        return None
    return plan


def list_items(out: Operand, cache: Cache, plan: AttentionPlan, *, window: int | None) -> Launch:
    """What `wide_attention` has to do in a step: out int32 [1 + items, ITEM_INTS]."""
    require(out.dtype == "int32" and out.features == ITEM_INTS, "attention_plan: out")
    spec = specialised(
        "attention_plan.cu", "attention_plan", "float32",
        GROUP=plan.group, KEYS=plan.keys, WINDOW=window or 0,
    )  # fmt: skip
    arguments = (out, cache.query_starts, cache.kv_lens, Size("sequences"))
    return Launch(spec, arguments, (1, 1, 1), _PLAN_THREADS)


def wide_attention(
    out: Operand,
    q: Operand,
    cache: Cache,
    items: Operand,
    plan: AttentionPlan,
    most_tokens: int,
    most_blocks: int,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
) -> Launch:
    """Causal attention as attention.attention has it, of sequences of any number of new tokens.
    items: by `list_items` for this plan and window, earlier in the step. most_tokens, most_blocks:
    how many of q, and of the cache, there is memory for."""
    dtype = same_dtype(out, q, cache.keys, cache.values)
    heads = q.features // cache.head_dim
    require(q.contiguous and out.contiguous, "wide_attention: q and out must be contiguous")
    require(plan.group == heads // cache.kv_heads, "wide_attention: a plan for other heads")
    require(plan.head_dim == cache.head_dim, "wide_attention: a plan for other heads")
    require(items.features == ITEM_INTS, "wide_attention: items")
    require(scale > 0, "wide_attention: the largest score has the largest weight")
    aligned = all(o.offset * DTYPE_BYTES[dtype] % 16 == 0 for o in (out, q))
    require(aligned, "wide_attention: rows start at multiples of 16 bytes")
    key_stages, value_stages, query_stages = plan.stages
    spec = specialised(
        "wide_attention.cu", "wide_attention", dtype,
        HEADS=heads, GROUP=plan.group, WINDOW=window or 0, CAP=int(soft_cap is not None),
        KEYS=plan.keys, KEY_STAGES=key_stages, VALUE_STAGES=value_stages,
        QUERY_STAGES=query_stages, **cache.defines,
    )  # fmt: skip
    queries = HeadsMap(
        q, heads, cache.head_dim, most_tokens, plan.group, plan.tokens // _WARPGROUPS
    )
    slots, page = most_blocks * cache.block_size, plan.page(cache.block_size)
    keys, values = (
        HeadsMap(o, cache.kv_heads, cache.head_dim, slots, 1, page)
        for o in (cache.keys, cache.values)
    )
    arguments = (
        out, queries, keys, values, items, cache.block_table, Float(scale), Float(soft_cap or 0.0),
    )  # fmt: skip
    grid = (Size("processors"), 1, 1)
    return Launch(spec, arguments, grid, _THREADS, plan.shared_bytes)
