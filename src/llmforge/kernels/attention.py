"""Launches of the attention kernels: what precedes attention, and attention over the cache."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import (
    DTYPE_BYTES,
    Argument,
    Extent,
    Float,
    Launch,
    Operand,
    Size,
    extent,
    load_width,
    require,
    same_dtype,
    specialised,
)


@dataclass(frozen=True)
class Cache:
    """The paged KV cache of a layer, and the step's tables that say where things are."""

    keys: Operand
    values: Operand
    query_starts: Operand
    kv_lens: Operand
    block_table: Operand
    kv_heads: int
    head_dim: int
    block_size: int
    table_stride: int

    @property
    def defines(self) -> dict[str, int]:
        return {
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "TABLE_STRIDE": self.table_stride,
        }


@dataclass(frozen=True)
class QkvSteps:
    """What becomes of the rows of a merged q|k|v product before attention; what is None is left
    out. table: rope's angles. bias: that of q | k | v. eps: of the norms of q and k heads."""

    table: Operand | None = None
    bias: Operand | None = None
    q_norm: Operand | None = None
    k_norm: Operand | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        require((self.q_norm is None) == (self.k_norm is None), "q and k are normed, or neither")

    @property
    def defines(self) -> dict[str, int]:
        return {
            "BIAS": int(self.bias is not None),
            "NORM": int(self.q_norm is not None),
            "ROPE_DIM": self.table.features if self.table else 0,
        }

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        return self.bias, self.q_norm, self.k_norm, self.table


_AS_IT_IS = QkvSteps()


def qkv(
    q_out: Operand,
    q: Operand,
    k: Operand,
    v: Operand,
    cache: Cache,
    positions: Operand,
    steps: QkvSteps = _AS_IT_IS,
) -> Launch:
    """Bias, norm and rotate q and k; q to `q_out`, k and v into the cache: by qkv_pairs.cu where it
    takes the rows, else by qkv.cu."""
    dtype = same_dtype(q_out, q, k, v, cache.keys, cache.values, *steps.operands[:3])
    heads = q.features // cache.head_dim
    require(k.features == v.features == cache.kv_heads * cache.head_dim, "qkv: k, v and cache")
    require(q_out.contiguous and q_out.features == q.features, "qkv: q_out is q, contiguous")
    defines = {"HEADS": heads, **steps.defines, **cache.defines}
    arguments: tuple[Argument, ...] = (
        q_out, cache.keys, cache.values, q, k, v, *steps.operands, positions,
        cache.query_starts, cache.block_table, Size("sequences"),
        q.row_stride, k.row_stride, v.row_stride, Float(steps.eps),
    )  # fmt: skip
    tokens, threads = extent(q.shape[0]), 128
    if _in_pairs(dtype, (q_out, q, k, v), cache, steps):
        spec = specialised("qkv_pairs.cu", "qkv", dtype, THREADS=threads, **defines)
        return Launch(spec, arguments, (tokens, 1, 1), threads)
    warps = threads // 32
    spec = specialised("qkv.cu", "qkv", dtype, WARPS=warps, **defines)
    blocks = -(-(heads + 2 * cache.kv_heads) // warps)
    return Launch(spec, arguments, (tokens, blocks, 1), threads)


def _in_pairs(dtype: str, rows: tuple[Operand, ...], cache: Cache, steps: QkvSteps) -> bool:
    """Whether qkv_pairs.cu takes the rows of q and what becomes of them."""
    if dtype == "float32" or steps.q_norm is not None:
        return False
    rope_dim = steps.defines["ROPE_DIM"]
    biases = () if steps.bias is None else (steps.bias,)
    width = load_width(*rows, *biases, run=cache.head_dim)
    return width * DTYPE_BYTES[dtype] == 16 and not (cache.head_dim % 16 or rope_dim % 16)


@dataclass(frozen=True)
class SplitScratch:
    """What the blocks that share a sequence's keys need to join their results: `partial` float32,
    `counters` int32 zeros, and how many blocks at most share a sequence."""

    partial: Operand
    counters: Operand
    splits: int


def split_scratch_sizes(sequences: int, heads: int, head_dim: int, splits: int) -> tuple[int, int]:
    """Elements of `partial` and of `counters` (one a query head is enough)."""
    return sequences * heads * splits * (head_dim + 2), sequences * heads


def has_tensor_core_attention(dtype: str, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether attention_mma.cu covers this shape."""
    return dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128 and heads // kv_heads <= 16


def attention(
    out: Operand,
    q: Operand,
    cache: Cache,
    *,
    scale: float,
    window: int | None,
    split: SplitScratch | None = None,
    soft_cap: float | None = None,
    slopes: Operand | None = None,
    sinks: Operand | None = None,
) -> Launch:
    """Causal attention of contiguous q [tokens, heads * head_dim] over the cache, which holds the
    new tokens already. With `split`, every sequence has one new token. `soft_cap`, `slopes`
    (float32, one a head) and `sinks` (one a head) change the scores as scored_attention does."""
    dtype = same_dtype(out, q, cache.keys, cache.values, sinks)
    heads = q.features // cache.head_dim
    require(q.contiguous and out.contiguous, "attention: q and out must be contiguous")
    defines = {"HEADS": heads, "WINDOW": window or 0, **cache.defines}
    step = (cache.query_starts, cache.kv_lens, cache.block_table)
    plain = soft_cap is None and slopes is None and sinks is None
    covered = has_tensor_core_attention(dtype, heads, cache.kv_heads, cache.head_dim)
    if not (plain and covered):
        warps = 4
        defines |= {"CAP": int(soft_cap is not None), "SLOPES": int(slopes is not None)}
        defines["SINKS"] = int(sinks is not None)
        spec = specialised("attention_simple.cu", "attention_simple", dtype, WARPS=warps, **defines)
        arguments: tuple[Argument, ...] = (
            out, q, cache.keys, cache.values, *step,
            Size("tokens"), Size("sequences"), Float(scale), Float(soft_cap or 0.0), slopes,
            sinks,
        )  # fmt: skip
        return Launch(spec, arguments, (Size("tokens", heads, warps), 1, 1), warps * 32)
    group, warps = heads // cache.kv_heads, 4
    defines |= {"GROUP": group, "WARPS": warps, "OVER_KEYS": int(split is not None)}
    spec = specialised("attention_mma.cu", "attention", dtype, **defines)
    common = (out, q, cache.keys, cache.values, *step)
    if split is None:
        tiles = Size("longest_query", 1, warps * (16 // group))
        grid: tuple[Extent, Extent, Extent] = (tiles, cache.kv_heads, Size("sequences"))
        return Launch(spec, (*common, Float(scale)), grid, warps * 32)
    return Launch(
        spec,
        (*common, split.partial, split.counters, Float(scale)),
        (cache.kv_heads, Size("sequences"), split.splits),
        warps * 32,
    )
