"""What crosses between the runtime and a target: `StepBatch` in, `StepResult` out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """What an engine was built for. A rank's KV cache holds ``num_blocks * block_size`` tokens."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    block_size: int
    num_blocks: int

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_seq_len // self.block_size)


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a request's tokens. Penalties and filters apply in the order of the fields.

    temperature 0 is greedy: the likeliest token after the penalties, whatever the filters and the
    seed. top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other penalties 0 are off.
    repetition_penalty counts the whole sequence, the other penalties what was generated.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def deducts(self) -> bool:
        """Whether anything is deducted from the logits of tokens that were generated."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.deducts


class SampleRow(NamedTuple):
    """How to draw one row's next token. The draw depends on `params.seed`, `position` and the
    row's logits alone, so it is the same in any batch and on any target.

    position: the index in the sequence of the token to draw (prompt included).
    history: the sequence so far, for the penalties; its first `num_prompt` tokens are the prompt. A
        last token below zero is still being drawn (see `RunsAhead`).
    """

    params: SamplingParams
    position: int
    history: Int32
    num_prompt: int = 0

    @property
    def ahead(self) -> bool:
        """Whether the last token of the history is still being drawn."""
        return len(self.history) > 0 and bool(self.history[-1] < 0)

    @property
    def known(self) -> Int32:
        """The history without a token that is still being drawn."""
        return self.history[:-1] if self.ahead else self.history

    def generated(self) -> tuple[Int32, Int32]:
        """The distinct known tokens that were generated, ascending, and how often each was."""
        tokens, counts = np.unique(self.known[self.num_prompt :], return_counts=True)
        return tokens, counts.astype(np.int32)


@dataclass(frozen=True)
class StepBatch:
    """One packed step over B sequences with T new tokens: prefill, chunk or decode alike.

    Sequence b's new tokens are ``query_starts[b]:query_starts[b+1]``; they stand at
    ``positions`` and end a sequence of ``kv_lens[b]`` tokens, whose keys and values are in the
    blocks ``block_table[b]``: position p is in slot ``p % block_size`` of block
    ``block_table[b, p // block_size]``. Earlier positions are in the cache already.
    """

    token_ids: Int32  # [T]
    positions: Int32  # [T]
    query_starts: Int32  # [B + 1]
    kv_lens: Int32  # [B]
    block_table: Int32  # [B, blocks of the longest sequence], unused entries 0
    prompt_lens: Int32  # [B] tokens of each prompt (rope scalings that depend on its length)
    logit_rows: Int32  # [R] the rows of T whose next token is wanted
    sampling: tuple[SampleRow, ...] = field(default=())  # R rows; on rank 0 only

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.kv_lens)


@dataclass(frozen=True)
class StepResult:
    """A step's outcome on rank 0: tokens drawn on the device, or the logits to draw from. A batch
    without `sampling` always gives logits."""

    tokens: Int32 | None = None  # [R]
    logits: Float32 | None = None  # [R, vocab_size]
