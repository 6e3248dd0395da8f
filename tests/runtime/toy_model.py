"""A deterministic language model whose logits come from the KV cache that it wrote itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from llmforge.comm import Comm, LocalComm
from llmforge.engine.step import Int32, Limits, SampleRow, StepBatch, StepResult
from llmforge.runtime.requests import Request
from llmforge.runtime.sampling import sample

VOCAB = 40


def toy_logits(tokens: Iterable[int], vocab: int = VOCAB) -> np.ndarray:
    """Logits [vocab] that depend on every token and its position."""
    state = 0x9E3779B97F4A7C15
    for position, token in enumerate(tokens):
        state = (state ^ (int(token) * 1_000_003 + position + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 29
    return np.random.Generator(np.random.PCG64(state)).standard_normal(vocab).astype(np.float32) * 2


class ToyExecutable:
    """Keeps (position, token) in slot [block, offset]; logits are hashed from what it reads back
    through the block table, so a wrong block, position or stale slot changes the tokens."""

    def __init__(self, limits: Limits, vocab: int = VOCAB, on_device: bool = False) -> None:
        self.limits = limits
        self.vocab = vocab
        self.on_device = on_device
        self.batches: list[StepBatch] = []
        self._slots = np.full((limits.num_blocks, limits.block_size, 2), -7, np.int64)

    def step(self, batch: StepBatch) -> StepResult:
        self._check(batch)
        self.batches.append(batch)
        wanted = set(batch.logit_rows.tolist())
        logits = []
        for index in range(batch.num_sequences):
            start, stop = batch.query_starts[index : index + 2]
            table = batch.block_table[index]
            for row in range(start, stop):
                block, offset = divmod(int(batch.positions[row]), self.limits.block_size)
                self._slots[table[block], offset] = batch.positions[row], batch.token_ids[row]
            if stop - 1 in wanted:
                cached = self._slots[table].reshape(-1, 2)[: batch.kv_lens[index]]
                assert np.array_equal(cached[:, 0], np.arange(len(cached))), "foreign slots"
                logits.append(toy_logits(cached[:, 1], self.vocab))
        stacked = np.array(logits, np.float32).reshape(-1, self.vocab)
        if self.on_device:
            return StepResult(tokens=sample(stacked, batch.sampling))
        return StepResult(logits=stacked)

    def close(self) -> None:
        pass

    def _check(self, batch: StepBatch) -> None:
        """The StepBatch contract."""
        limits = self.limits
        starts = batch.query_starts
        assert 1 <= batch.num_tokens <= limits.max_num_tokens
        assert 1 <= batch.num_sequences <= limits.max_batch_size
        assert starts[0] == 0 and starts[-1] == batch.num_tokens and (np.diff(starts) > 0).all()
        assert batch.kv_lens.max() < limits.max_seq_len
        assert set(batch.logit_rows.tolist()) <= set((starts[1:] - 1).tolist())
        assert (np.diff(batch.logit_rows) > 0).all()
        for array in (batch.token_ids, batch.positions, batch.block_table, batch.kv_lens):
            assert array.dtype == np.int32
        for array in (batch.query_starts, batch.logit_rows, batch.prompt_lens):
            assert array.dtype == np.int32
        used = []
        for index in range(batch.num_sequences):
            last = batch.positions[starts[index] : starts[index + 1]]
            assert last[-1] + 1 == batch.kv_lens[index] and (np.diff(last) == 1).all()
            blocks = -(-int(batch.kv_lens[index]) // limits.block_size)
            used += batch.block_table[index, :blocks].tolist()
            assert not batch.block_table[index, blocks:].any(), "unused entries are 0"
        assert len(set(used)) == len(used), "a block of two sequences"
        assert all(0 <= block < limits.num_blocks for block in used)


class AheadToyExecutable(ToyExecutable):
    """One that runs ahead: what a step draws is known to the next one at once, to the caller only
    when it asks. Rank 0 draws, and sends it to the others' devices."""

    def __init__(self, limits: Limits, vocab: int = VOCAB, comm: Comm | None = None) -> None:
        self.comm = comm or LocalComm()
        super().__init__(limits, vocab, on_device=self.comm.rank == 0)
        self.drawn = np.zeros(0, np.int32)
        self.unread: list[int] = []  # steps whose tokens nobody has asked for
        self.ahead: list[bool] = []  # which steps began with tokens that were still being drawn
        self.begun_within: list[bool] = []  # which began while the one before was not over

    def begin(self, batch: StepBatch) -> Callable[[], Int32]:
        assert len(self.unread) < 2, "the tokens of the last step but one are not read yet"
        ids = batch.token_ids
        assert (ids >= 0).all() or self.unread, "the last step's tokens are known"
        assert (~ids < len(self.drawn)).all(), "the last step drew fewer tokens"
        sampling = tuple(
            row._replace(history=self._resolved(row.history)) if row.params.penalises else row
            for row in batch.sampling
        )
        result = self.step(replace(batch, token_ids=self._resolved(ids), sampling=sampling))
        drawn = self.drawn = self._shared(result, len(batch.logit_rows))
        number = len(self.batches)
        self.begun_within.append(bool(self.unread))
        self.unread.append(number)
        self.ahead.append(bool((ids < 0).any()))

        def tokens() -> Int32:
            assert self.unread.pop(0) == number, "read in another order"
            return drawn if self.comm.rank == 0 else drawn[:0]

        return tokens

    def _shared(self, result: StepResult, rows: int) -> Int32:
        """What rank 0 drew."""
        drawn = np.empty(rows, np.int32)
        if self.comm.rank != 0:
            self.comm.receive(drawn, 0)
            return drawn
        assert result.tokens is not None
        for other in range(1, self.comm.size):
            self.comm.send(result.tokens, other)
        return result.tokens

    def _resolved(self, ids: Int32) -> Int32:
        if not (ids < 0).any():
            return ids
        return np.where(ids < 0, self.drawn[np.where(ids < 0, ~ids, 0)], ids)


def reference(request: Request, max_seq_len: int, vocab: int = VOCAB) -> list[int]:
    """The tokens that the request must get, drawn one after another with no batch or cache."""
    tokens = list(request.token_ids)
    while len(tokens) < min(len(request.token_ids) + request.max_new_tokens, max_seq_len):
        row = SampleRow(
            request.sampling, len(tokens), np.array(tokens, np.int32), len(request.token_ids)
        )
        token = int(sample(toy_logits(tokens, vocab)[None], [row])[0])
        if token in request.eos_token_ids and not request.ignore_eos:
            break
        tokens.append(token)
    return tokens[len(request.token_ids) :]


def limits(
    max_batch_size: int = 4,
    max_seq_len: int = 32,
    max_num_tokens: int = 16,
    block_size: int = 4,
    num_blocks: int = 32,
) -> Limits:
    return Limits(max_batch_size, max_seq_len, max_num_tokens, block_size, num_blocks)


def prompts(count: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Sequence[list[int]]:
    return np.random.default_rng(seed).integers(0, vocab, (count, length)).tolist()
