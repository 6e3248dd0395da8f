"""A StepBatch as calls of an engine whose sequences lie in slots of a linear cache.

TensorRT's tensors are rectangular: a call computes B neighbouring slots with S new tokens each.
Sequences with one new token make up the decode call, which starts at slot 0 and has one of a few
sizes, so that it can be a CUDA graph; the others make up prefill calls, neighbours of equal length
together.

Rows of the decode call that take no part in it get a token at the next free position of their slot
(that of a full slot is behind its end, where writes are dropped). Nothing reads what is computed
from it, and the next token that the slot really gets overwrites what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmforge.engine.step import Int32, StepBatch


@dataclass(frozen=True)
class Call:
    """B rows of S tokens for the slots ``first_slot ... first_slot + B - 1``."""

    decode: bool
    first_slot: int
    token_ids: Int32  # [B, S]
    positions: Int32  # [B, S]
    past_lens: Int32  # [B]
    prompt_lens: Int32  # [B]
    logit_rows: Int32  # [R] rows of the flattened [B * S] whose logits are computed
    results: Int32  # [R] the index in the batch's logit_rows that each is, -1: nobody's

    @property
    def shape(self) -> tuple[int, int]:
        batch, tokens = self.token_ids.shape
        return batch, tokens


@dataclass(frozen=True)
class CallShapes:
    """What calls an engine takes.

    capacity: positions that a slot has. decode_batches: the sizes of decode calls, ascending; the
    last is the number of slots. prefill_batch: the most rows of a prefill call.
    """

    capacity: int
    decode_batches: tuple[int, ...]
    prefill_batch: int


def decode_batches(slots: int) -> tuple[int, ...]:
    """The sizes of decode calls for this many slots: each step takes the next larger one."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, *range(192, slots, 64)]
    return (*(size for size in sizes if size < slots), slots)


def split(batch: StepBatch, known: Int32, shapes: CallShapes) -> list[Call]:
    """The calls that compute a batch, to run in this order.

    known [slots]: how many positions of each slot hold a token of its sequence. It is brought to
    what it is after the batch.
    """
    lengths = np.diff(batch.query_starts)
    slots = batch.block_table[:, 0]
    assert len(set(slots.tolist())) == len(slots), "a sequence has a slot of its own"
    order = np.argsort(slots)
    single = [int(i) for i in order if lengths[i] == 1]
    longer = [int(i) for i in order if lengths[i] != 1]
    calls = [
        _prefill_call(batch, group, shapes)
        for group in _neighbours(longer, slots, lengths, shapes.prefill_batch)
    ]
    known[slots] = batch.kv_lens
    if single:
        calls.append(_decode_call(batch, single, known, shapes))
    return calls


def _neighbours(rows: Sequence[int], slots: Int32, lengths: Int32, most: int) -> list[list[int]]:
    """Runs of at most `most` rows of equal length whose slots are neighbours."""
    groups: list[list[int]] = []
    for row in rows:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and len(groups[-1]) < most
            and slots[row] == slots[last] + 1
            and lengths[row] == lengths[last]
        ):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _prefill_call(batch: StepBatch, rows: Sequence[int], shapes: CallShapes) -> Call:
    starts = batch.query_starts[rows]
    length = int(batch.query_starts[rows[0] + 1] - starts[0])
    tokens = np.add.outer(starts, np.arange(length)).astype(np.int32)
    results = _results(batch, tokens.reshape(-1))
    logit_rows = np.flatnonzero(results >= 0)
    if not len(logit_rows):  # an engine computes at least one row of logits
        logit_rows = np.zeros(1, np.int64)
    return Call(
        decode=False,
        first_slot=int(batch.block_table[rows[0], 0]),
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        past_lens=batch.kv_lens[rows] - np.int32(length),
        prompt_lens=batch.prompt_lens[rows],
        logit_rows=logit_rows.astype(np.int32),
        results=results[logit_rows],
    )


def _decode_call(batch: StepBatch, rows: Sequence[int], known: Int32, shapes: CallShapes) -> Call:
    slots = batch.block_table[rows, 0]
    size = next(size for size in shapes.decode_batches if size > slots.max())
    tokens = batch.query_starts[rows]
    token_ids = np.zeros(size, np.int32)
    token_ids[slots] = batch.token_ids[tokens]
    past_lens = known[:size].copy()
    past_lens[slots] -= 1
    prompt_lens = np.ones(size, np.int32)
    prompt_lens[slots] = batch.prompt_lens[rows]
    results = np.full(size, -1, np.int32)
    results[slots] = _results(batch, tokens)
    return Call(
        decode=True,
        first_slot=0,
        token_ids=token_ids[:, None],
        # Tables of positions have no entry behind the last.
        positions=np.minimum(past_lens, shapes.capacity - 1)[:, None],
        past_lens=past_lens,
        prompt_lens=prompt_lens,
        logit_rows=np.arange(size, dtype=np.int32),
        results=results,
    )


def _results(batch: StepBatch, tokens: Int32) -> Int32:
    """For each of these tokens of the batch, its index in logit_rows, or -1."""
    index = np.full(batch.num_tokens, -1, np.int32)
    index[batch.logit_rows] = np.arange(len(batch.logit_rows))
    return index[tokens]
