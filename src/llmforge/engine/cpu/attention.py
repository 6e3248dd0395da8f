"""Attention over the paged KV cache with torch's fused kernel.

A query's result must not depend on what else is in its step. torch's kernel sums over keys in
runs of at most 512, and how it cuts the last run depends on the number of keys; so keys are always
handed over in whole runs of `KEY_RUN`, counted from position 0, with what is not visible masked.
The query heads that share a kv head stand as the rows of one attention over it, for one new token
(decode, all sequences at once) as for many (prefill, a sequence at a time), since the kernel's
path also depends on how the heads are laid out.

Where each sequence's keys lie is worked out once a step, in an `AttentionPlan` for all layers
with the same window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.checkpoint.config import DTYPE_BYTES
from llmforge.engine.step import Limits
from llmforge.model.graph import Graph

Tensor = torch.Tensor

KEY_RUN = 512
ROW_TILE = 8
_QUERY_CHUNK = 128


def new_cache(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A layer's key or value cache for the logical shape [blocks, block_size, kv_heads, head_dim],
    with one more block, which belongs to nobody and stays zero: it stands where a run of keys has
    none. The heads are outermost in memory, so that a head's keys are one matrix."""
    blocks, block_size, kv_heads, head_dim = shape
    heads_first = torch.zeros((kv_heads, blocks + 1, block_size, head_dim), dtype=dtype)
    return heads_first.permute(1, 2, 0, 3)


def attention_workspace(graph: Graph, limits: Limits) -> int:
    """The most bytes that attention needs in one step: the keys and values that one layer gathers
    for a full batch, and the masks of all layers' plans for a step that is one long prefill."""
    keys = _whole_runs(limits.max_seq_len)
    gathered, masks = 0, {}
    for node in graph.nodes:
        latent = node.op == "latent_attention"
        if latent or node.op in ("attention", "scored_attention"):
            q, k, cache = (graph.tensors[node.inputs[i]] for i in (0, 2, 4))
            kv_heads, size = int(cache.shape[2]), int(cache.shape[3])
            itemsize = DTYPE_BYTES[q.dtype]
            group = int(q.shape[-1]) // int(k.shape[-1])
            caches = 1 if latent else 2
            one = caches * limits.max_batch_size * keys * kv_heads * size * itemsize
            gathered = max(gathered, one)
            window = node.attrs.get("window")
            masks[window] = limits.max_num_tokens * group * keys * itemsize
    return gathered + sum(masks.values())


@dataclass(frozen=True)
class Queries:
    """Rows of the step that attend together, each group over its own run of cache blocks.

    rows: which rows of the step. blocks: of the keys [groups, blocks]. num_keys: how many of the
    blocks' keys take part. mask: added to the scores, [groups, 1, rows of the kernel, num_keys].
    positions: of the queries [groups, queries]. first: the position of the first key [groups].
    """

    rows: Tensor | slice
    blocks: Tensor
    num_keys: int
    mask: Tensor
    positions: Tensor
    first: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Where a step's keys and values go, and what its queries see.

    new_slots: for each new token, its place in the flattened blocks. fresh_blocks: the blocks
    that the step begins. What their last owner left in them is cleared, because a masked value
    still takes part as 0 * value, which is NaN where that is.
    """

    new_slots: Tensor
    fresh_blocks: Tensor
    decode: Queries | None
    prefill: tuple[Queries, ...]


@dataclass(frozen=True)
class Planner:
    """Makes the plan of a step for layers with one window.

    query_starts [B + 1], kv_lens [B], block_table [B, blocks] are the step's; group: query heads
    a kv head; zero_block: the cache's last block.
    """

    query_starts: Tensor
    kv_lens: Tensor
    block_table: Tensor
    block_size: int
    zero_block: int
    group: int
    window: int | None
    dtype: torch.dtype

    def plan(self) -> AttentionPlan:
        starts, lengths = self.query_starts[:-1], self.query_starts.diff()
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        before = self.kv_lens - lengths
        positions = torch.arange(len(sequence)) + (before - starts)[sequence]
        blocks = self.block_table[sequence, positions // self.block_size]
        offsets = positions % self.block_size
        single = (lengths == 1).nonzero().flatten()
        several = (lengths > 1).nonzero().flatten().tolist()
        return AttentionPlan(
            blocks * self.block_size + offsets,
            blocks[offsets == 0],
            self._decode(single) if len(single) else None,
            tuple(queries for index in several for queries in self._prefill(index)),
        )

    def _decode(self, sequences: Tensor) -> Queries:
        """All sequences with one new token, a group each."""
        position = self.kv_lens[sequences] - 1
        first = self._first_key(position)
        num_keys = _whole_runs(int((position + 1 - first).max()))
        keys = first[:, None] + torch.arange(num_keys)
        return Queries(
            self.query_starts[sequences],
            self._blocks(sequences, first, num_keys),
            num_keys,
            self._mask(position[:, None], keys)[:, None, None],
            position[:, None],
            first,
        )

    def _prefill(self, index: int) -> list[Queries]:
        """One sequence with several new tokens, in chunks of queries."""
        start, stop = self.query_starts[index : index + 2].tolist()
        before = int(self.kv_lens[index]) - stop
        first = self._first_key(torch.tensor([start + before]))
        blocks = self._blocks(torch.tensor([index]), first, _whole_runs(stop + before - int(first)))
        chunks = []
        for row in range(start, stop, _QUERY_CHUNK):
            end = min(row + _QUERY_CHUNK, stop)
            num_keys = _whole_runs(end + before - int(first))
            positions = torch.arange(row, end) + before
            mask = self._mask(positions[:, None], first + torch.arange(num_keys))
            rows = F.pad(mask.repeat(self.group, 1), (0, 0, 0, odd_rows(self.group * len(mask))))
            chunks.append(
                Queries(slice(row, end), blocks, num_keys, rows[None, None], positions[None], first)
            )
        return chunks

    def _first_key(self, position: Tensor) -> Tensor:
        """Where the run begins that holds the first key which a query at `position` sees."""
        if self.window is None:
            return torch.zeros_like(position)
        return (position - self.window + 1).clamp(min=0) // KEY_RUN * KEY_RUN

    def _blocks(self, sequences: Tensor, first: Tensor, num_keys: int) -> Tensor:
        """The blocks of `num_keys` keys from `first` on, the zero block where there is none."""
        column = first[:, None] // self.block_size + torch.arange(num_keys // self.block_size)
        held = column * self.block_size < self.kv_lens[sequences][:, None]
        table = self.block_table[sequences]
        return table.gather(1, column.clamp(max=table.shape[1] - 1)).where(held, self.zero_block)

    def _mask(self, position: Tensor, keys: Tensor) -> Tensor:
        """0 where a query at `position` sees a key, else -inf."""
        behind = position - keys
        visible = (behind >= 0) if self.window is None else (behind >= 0) & (behind < self.window)
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -torch.inf)


def _whole_runs(keys: int) -> int:
    return -(-keys // KEY_RUN) * KEY_RUN


def odd_rows(rows: int) -> int:
    """How many rows are missing to a whole tile."""
    return -rows % ROW_TILE


Attend = Callable[[Tensor, Tensor, Tensor, Queries], Tensor]


def attention(inputs: Sequence[Any], attrs: Mapping[str, Any], context: Any) -> tuple[Tensor]:
    """The cpu target's row for the op `attention`. The caches are from `new_cache`;
    ``context.attention_plan`` gives the plan that the step's layers share."""
    return run_attention(inputs, attrs, context, functools.partial(_attend, scale=attrs["scale"]))


def run_attention(
    inputs: Sequence[Any], attrs: Mapping[str, Any], context: Any, attend: Attend
) -> tuple[Tensor]:
    """Plans, stores k and v, and runs the step's queries: ``attend(q, keys, values, queries)``
    takes q as [groups, queries, heads, head_dim] and the caches as [kv_heads, blocks, block_size,
    head_dim], and gives [groups * queries, heads, head_dim]."""
    q, k, v, key_cache, value_cache, *step = inputs
    head_dim = attrs["head_dim"]
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
    plan = _plan(context, q, key_cache, step, attrs["window"])
    keys, values = (_store(x, cache, plan) for x, cache in ((k, key_cache), (v, value_cache)))
    return (_run(q, keys, values, plan, attend).flatten(-2),)


def latent_attention(
    inputs: Sequence[Any], attrs: Mapping[str, Any], context: Any
) -> tuple[Tensor]:
    """The cpu target's row for the op `latent_attention`: attention with one kv head, whose values
    are its keys. What they have more than values is cut off the result, because torch's fused
    kernel wants both of one size."""
    q, q_rope, latent, k_rope, cache, *step = inputs
    rank, dim = latent.shape[-1], k_rope.shape[-1]
    q = torch.cat((q.unflatten(-1, (-1, rank)), q_rope.unflatten(-1, (-1, dim))), dim=-1)
    plan = _plan(context, q, cache, step, None)
    keys = _store(torch.cat((latent, k_rope), dim=-1)[:, None], cache, plan)
    attend = functools.partial(_attend, scale=attrs["scale"])
    return (_run(q, keys, keys, plan, attend)[..., :rank].flatten(-2),)


def _plan(
    context: Any, q: Tensor, cache: Tensor, step: Sequence[Tensor], window: int | None
) -> AttentionPlan:
    blocks, block_size, kv_heads, _ = cache.shape
    plan: AttentionPlan = context.attention_plan(
        *step,
        block_size=block_size,
        zero_block=blocks - 1,
        group=q.shape[1] // kv_heads,
        window=window,
        dtype=q.dtype,
    )
    return plan


def _run(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, attend: Attend) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    if plan.decode:
        out[plan.decode.rows] = attend(q[plan.decode.rows][:, None], keys, values, plan.decode)
    for queries in plan.prefill:
        out[queries.rows] = attend(q[queries.rows][None], keys, values, queries)
    return out


def _store(new: Tensor, cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Writes the new keys or values; returns the cache as [kv_heads, blocks, block_size, d]."""
    heads_first = cache.permute(2, 0, 1, 3)
    heads_first.index_fill_(1, plan.fresh_blocks, 0)
    heads_first.flatten(1, 2).index_copy_(1, plan.new_slots, new.transpose(0, 1))
    return heads_first


def _attend(q: Tensor, keys: Tensor, values: Tensor, queries: Queries, *, scale: float) -> Tensor:
    groups, count, heads, head_dim = q.shape
    kv_heads = len(keys)

    def gather(cache: Tensor) -> Tensor:
        chosen = cache.index_select(1, queries.blocks.flatten())
        return chosen.view(kv_heads, groups, -1, head_dim)[:, :, : queries.num_keys].transpose(0, 1)

    # [groups, kv_heads, group * queries, head_dim]: row j * queries + i is query i of head j.
    rows = q.view(groups, count, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    num_rows = rows.shape[2]
    rows = F.pad(rows, (0, 0, 0, odd_rows(num_rows)))
    run_keys = gather(keys)
    run_values = run_keys if values is keys else gather(values)
    out = F.scaled_dot_product_attention(
        rows, run_keys, run_values, attn_mask=queries.mask, scale=scale
    )
    heads_first: Tensor = out[:, :, :num_rows].unflatten(2, (-1, count))
    return heads_first.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)
