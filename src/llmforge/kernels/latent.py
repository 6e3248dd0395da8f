"""Launches of attention over a cache of latents (csrc/latent.cu)."""

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

_WARPS = 4


@dataclass(frozen=True)
class LatentCache:
    """A layer's cache of latents [blocks, block_size, 1, rank + dim], and the step's tables."""

    latents: Operand
    query_starts: Operand
    kv_lens: Operand
    block_table: Operand
    rank: int
    dim: int
    block_size: int
    table_stride: int

    def defines(self, heads: int) -> dict[str, int]:
        """For `heads` query heads; the largest number of them that share a block divides them."""
        shared = next(n for n in (4, 2, 1) if heads % n == 0)
        return {
            "RANK": self.rank, "DIM": self.dim, "BLOCK_SIZE": self.block_size, "HEADS": heads,
            "TABLE_STRIDE": self.table_stride, "SHARED": shared, "WARPS": _WARPS,
        }  # fmt: skip


def store_latents(
    cache: LatentCache, latent: Operand, k_rope: Operand, positions: Operand
) -> Launch:
    """latent | k_rope of the new tokens into the cache."""
    dtype = same_dtype(cache.latents, latent, k_rope)
    require((latent.features, k_rope.features) == (cache.rank, cache.dim), "store_latents: sizes")
    spec = specialised("latent.cu", "store_latents", dtype, **cache.defines(1))
    arguments = (
        cache.latents, latent, k_rope, positions, cache.query_starts, cache.block_table,
        Size("sequences"), latent.row_stride, k_rope.row_stride,
    )  # fmt: skip
    return Launch(spec, arguments, (extent(latent.shape[0]), 1, 1), 128)


def latent_attention(
    out: Operand, q: Operand, q_rope: Operand, cache: LatentCache, *, scale: float
) -> Launch:
    """Causal attention of q | q_rope of each head over the cache, which holds the new tokens
    already; the values are the first `rank` elements of the keys."""
    dtype = same_dtype(out, q, q_rope, cache.latents)
    heads = q.features // cache.rank
    require(q.features == heads * cache.rank and out.shape == q.shape, "latent_attention: q")
    require(q_rope.features == heads * cache.dim and out.contiguous, "latent_attention: q_rope")
    defines = cache.defines(heads)
    spec = specialised("latent.cu", "latent_attention", dtype, **defines)
    arguments = (
        out, q, q_rope, cache.latents, cache.query_starts, cache.kv_lens, cache.block_table,
        Size("sequences"), q.row_stride, q_rope.row_stride, Float(scale),
    )  # fmt: skip
    grid = (heads // defines["SHARED"], extent(q.shape[0]), 1)
    return Launch(spec, arguments, grid, _WARPS * 32)
