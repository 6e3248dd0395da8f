"""Attention over the paged KV cache with torch's fused kernel.

Where each sequence's keys lie is worked out once a step and shared by all layers
(`AttentionPlan`); sequences that add one token (decode) are attended to together, those that add
more (prefill) one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Decode:
    """Sequences with one new token: their row of the step, the cache slots of what they attend
    to [sequences, longest], and which of those entries are theirs [sequences, 1, 1, longest]
    (None where all are)."""

    rows: Tensor
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Prefill:
    """A sequence with several new tokens: its rows of the step, the cache slots that it attends
    to, and the mask [rows, slots] (None: causal from the first slot on)."""

    rows: slice
    slots: Tensor | slice
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """Where the step's new tokens go in the cache, and what they attend to under one window."""

    new_slots: Tensor
    decode: _Decode | None
    prefills: tuple[_Prefill, ...]

    @classmethod
    def of(
        cls,
        query_starts: Tensor,
        kv_lens: Tensor,
        block_table: Tensor,
        block_size: int,
        window: int | None,
    ) -> AttentionPlan:
        lengths = query_starts.diff()
        kv = kv_lens.tolist()
        table = block_table.long()

        def slots_of(sequence: int, start: int, stop: int) -> Tensor:
            positions = torch.arange(start, stop)
            return table[sequence, positions // block_size] * block_size + positions % block_size

        new = [
            slots_of(i, kv[i] - n, kv[i]) for i, n in enumerate(lengths.tolist())
        ]
        bounds = query_starts.tolist()
        single = (lengths == 1).nonzero().flatten().tolist()
        prefills = tuple(
            _prefill(slice(bounds[i], bounds[i + 1]), kv[i], window, slots_of, i)
            for i in range(len(kv))
            if bounds[i + 1] - bounds[i] > 1
        )
        decode = _decode([bounds[i] for i in single], single, kv, window, slots_of)
        return cls(torch.cat(new), decode, prefills)


def _decode(
    rows: Sequence[int], sequences: Sequence[int], kv: Sequence[int], window: int | None, slots_of: Any
) -> _Decode | None:
    if not sequences:
        return None
    spans = [min(kv[i], window or kv[i]) for i in sequences]
    longest = max(spans)
    slots = torch.empty((len(sequences), longest), dtype=torch.long)
    for row, (i, span) in enumerate(zip(sequences, spans, strict=True)):
        slots[row, :span] = slots_of(i, kv[i] - span, kv[i])
        # Masked entries repeat a slot of the same sequence: whatever another sequence's or an
        # unused slot holds, even NaN, cannot reach this one.
        slots[row, span:] = slots[row, 0]
    mask = None
    if min(spans) < longest:
        mask = (torch.arange(longest) < torch.tensor(spans)[:, None])[:, None, None, :]
    return _Decode(torch.tensor(rows), slots, mask)


def _prefill(
    rows: slice, kv_len: int, window: int | None, slots_of: Any, sequence: int
) -> _Prefill:
    new = rows.stop - rows.start
    first = 0 if window is None else max(0, kv_len - new - window + 1)
    slots: Tensor = slots_of(sequence, first, kv_len)
    mask = None
    if new < kv_len or (window is not None and window < kv_len):
        behind = torch.arange(kv_len - new, kv_len)[:, None] - torch.arange(first, kv_len)
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    start = int(slots[0])
    contiguous = bool((slots == torch.arange(start, start + len(slots))).all())
    return _Prefill(rows, slice(start, start + len(slots)) if contiguous else slots, mask)


def attention(inputs: Sequence[Any], attrs: Mapping[str, Any], context: Any) -> tuple[Tensor]:
    """The cpu target's row for the op `attention`; `context.plan` gives the AttentionPlan."""
    q, k, v, key_cache, value_cache, query_starts, kv_lens, block_table = inputs
    head_dim, scale, window = attrs["head_dim"], attrs["scale"], attrs["window"]
    plan: AttentionPlan = context.plan(
        query_starts, kv_lens, block_table, key_cache.shape[1], window
    )
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    keys, values = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    keys.index_copy_(0, plan.new_slots, k)
    values.index_copy_(0, plan.new_slots, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    if plan.decode:
        out[plan.decode.rows] = _attend_decode(q, keys, values, plan.decode, scale)
    for prefill in plan.prefills:
        out[prefill.rows] = _attend_prefill(q, keys, values, prefill, scale)
    return (out.flatten(-2),)


def _attend_decode(q: Tensor, keys: Tensor, values: Tensor, plan: _Decode, scale: float) -> Tensor:
    kv_heads, head_dim = keys.shape[1:]
    sequences, longest = plan.slots.shape
    index = plan.slots.flatten()

    def gather(cache: Tensor) -> Tensor:
        rows = cache.index_select(0, index)
        return rows.view(sequences, longest, kv_heads, head_dim).transpose(1, 2)

    # The query heads that share a kv head stand as the rows of one attention over it.
    grouped = q[plan.rows].unflatten(1, (kv_heads, -1))
    out = F.scaled_dot_product_attention(
        grouped, gather(keys), gather(values), attn_mask=plan.mask, scale=scale
    )
    return out.flatten(1, 2)


def _attend_prefill(
    q: Tensor, keys: Tensor, values: Tensor, plan: _Prefill, scale: float
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q[plan.rows].transpose(0, 1)[None],
        keys[plan.slots].transpose(0, 1)[None],
        values[plan.slots].transpose(0, 1)[None],
        attn_mask=plan.mask,
        is_causal=plan.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
