"""Continuous batching: which tokens of which sequences the next step computes.

A request waits until there is a place and blocks for its whole prompt, then runs until it is
finished. Each step takes one token of every sequence that is generating and fills the rest of
`max_num_tokens` with chunks of prompts, so requests come and go at any step. Where a growing
sequence finds no free block, the sequence admitted last is preempted: its blocks are freed, and it
waits at the head of the queue to be computed again from its prompt and the tokens it has.

Progress: the sequence admitted first is never preempted by another, its whole length fits in the
cache (checked on entry), and running sequences come before waiting ones; so the first always
advances, finishes, and hands the place to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llmforge.engine.step import Int32, Limits
from llmforge.errors import RequestError
from llmforge.runtime.cache import KvCache
from llmforge.runtime.requests import Request, join_reasons


def refusal(request: Request, limits: Limits, vocab_size: int) -> str | None:
    """Why an engine of these limits can never serve the request, or None.

    A prompt must leave room for one generated token: at most ``max_seq_len - 1`` tokens. A larger
    `max_new_tokens` than then fits is allowed; the generation ends at max_seq_len ("length").
    """
    prompt = len(request.token_ids)
    if prompt == 0:
        return "the prompt is empty; give at least one token"
    if prompt >= limits.max_seq_len:
        return (
            f"the prompt has {prompt} tokens, but the engine's max_seq_len is "
            f"{limits.max_seq_len}, which leaves room for at most {limits.max_seq_len - 1}; "
            "shorten the prompt or build with a larger --max-seq-len"
        )
    if request.max_new_tokens < 1:
        return f"max_new_tokens is {request.max_new_tokens}; it must be at least 1"
    for token in request.token_ids:
        if not 0 <= token < vocab_size:
            return f"token id {token} is not in the vocabulary; allowed: 0 to {vocab_size - 1}"
    blocks = -(-_cached_tokens(request, limits) // limits.block_size)
    if blocks > limits.num_blocks:
        return (
            f"prompt and generated tokens need {blocks} KV-cache blocks of {limits.block_size} "
            f"tokens, but the engine has {limits.num_blocks}; "
            "lower max_new_tokens or build with a larger --kv-cache-tokens"
        )
    return None


def check_requests(requests: Iterable[Request], limits: Limits, vocab_size: int) -> None:
    """Raise one RequestError that names every request which can never be served."""
    reasons = [
        f"request {request.index}: {reason}"
        for request in requests
        if (reason := refusal(request, limits, vocab_size))
    ]
    if reasons:
        raise RequestError(join_reasons(reasons))


def _final_tokens(request: Request, limits: Limits) -> int:
    """The longest that the sequence can become."""
    return min(len(request.token_ids) + request.max_new_tokens, limits.max_seq_len)


def _cached_tokens(request: Request, limits: Limits) -> int:
    """The most tokens it can have in the cache: the last one drawn is never computed."""
    return _final_tokens(request, limits) - 1


class SequenceState:
    """A request while it waits or runs.

    num_tokens: prompt and generated tokens, the last of which may still be being drawn;
    num_computed: how many of them the cache holds once the steps that have begun are over.
    """

    def __init__(self, request: Request, number: int, limits: Limits) -> None:
        self.request = request
        self.number = number
        self.num_prompt = len(request.token_ids)
        self.final_tokens = _final_tokens(request, limits)
        self.all_tokens = np.empty(self.final_tokens, np.int32)  # those to come have no value yet
        self.all_tokens[: self.num_prompt] = request.token_ids
        self.num_tokens = self.num_prompt
        self.num_computed = 0

    @property
    def tokens(self) -> Int32:
        """The sequence so far: a view. A token that is still being drawn is ``~row`` in it, the row
        in which the step draws it (see `RunsAhead`); the others do not change later."""
        return self.all_tokens[: self.num_tokens]

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.num_prompt :].tolist())

    @property
    def is_full(self) -> bool:
        """As long as it may become: it needs no more steps than have begun."""
        return self.num_tokens == self.final_tokens


class Chunk(NamedTuple):
    """Tokens ``start:stop`` of a sequence, to be computed in a step. The next token is wanted
    where the chunk is the last of the sequence so far."""

    sequence: SequenceState
    start: int
    stop: int

    @property
    def wants_token(self) -> bool:
        return self.stop == self.sequence.num_tokens

    @property
    def is_decode(self) -> bool:
        return self.stop - self.start == 1 and self.start >= self.sequence.num_prompt


class Draw(NamedTuple):
    """A token that a step draws: the one of `sequence` at `position`."""

    sequence: SequenceState
    position: int

    def settle(self, token: int) -> None:
        """The step is over; this is what it drew."""
        self.sequence.all_tokens[self.position] = token


class Scheduler:
    """Chooses each step's chunks, and owns the KV cache's block tables.

    Use: ``add`` at any time; then in turn ``schedule``, begin the step, ``begun`` for its chunks;
    for what it returns, ``settle`` once the step is over, and ``end`` where a sequence ends before
    its full length. The next step may be scheduled before: its sequences count the tokens that are
    still being drawn.
    """

    def __init__(self, limits: Limits) -> None:
        assert limits.max_num_tokens >= 1 and limits.max_batch_size >= 1
        self.limits = limits
        self.cache = KvCache(limits)
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # in order of admission
        self.num_preemptions = 0
        self._added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> SequenceState:
        """Put a request in the queue. It must be one that `refusal` does not refuse."""
        sequence = SequenceState(request, self._added, self.limits)
        self._added += 1
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Chunk]:
        """The next step: at least one chunk where there is work, at most `max_num_tokens` tokens
        and `max_batch_size` chunks, one a sequence; their blocks are allocated."""
        chunks = self._schedule_decodes()
        budget = self.limits.max_num_tokens - len(chunks)
        decoding = {chunk.sequence.number for chunk in chunks}
        for sequence in self.running:
            if budget and sequence.number not in decoding:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].stop - chunks[-1].start
        while budget and self._admit():
            chunks.append(self._chunk(self.running[-1], budget))
            budget -= chunks[-1].stop - chunks[-1].start
        # No more sequences run than there are tokens in a step: one is only admitted to a step
        # in which it and all the others get some.
        assert budget >= 0
        assert chunks or not self.has_work, "no progress"
        return chunks

    def begun(self, chunks: Iterable[Chunk]) -> list[Draw]:
        """The step of these chunks has begun. Returns the tokens that it draws, in order of rows.

        A sequence whose last token is among them leaves with its blocks: whoever gets them next
        uses them in a later step, and steps are executed one after the other.
        """
        draws: list[Draw] = []
        for chunk in chunks:
            sequence = chunk.sequence
            wants_token = chunk.wants_token
            sequence.num_computed = chunk.stop
            if not wants_token:
                continue
            sequence.all_tokens[sequence.num_tokens] = ~len(draws)
            draws.append(Draw(sequence, sequence.num_tokens))
            sequence.num_tokens += 1
            if sequence.is_full:
                self._leave(sequence)
        return draws

    def end(self, sequence: SequenceState, num_tokens: int) -> None:
        """The sequence ends with `num_tokens` tokens, whatever steps that have begun still draw."""
        if not sequence.is_full:  # else it has left
            if sequence in self.running:
                self._leave(sequence)
            else:
                self.waiting.remove(sequence)  # preempted meanwhile
        sequence.num_tokens = num_tokens

    def _leave(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self.cache.free(sequence.number)

    def _schedule_decodes(self) -> list[Chunk]:
        """One token of each sequence that lacks only the last one, oldest first. The one to
        preempt is the youngest, so it is never one that is scheduled already."""
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            # Nothing computed: a prompt of one token, or preempted in this loop.
            if sequence.num_computed != sequence.num_tokens - 1 or sequence.num_computed == 0:
                continue
            # Most steps need no new block.
            fits = self.cache.holds(sequence.number, sequence.num_tokens)
            while not fits and not self._grow(sequence):
                if self._preempt_last() is sequence:
                    break
            else:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_tokens))
        return chunks

    def _grow(self, sequence: SequenceState) -> bool:
        """Blocks for all its tokens; False where there are not enough."""
        return self.cache.grow(sequence.number, sequence.num_tokens, sequence.final_tokens - 1)

    def _chunk(self, sequence: SequenceState, budget: int) -> Chunk:
        start = sequence.num_computed
        return Chunk(sequence, start, min(sequence.num_tokens, start + budget))

    def _admit(self) -> bool:
        """Start the request at the head of the queue, if there is a place and blocks for all its
        tokens, and one more for each sequence that may grow: without those it would soon be
        preempted, and its prompt computed in vain."""
        if not self.waiting or len(self.running) == self.limits.max_batch_size:
            return False
        sequence = self.waiting[0]
        if self.running:
            growing = sum(self._may_grow(other) for other in self.running)
            needed = self.cache.missing(sequence.number, sequence.num_tokens)
            if needed + growing > self.cache.num_free:
                return False
        fits = self._grow(sequence)
        assert fits, "a request that does not fit an empty cache is refused on entry"
        self.running.append(self.waiting.popleft())
        return True

    def _may_grow(self, sequence: SequenceState) -> bool:
        return self.cache.missing(sequence.number, sequence.final_tokens - 1) > 0

    def _preempt_last(self) -> SequenceState:
        sequence = self.running.pop()
        self.cache.free(sequence.number)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence
