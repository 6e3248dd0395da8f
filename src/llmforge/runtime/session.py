"""The engine loop: schedule → StepBatch → Executable.step → sampled tokens → text.

`Session` runs it on rank 0, `follow` on every other rank of the engine. It serves `generate` and
`bench` alike and does not know which target it drives. Where the executable can run ahead, a step
is scheduled and begun while the one before is computed, so the device does not wait for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from llmforge.comm import Comm
from llmforge.engine.step import Int32, SampleRow, StepBatch
from llmforge.engine.target import Executable, RunsAhead
from llmforge.errors import RequestError
from llmforge.runtime.detokenizer import TextStream
from llmforge.runtime.requests import Completion, FinishReason, Request
from llmforge.runtime.sampling import sample
from llmforge.runtime.scheduler import Chunk, Draw, Scheduler, SequenceState, refusal

if TYPE_CHECKING:
    from llmforge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class StepStats:
    """A step that has run: its wall time, sampling included, and the new tokens it computed. Where
    it began before the end of the one before, its time is from that end on."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int


@dataclass
class _Live:
    """A request that is being served."""

    request: Request
    stream: TextStream | None
    submitted: float
    first_token: float | None = None
    num_drawn: int = 0


@dataclass(frozen=True)
class _Flight:
    """A step that has begun. `tokens` waits for it and gives what it drew, a token for each of
    `draws`."""

    began: float
    prefill_tokens: int
    decode_tokens: int
    draws: list[Draw]
    tokens: Callable[[], Int32]


class Session:
    """Serves requests on rank 0. Use as a context manager: leaving it ends the followers.

    vocab_size: token ids of prompts are below this; so are those that the executable draws.
    on_text: called with a request's index and each piece of its text as soon as it is certain;
        the pieces together are the completion's text.
    clock: seconds, monotonic.
    """

    def __init__(
        self,
        executable: Executable,
        comm: Comm,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        on_text: Callable[[int, str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert comm.rank == 0, "other ranks call follow()"
        self.scheduler = Scheduler(executable.limits)
        self.last_step: StepStats | None = None
        self._executable = executable
        self._comm = comm
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._clock = clock
        self._live: dict[int, _Live] = {}  # by the sequence's number
        self._ahead = executable if isinstance(executable, RunsAhead) else None
        self._flight: _Flight | None = None  # begun ahead
        self._ended = 0.0  # when the last step did
        self._stepping = False
        self._closed = False

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Submit a request; it starts in one of the next steps. Raises RequestError where the
        engine can never serve it."""
        if reason := refusal(request, self._executable.limits, self._vocab_size):
            raise RequestError(f"request {request.index}: {reason}")
        if request.stop and self._tokenizer is None:
            raise RequestError(
                f"request {request.index}: stop strings need a tokenizer, which this engine has "
                "not; leave `stop` out or convert the model with its tokenizer files"
            )
        stream = None
        if self._tokenizer is not None:
            stream = TextStream(self._tokenizer, request.token_ids, request.stop)
        sequence = self.scheduler.add(request)
        self._live[sequence.number] = _Live(request, stream, self._clock())

    def step(self) -> list[Completion]:
        """Run one step. Returns the requests that it finished. Needs `has_work`."""
        assert self.has_work and not self._closed
        flight, self._flight = self._flight or self._begin(), None
        if self._ahead and self.scheduler.has_work:
            self._flight = self._begin()
        self._stepping = True
        tokens = flight.tokens()
        self._stepping = False
        now = self._clock()
        self.last_step = StepStats(
            now - max(flight.began, self._ended), flight.prefill_tokens, flight.decode_tokens
        )
        self._ended = now
        finished = []
        for draw, token in zip(flight.draws, tokens.tolist(), strict=True):
            if completion := self._accept(draw, token, now):
                finished.append(completion)
        return finished

    def close(self) -> None:
        """Let the other ranks return from `follow`. Where a step was interrupted by an error they
        are somewhere inside it and cannot be reached; the caller aborts the job."""
        if not self._closed and not self._stepping and self._comm.size > 1:
            self._comm.broadcast(None)
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self) -> _Flight:
        """Schedule a step and begin it."""
        began = self._clock()
        chunks = self.scheduler.schedule()
        batch = self._batch(chunks)
        decoded = sum(chunk.is_decode for chunk in chunks)
        tokens = self._execute(batch)
        draws = self.scheduler.begun(chunks)
        return _Flight(began, batch.num_tokens - decoded, decoded, draws, tokens)

    def _batch(self, chunks: Sequence[Chunk]) -> StepBatch:
        sequences = [chunk.sequence for chunk in chunks]
        begins = np.array([chunk.start for chunk in chunks], np.int32)
        stops = np.array([chunk.stop for chunk in chunks], np.int32)
        starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(stops - begins, out=starts[1:])
        # Each token's position: how far it is from its chunk's first, and where that stands.
        positions = np.arange(starts[-1], dtype=np.int32)
        positions += np.repeat(begins - starts[:-1], stops - begins)
        wanted = [index for index, chunk in enumerate(chunks) if chunk.wants_token]
        return StepBatch(
            token_ids=np.concatenate([c.sequence.all_tokens[c.start : c.stop] for c in chunks]),
            positions=positions,
            query_starts=starts,
            kv_lens=stops,
            # Blocks that later positions will use are allocated already, but not part of the step.
            block_table=self.scheduler.cache.tables([s.number for s in sequences], stops),
            prompt_lens=np.array([s.num_prompt for s in sequences], np.int32),
            logit_rows=starts[1:][wanted] - np.int32(1),
            sampling=tuple([self._sample_row(sequences[index]) for index in wanted]),
        )

    def _sample_row(self, sequence: SequenceState) -> SampleRow:
        return SampleRow(
            sequence.request.sampling, sequence.num_tokens, sequence.tokens, sequence.num_prompt
        )

    def _execute(self, batch: StepBatch) -> Callable[[], Int32]:
        """Begin the step on all ranks; what gives its tokens [R]."""
        self._stepping = True
        if self._comm.size > 1:
            self._comm.broadcast(replace(batch, sampling=()))
        if self._ahead is not None:
            begun = self._ahead.begin(batch)
            self._stepping = False
            return begun
        result = self._executable.step(batch)
        self._stepping = False
        if result.tokens is not None:
            tokens = result.tokens
        else:
            assert result.logits is not None, "an executable returns tokens or logits on rank 0"
            tokens = sample(result.logits, batch.sampling)
        return lambda: tokens

    def _accept(self, draw: Draw, token: int, now: float) -> Completion | None:
        """Take a drawn token; the completion if it was the last."""
        sequence, position = draw
        live = self._live.get(sequence.number)
        if live is None:
            return None  # drawn ahead, behind the end of the sequence
        request = live.request
        live.num_drawn += 1
        if live.first_token is None:
            live.first_token = now
        if token in request.eos_token_ids and not request.ignore_eos:
            return self._finish(sequence, position, live, "eos", now)
        draw.settle(token)
        length = position + 1
        if live.stream is not None:
            self._emit(live, live.stream.push(token))
            if live.stream.stopped:
                return self._finish(sequence, length, live, "stop", now)
        if length == sequence.final_tokens:
            return self._finish(sequence, length, live, "length", now)
        return None

    def _finish(
        self, sequence: SequenceState, length: int, live: _Live, reason: FinishReason, now: float
    ) -> Completion:
        """The completion of a sequence that ends with `length` tokens."""
        self.scheduler.end(sequence, length)
        del self._live[sequence.number]
        text = None
        if live.stream is not None:
            self._emit(live, live.stream.finish())
            text = live.stream.text
            if live.stream.stopped:
                reason = "stop"
        assert live.first_token is not None
        return Completion(
            index=live.request.index,
            text=text,
            token_ids=sequence.generated,
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt,
            ttft=live.first_token - live.submitted,
            latency=now - live.submitted,
            num_drawn=live.num_drawn,
        )

    def _emit(self, live: _Live, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(live.request.index, piece)


def follow(executable: Executable, comm: Comm) -> None:
    """What every rank but 0 does: run the steps that rank 0 runs, until its session is closed.
    Where the executable can run ahead, a step is begun as soon as rank 0 begins it, whether the one
    before is over or not."""
    assert comm.rank != 0
    batch: StepBatch | None
    begun: Callable[[], Int32] | None = None  # waits for the last step
    while (batch := comm.broadcast(None)) is not None:
        if isinstance(executable, RunsAhead):
            before, begun = begun, executable.begin(batch)
            if before is not None:
                before()
        else:
            executable.step(batch)
    if begun is not None:
        begun()
