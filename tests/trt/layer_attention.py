"""Attention, its cache, and rotary embedding."""

from __future__ import annotations

import torch
from layer_table import INTEGERS, Tensor, in_range, layer, wide


@layer("ROTARY_EMBEDDING")
def _rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool,
    rotary_embedding_dim: int,
) -> Tensor:
    assert x.ndim == 4, "heads stand before tokens: [B, H, S, D]"
    assert x.dtype == cos.dtype == sin.dtype, f"tables of {cos.dtype} for {x.dtype}"
    dim = rotary_embedding_dim or x.shape[-1]
    if positions is not None:
        assert cos.ndim == 2, "tables by position are [positions, dim / 2]"
        rows = in_range(positions, cos.shape[0])
        cos, sin = cos[rows], sin[rows]
    assert cos.shape == (x.shape[0], x.shape[2], dim // 2), f"tables {tuple(cos.shape)}"
    cos, sin = wide(cos)[:, None], wide(sin)[:, None]
    turning, rest = wide(x).split((dim, x.shape[-1] - dim), dim=-1)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined, rest), dim=-1).to(x.dtype)


@layer("KV_CACHE_UPDATE")
def _kv_cache_update(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor,
    update_lengths: Tensor | None = None,
    *,
    cache_mode: str,
    update_form: str,
) -> Tensor:
    """In place: the output is the cache's own memory. Writes beyond the cache are ignored."""
    assert cache_mode == "LINEAR" and update_form == "PADDED_BHND" and update_lengths is None
    assert cache.dtype == update.dtype and write_indices.dtype in INTEGERS
    assert cache.shape[:2] == update.shape[:2] and cache.shape[3] == update.shape[3]
    assert len(write_indices) == len(cache)
    capacity = cache.shape[2]
    for row, start in enumerate(write_indices.tolist()):
        count = min(update.shape[2], capacity - start)
        if count > 0 and start >= 0:
            cache[row, :, start : start + count] = update[row, :, :count]
    return cache


@layer("ATTENTION_INPUT")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    quantize_scale: Tensor | None = None,
    query_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    *,
    causal: str,
    norm: str,
    num_ranks: int,
    forms: tuple[str, str],
) -> Tensor:
    """softmax(q kᵀ + mask) v, with no scale. What is masked has the weight 0, which makes NaN of
    a NaN in memory that nobody has written."""
    assert norm == "SOFTMAX" and num_ranks == 1 and forms == ("PADDED_BHND", "PADDED_BHND")
    assert quantize_scale is None and query_lengths is None
    assert q.dtype == k.dtype == v.dtype, "attention of several dtypes"
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[0] == k.shape[0]
    batch, heads, new, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    keys, values = (wide(t).repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.matmul(wide(q), keys.mT)
    if mask is not None:
        assert causal == "NONE", "a mask beside a causal kind is dropped"
        assert mask.ndim == 4 and mask.dtype in (torch.bool, q.dtype), mask.dtype
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + wide(mask)
    columns = torch.arange(length)
    ends = torch.full((batch,), length) if kv_lengths is None else kv_lengths.long()
    scores = scores.masked_fill(columns >= ends[:, None, None, None], -torch.inf)
    if causal != "NONE":
        rows = torch.arange(new)[:, None]
        offset = ends - new if causal == "LOWER_RIGHT" else torch.zeros_like(ends)
        scores = scores.masked_fill(columns > rows + offset[:, None, None, None], -torch.inf)
    return torch.matmul(scores.softmax(-1), values).to(q.dtype)


@layer("ATTENTION_OUTPUT")
def _attention_output(x: Tensor) -> Tensor:
    return x
