"""Attention whose scores are capped or lowered by distance, which torch's fused kernel cannot do.

Like the fused path (attention.py) it gives a query the same bits in any step: every product is of
the same shape, `ROW_TILE` rows of queries with one whole run of `KEY_RUN` keys, and the runs are
added up in order, each rescaled to the largest score so far (https://arxiv.org/abs/1805.02867).
A run of which a query sees nothing leaves its sum as it was, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.engine.cpu.attention import KEY_RUN, ROW_TILE, Queries, odd_rows, run_attention

Tensor = torch.Tensor

_LOWEST = -1e30  # below every score, and finite: its difference with itself is zero


def scored_attention(
    inputs: Sequence[Any], attrs: Mapping[str, Any], context: Any
) -> tuple[Tensor]:
    """The cpu target's row for the op `scored_attention`; see attention.py."""
    attend = functools.partial(_attend, sinks=inputs[8], attrs=attrs)
    return run_attention(inputs[:8], attrs, context, attend)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Queries,
    *,
    sinks: Tensor | None,
    attrs: Mapping[str, Any],
) -> Tensor:
    groups, count, heads, head_dim = q.shape
    kv_heads, block_size = keys.shape[0], keys.shape[2]
    # As in attention.py: row j * queries + i is query i of head j of those that share a kv head.
    rows = q.view(groups, count, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    num_rows = rows.shape[2]
    padding = odd_rows(num_rows)
    rows = F.pad(rows.float(), (0, 0, 0, padding))
    group = heads // kv_heads
    positions = F.pad(queries.positions.repeat(1, group), (0, padding))

    def by_row(per_head: Tensor) -> Tensor:
        """[kv_heads, rows] of a value for each query head."""
        return F.pad(per_head.view(kv_heads, group).repeat_interleave(count, 1), (0, padding))

    slopes = by_row(torch.tensor(attrs["slopes"])) if attrs["slopes"] else None
    sums = torch.zeros(*rows.shape[:3], head_dim)
    # A sink is a key of value zero that is seen before all others.
    weights = torch.full((*rows.shape[:3], 1), float(sinks is not None))
    highest = torch.full_like(weights, _LOWEST)
    if sinks is not None:
        highest[:] = by_row(sinks.float())[..., None]
    run_blocks = KEY_RUN // block_size
    for run in range(queries.num_keys // KEY_RUN):
        chosen = queries.blocks[:, run * run_blocks : (run + 1) * run_blocks]
        run_keys, run_values = (_gather(cache, chosen) for cache in (keys, values))
        first = queries.first[:, None] + run * KEY_RUN
        behind = positions[:, :, None] - (first + torch.arange(KEY_RUN))[:, None]
        for row in range(0, rows.shape[2], ROW_TILE):
            tile = slice(row, row + ROW_TILE)
            scores = _product(rows[:, :, tile], run_keys.transpose(-1, -2)) * attrs["scale"]
            if attrs["soft_cap"] is not None:
                scores = scores.div_(attrs["soft_cap"]).tanh_().mul_(attrs["soft_cap"])
            distance = behind[:, None, tile]
            if slopes is not None:
                scores -= slopes[:, tile, None] * distance
            hidden = distance < 0
            if attrs["window"] is not None:
                hidden = hidden | (distance >= attrs["window"])
            scores.masked_fill_(hidden, -torch.inf)
            before = highest[:, :, tile]
            now = torch.maximum(before, scores.amax(-1, keepdim=True))
            kept, parts = (before - now).exp(), (scores - now).exp()
            sums[:, :, tile] = sums[:, :, tile] * kept + _product(parts, run_values)
            weights[:, :, tile] = weights[:, :, tile] * kept + parts.sum(-1, keepdim=True)
            highest[:, :, tile] = now
    out: Tensor = (sums / weights)[:, :, :num_rows].unflatten(2, (-1, count))
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim).to(q.dtype)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """[groups, kv_heads, KEY_RUN, head_dim] float32 of the cache's `blocks` [groups, ...]."""
    kv_heads, _, _, head_dim = cache.shape
    chosen = cache.index_select(1, blocks.flatten())
    return chosen.view(kv_heads, len(blocks), KEY_RUN, head_dim).transpose(0, 1).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, a matrix for each of the first two dimensions."""
    product: Tensor = torch.bmm(a.flatten(0, 1).contiguous(), b.flatten(0, 1))
    return product.view(*a.shape[:-1], b.shape[-1])
