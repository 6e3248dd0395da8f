"""Measuring an engine: latency of static batches, throughput of requests in flight.

Times are seconds of wall clock on rank 0, sampling included. For one request, TTFT is the time
from its submission to its first token, TPOT the mean time between its tokens after the first
(none for a request of one token), latency the time from submission to its last token. Prompts are
random tokens, decoding is greedy, and every request gets exactly `output_len` tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmforge.comm import Comm
from llmforge.engine.step import Limits
from llmforge.engine.target import Executable
from llmforge.errors import SettingsError
from llmforge.runtime.requests import Completion, Request
from llmforge.runtime.session import Session, StepStats
from llmforge.settings import BenchSettings


@dataclass(frozen=True)
class Distribution:
    """A sample of times, in seconds; percentiles are interpolated linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        """None for an empty sample."""
        if not seconds:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
        mean = float(np.mean(seconds))
        return cls(len(seconds), mean, p50, p90, p99, float(min(seconds)), float(max(seconds)))


@dataclass(frozen=True)
class LatencyReport:
    """Static batches of one size: all requests submitted at once, all repetitions together.

    prefill: time from submission until every request of the batch has its first token.
    decode_step: the steps in which every sequence of the batch decodes one token.
    total: time from submission until the batch is finished.
    prefill_tokens_per_s: prompt tokens by `prefill`. decode_tokens_per_s: tokens drawn in
    `decode_step` by its time. output_tokens_per_s and total_tokens_per_s: generated tokens, and
    prompt and generated tokens, by `total`. All are totals of tokens by totals of time; the decode
    rate is None where there is no such step.
    """

    batch_size: int
    input_len: int
    output_len: int
    repeat: int
    ttft: Distribution
    tpot: Distribution | None
    prefill: Distribution
    decode_step: Distribution | None
    total: Distribution
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    output_tokens_per_s: float
    total_tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ThroughputReport:
    """Requests in flight, a new one submitted as soon as one is finished (closed loop).

    The rates are tokens, or requests, by `seconds`: from the first submission to the last token.
    """

    num_requests: int
    concurrency: int
    input_len: int
    output_len: int
    seconds: float
    num_steps: int
    num_preemptions: int
    ttft: Distribution
    tpot: Distribution | None
    latency: Distribution
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BenchReport:
    """What `llmforge bench` measured, on what."""

    engine_digest: str
    environment: dict[str, Any]
    latency: tuple[LatencyReport, ...] = ()
    throughput: ThroughputReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Times are seconds."""
        return {
            "engine_digest": self.engine_digest,
            "environment": self.environment,
            "latency": [report.to_dict() for report in self.latency],
            "throughput": None if self.throughput is None else self.throughput.to_dict(),
        }


def check_bench(settings: BenchSettings, limits: Limits) -> None:
    """Raise SettingsError where the engine is too small for the bench."""
    length = settings.input_len + settings.output_len
    if length > limits.max_seq_len:
        raise SettingsError(
            f"input_len {settings.input_len} + output_len {settings.output_len} is {length} "
            f"tokens, but the engine's max_seq_len is {limits.max_seq_len}; lower them or build "
            "with a larger --max-seq-len"
        )
    concurrency = settings.concurrency or limits.max_batch_size
    sizes = settings.batch_size if settings.num_requests is None else (concurrency,)
    name = "batch_size" if settings.num_requests is None else "concurrency"
    blocks = -(-(length - 1) // limits.block_size)
    for size in sizes:
        if size > limits.max_batch_size:
            raise SettingsError(
                f"{name} is {size}, but the engine's max_batch_size is {limits.max_batch_size}; "
                "lower it or build with a larger --max-batch-size"
            )
        # In flight, requests may wait for blocks; a static batch must be in the cache as a whole.
        needed = blocks if settings.num_requests is not None else blocks * size
        if needed > limits.num_blocks:
            raise SettingsError(
                f"{name} {size} with sequences of {length} tokens needs {needed} KV-cache blocks, "
                f"but the engine has {limits.num_blocks}; lower them or build with a larger "
                "--kv-cache-tokens"
            )


def bench(
    executable: Executable,
    comm: Comm,
    settings: BenchSettings,
    *,
    vocab_size: int,
    engine_digest: str,
    environment: dict[str, Any],
    on_progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchReport:
    """Measure what the settings ask for: throughput with `num_requests`, else the latency of each
    batch size. Call on rank 0, and `follow` on the others. Raises SettingsError before anything
    runs where the engine is too small.

    environment: what `runtime.environment.environment` returned.
    on_progress: called with a line for each part that starts.
    """
    report = on_progress or (lambda line: None)
    with Session(executable, comm, vocab_size=vocab_size, clock=clock) as session:
        check_bench(settings, executable.limits)
        runner = _Runner(session, settings, vocab_size, clock, report)
        if settings.num_requests is None:
            latency = tuple(runner.latency(size) for size in settings.batch_size)
            return BenchReport(engine_digest, environment, latency=latency)
        concurrency = settings.concurrency or executable.limits.max_batch_size
        throughput = runner.throughput(settings.num_requests, concurrency)
        return BenchReport(engine_digest, environment, throughput=throughput)


@dataclass(frozen=True)
class _Run:
    """A set of requests, served."""

    seconds: float
    completions: list[Completion]
    steps: list[StepStats]


class _Runner:
    """Serves random requests in a session and keeps the times."""

    def __init__(
        self,
        session: Session,
        settings: BenchSettings,
        vocab_size: int,
        clock: Callable[[], float],
        report: Callable[[str], None],
    ) -> None:
        self._session = session
        self._settings = settings
        self._vocab_size = vocab_size
        self._clock = clock
        self._report = report

    def latency(self, batch_size: int) -> LatencyReport:
        settings = self._settings
        self._report(f"batch size {batch_size}: {settings.warmup} warm-up, {settings.repeat} runs")
        for _ in range(settings.warmup):
            self._serve(batch_size, batch_size)
        runs = [self._serve(batch_size, batch_size) for _ in range(settings.repeat)]
        done = [completion for run in runs for completion in run.completions]
        decodes = [
            step.seconds for run in runs for step in run.steps if step.decode_tokens == batch_size
        ]
        prefill = [max(completion.ttft for completion in run.completions) for run in runs]
        total = sum(run.seconds for run in runs)
        outputs, prompts = _tokens(done)
        return LatencyReport(
            batch_size=batch_size,
            input_len=settings.input_len,
            output_len=settings.output_len,
            repeat=settings.repeat,
            ttft=_distribution([completion.ttft for completion in done]),
            tpot=Distribution.of(_tpots(done)),
            prefill=_distribution(prefill),
            decode_step=Distribution.of(decodes),
            total=_distribution([run.seconds for run in runs]),
            prefill_tokens_per_s=prompts / sum(prefill),
            decode_tokens_per_s=batch_size * len(decodes) / sum(decodes) if decodes else None,
            output_tokens_per_s=outputs / total,
            total_tokens_per_s=(outputs + prompts) / total,
        )

    def throughput(self, num_requests: int, concurrency: int) -> ThroughputReport:
        settings = self._settings
        self._report(f"{num_requests} requests, {concurrency} in flight; {settings.warmup} warm-up")
        for _ in range(settings.warmup):
            self._serve(min(num_requests, concurrency), concurrency)
        before = self._session.scheduler.num_preemptions
        run = self._serve(num_requests, concurrency)
        outputs, prompts = _tokens(run.completions)
        return ThroughputReport(
            num_requests=num_requests,
            concurrency=concurrency,
            input_len=settings.input_len,
            output_len=settings.output_len,
            seconds=run.seconds,
            num_steps=len(run.steps),
            num_preemptions=self._session.scheduler.num_preemptions - before,
            ttft=_distribution([completion.ttft for completion in run.completions]),
            tpot=Distribution.of(_tpots(run.completions)),
            latency=_distribution([completion.latency for completion in run.completions]),
            requests_per_s=num_requests / run.seconds,
            output_tokens_per_s=outputs / run.seconds,
            total_tokens_per_s=(outputs + prompts) / run.seconds,
        )

    def _serve(self, count: int, concurrency: int) -> _Run:
        """`count` requests, at most `concurrency` of them submitted and not finished. Every call
        has the same prompts."""
        session = self._session
        pending = self._requests(count)
        completions: list[Completion] = []
        steps: list[StepStats] = []
        started = self._clock()
        submitted = 0
        while len(completions) < count:
            while submitted < min(count, len(completions) + concurrency):
                session.add(pending[submitted])
                submitted += 1
            completions += session.step()
            assert session.last_step is not None
            steps.append(session.last_step)
        return _Run(self._clock() - started, completions, steps)

    def _requests(self, count: int) -> list[Request]:
        settings = self._settings
        generator = np.random.default_rng(settings.seed)
        tokens = generator.integers(0, self._vocab_size, (count, settings.input_len))
        return [
            Request(index, tuple(row), settings.output_len, ignore_eos=True)
            for index, row in enumerate(tokens.tolist())
        ]


def _tokens(completions: Sequence[Completion]) -> tuple[int, int]:
    """Generated and prompt tokens."""
    outputs = sum(completion.num_drawn for completion in completions)
    return outputs, sum(completion.prompt_tokens for completion in completions)


def _tpots(completions: Sequence[Completion]) -> list[float]:
    return [
        (completion.latency - completion.ttft) / (completion.num_drawn - 1)
        for completion in completions
        if completion.num_drawn > 1
    ]


def _distribution(seconds: Sequence[float]) -> Distribution:
    found = Distribution.of(seconds)
    assert found is not None
    return found
