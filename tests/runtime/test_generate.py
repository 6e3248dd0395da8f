"""generate(): the loop as a whole, on one rank and with followers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thread_comm import run_ranks
from toy_model import VOCAB, AheadToyExecutable, ToyExecutable, limits, prompts, reference

from llmforge.comm import LocalComm
from llmforge.engine.step import Limits, SamplingParams, StepResult
from llmforge.errors import RequestError
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request
from llmforge.runtime.session import Session


def serve(executable, requests, **options):
    return generate(executable, LocalComm(), requests, vocab_size=VOCAB, **options)


def test_tokens_are_those_of_the_sequential_reference():
    requests = [
        Request(i, tuple(p), 10, SamplingParams(temperature=t, seed=i))
        for i, (p, t) in enumerate(zip(prompts(9, 7), [0.0, 0.5, 1.0] * 3, strict=True))
    ]
    executable = ToyExecutable(limits())
    done = serve(executable, requests)
    assert [list(c.token_ids) for c in done] == [reference(r, 32) for r in requests]
    assert all(c.finish_reason == "length" and c.prompt_tokens == 7 for c in done)
    assert all(0 < c.ttft <= c.latency and c.num_drawn == 10 for c in done)


def test_prefill_and_decode_share_steps_and_long_prompts_are_chunked():
    requests = [Request(0, tuple(prompts(1, 2)[0]), 12), Request(1, tuple(prompts(1, 30)[0]), 2)]
    executable = ToyExecutable(limits(max_num_tokens=8))
    serve(executable, requests)
    lengths = [np.diff(batch.query_starts).tolist() for batch in executable.batches]
    assert lengths[:5] == [[2, 6], [1, 7], [1, 7], [1, 7], [1, 3]]


@st.composite
def workloads(draw):
    block_size = draw(st.integers(1, 5))
    max_seq_len = draw(st.integers(2, 24))
    requests = []
    blocks = 1
    for index in range(draw(st.integers(1, 8))):
        prompt = draw(st.integers(1, max_seq_len - 1))
        new = draw(st.integers(1, 12))
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.7])),
            seed=draw(st.integers(0, 3)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.4])),
        )
        tokens = tuple(prompts(1, prompt, seed=draw(st.integers(0, 5)))[0])
        eos = frozenset(draw(st.sets(st.integers(0, VOCAB - 1), max_size=3)))
        requests.append(Request(index, tokens, new, params, (), eos))
        blocks = max(blocks, -(-(min(prompt + new, max_seq_len) - 1) // block_size))
    tight = Limits(
        max_batch_size=draw(st.integers(1, 6)),
        max_seq_len=max_seq_len,
        max_num_tokens=draw(st.integers(1, 12)),
        block_size=block_size,
        num_blocks=blocks + draw(st.integers(0, 6)),
    )
    arrivals = [draw(st.integers(0, 10)) for _ in requests]
    return requests, tight, arrivals


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(), st.sampled_from([ToyExecutable, AheadToyExecutable]))
def test_any_mix_in_any_cache_completes_with_the_same_tokens(workload, kind):
    requests, tight, arrivals = workload
    executable = kind(tight)
    done = {}
    with Session(executable, LocalComm(), vocab_size=VOCAB) as session:
        step = 0
        pending = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
        while pending or session.has_work:
            while pending and (pending[0][0] <= step or not session.has_work):
                session.add(pending.pop(0)[1])
            for completion in session.step():
                assert completion.index not in done
                done[completion.index] = completion
            scheduler = session.scheduler
            held = sum(scheduler.cache.count(s.number) for s in scheduler.running)
            assert held + scheduler.cache.num_free == tight.num_blocks
            assert not any(scheduler.cache.count(s.number) for s in scheduler.waiting)
            step += 1
            assert step < 5000, "livelock"
    assert session.scheduler.cache.num_free == tight.num_blocks
    assert not session.scheduler.has_work
    for request in requests:
        assert list(done[request.index].token_ids) == reference(request, tight.max_seq_len)


def test_a_step_begins_while_the_one_before_runs():
    executable = AheadToyExecutable(limits())
    requests = [Request(i, tuple(p), 10) for i, p in enumerate(prompts(4, 3))]
    done = serve(executable, requests)
    assert executable.ahead == [False] + [True] * 9, "no step more than without running ahead"
    assert [list(c.token_ids) for c in done] == [reference(r, 32) for r in requests]
    assert all(0 < c.ttft <= c.latency and c.num_drawn == 10 for c in done)


def test_the_time_of_steps_that_overlap_is_counted_once():
    executable, times = AheadToyExecutable(limits()), [0.0]

    def clock():
        times.append(times[-1] + 1)
        return times[-1]

    seconds = []
    with Session(executable, LocalComm(), vocab_size=VOCAB, clock=clock) as session:
        session.add(Request(0, tuple(prompts(1, 3)[0]), 6))
        began = times[-1] + 1
        while session.has_work:
            session.step()
            seconds.append(session.last_step.seconds)
    assert executable.ahead == [False] + [True] * 5
    assert min(seconds) > 0 and sum(seconds) == times[-1] - began


def test_what_is_drawn_ahead_behind_an_end_is_dropped():
    tokens = tuple(prompts(1, 3)[0])
    all_tokens = reference(Request(0, tokens, 10), 32)
    eos = frozenset(all_tokens[4:5])
    executable = AheadToyExecutable(limits())
    with Session(executable, LocalComm(), vocab_size=VOCAB) as session:
        session.add(Request(0, tokens, 10, SamplingParams(), (), eos))
        completions = []
        while session.has_work:
            completions += session.step()
        # The step that was ahead is read before the next one, which reuses its blocks.
        session.add(Request(1, tokens, 10))
        while session.has_work:
            completions += session.step()
    length = all_tokens.index(next(iter(eos)))
    assert list(completions[0].token_ids) == all_tokens[:length]
    assert completions[0].num_drawn == length + 1
    assert list(completions[1].token_ids) == all_tokens


@pytest.mark.parametrize("penalty", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_are_for_tokens_that_are_still_being_drawn(penalty):
    executable = AheadToyExecutable(limits())
    tokens = tuple(prompts(1, 3)[0])
    penalised = Request(0, tokens, 5, SamplingParams(**{penalty: 1.5}))
    plain = Request(1, tokens, 12)
    done = serve(executable, [penalised, plain])
    assert [list(c.token_ids) for c in done] == [reference(r, 32) for r in (penalised, plain)]
    assert executable.ahead == [False] + [True] * 11


def test_followers_run_the_same_steps():
    requests = [Request(i, tuple(p), 6) for i, p in enumerate(prompts(5, 9))]
    seen: list[Any] = [None] * 3

    def work(comm):
        executable = ToyExecutable(limits())
        seen[comm.rank] = executable
        if comm.rank == 0:
            return generate(executable, comm, requests, vocab_size=VOCAB)
        return follow(executable, comm)

    done = run_ranks(3, work)[0]
    assert [list(c.token_ids) for c in done] == [reference(r, 32) for r in requests]
    for other in seen[1:]:
        assert len(other.batches) == len(seen[0].batches)
        for mine, theirs in zip(seen[0].batches, other.batches, strict=True):
            assert theirs.sampling == ()
            assert np.array_equal(mine.block_table, theirs.block_table)
            assert np.array_equal(mine.token_ids, theirs.token_ids)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(), st.integers(2, 3))
def test_followers_run_ahead_as_rank_0_does(workload, ranks):
    requests, tight, _ = workload
    seen: list[Any] = [None] * ranks

    def work(comm):
        executable = seen[comm.rank] = AheadToyExecutable(tight, comm=comm)
        if comm.rank:
            return follow(executable, comm)
        return generate(executable, comm, requests, vocab_size=VOCAB)

    done = run_ranks(ranks, work)[0]
    assert [list(c.token_ids) for c in done] == [reference(r, tight.max_seq_len) for r in requests]
    alone = AheadToyExecutable(tight)
    serve(alone, requests)
    assert all(executable.ahead == alone.ahead for executable in seen)
    for follower in seen[1:]:
        assert not follower.unread and not any(batch.sampling for batch in follower.batches)


def test_the_other_ranks_begin_a_step_before_the_one_before_is_over():
    request = Request(0, tuple(prompts(1, 3)[0]), 10)
    seen: list[Any] = [None] * 2

    def work(comm):
        executable = seen[comm.rank] = AheadToyExecutable(limits(), comm=comm)
        if comm.rank:
            return follow(executable, comm)
        return generate(executable, comm, [request], vocab_size=VOCAB)

    assert list(run_ranks(2, work)[0][0].token_ids) == reference(request, 32)
    for executable in seen:
        assert executable.ahead == executable.begun_within == [False] + [True] * 9


def test_a_refused_request_reaches_the_caller_and_lets_followers_return():
    def work(comm):
        executable = ToyExecutable(limits())
        if comm.rank:
            return follow(executable, comm)
        with pytest.raises(RequestError, match="request 0: the prompt is empty"):
            generate(executable, comm, [Request(0, (), 3)], vocab_size=VOCAB)
        return "raised"

    assert run_ranks(2, work) == ["raised", None]


class Broken(ToyExecutable):
    """Fails at the third step, as a rank does whose device fails."""

    def step(self, batch):
        if len(self.batches) == 2:
            raise OSError("device lost")
        return super().step(batch)


def test_an_error_within_a_step_propagates():
    request = Request(0, (1, 2, 3), 8)

    def work(comm):
        if comm.rank:
            return follow(ToyExecutable(limits()), comm)
        return generate(Broken(limits()), comm, [request], vocab_size=VOCAB)

    with pytest.raises(OSError, match="device lost"):
        run_ranks(2, work)


class BrokenAhead(AheadToyExecutable):
    """Fails where the third step's tokens are asked for."""

    def begin(self, batch):
        tokens, number = super().begin(batch), len(self.batches)

        def read():
            if number == 3:
                raise OSError("device lost")
            return tokens()

        return read


class Recorder(LocalComm):
    """Two ranks, of which the other is not there."""

    size = 2

    def __init__(self):
        self.sent = []

    def broadcast(self, value, root=0):
        self.sent.append(value)


def test_followers_are_told_of_the_end_unless_they_are_within_a_step():
    # Then they wait for rank 0 in some collective, and one more broadcast would be taken for it.
    comm = Recorder()
    with pytest.raises(OSError, match="device lost"):
        generate(Broken(limits()), comm, [Request(0, (1, 2), 8)], vocab_size=VOCAB)
    assert len(comm.sent) == 3 and None not in comm.sent
    comm = Recorder()
    with pytest.raises(OSError, match="device lost"):
        generate(BrokenAhead(limits()), comm, [Request(0, (1, 2), 8)], vocab_size=VOCAB)
    assert len(comm.sent) == 4 and None not in comm.sent
    comm = Recorder()
    generate(ToyExecutable(limits()), comm, [Request(0, (1, 2), 8)], vocab_size=VOCAB)
    assert len(comm.sent) == 9 and comm.sent[-1] is None


def test_tokens_drawn_by_the_device_are_taken():
    request = Request(0, (1, 2, 3), 8, SamplingParams(temperature=0.9, seed=5))
    done = serve(ToyExecutable(limits(), on_device=True), [request])
    assert list(done[0].token_ids) == reference(request, 32)


class NotANumber(ToyExecutable):
    def step(self, batch):
        return StepResult(logits=super().step(batch).logits * np.float32("nan"))


def test_nan_logits_are_an_error():
    with pytest.raises(RequestError, match="largest logit of the token at position 3 is nan"):
        serve(NotANumber(limits()), [Request(0, (1, 2, 3), 8)])


def test_eos_ends_a_request_unless_ignored():
    free = serve(ToyExecutable(limits()), [Request(0, (5, 6), 10)])[0]
    eos = frozenset({free.token_ids[4]})
    first = free.token_ids.index(free.token_ids[4])
    ended = serve(ToyExecutable(limits()), [Request(0, (5, 6), 10, eos_token_ids=eos)])[0]
    assert ended.finish_reason == "eos"
    assert ended.token_ids == free.token_ids[:first] and ended.num_drawn == first + 1
    ignoring = Request(0, (5, 6), 10, eos_token_ids=eos, ignore_eos=True)
    assert serve(ToyExecutable(limits()), [ignoring])[0].token_ids == free.token_ids


def test_generation_ends_at_max_seq_len():
    done = serve(ToyExecutable(limits(max_seq_len=10)), [Request(0, (1,) * 9, 50)])[0]
    assert len(done.token_ids) == 1 and done.finish_reason == "length"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(7, (), 1), "request 7: the prompt is empty"),
        (Request(0, (1,) * 32, 1), "32 tokens, but the engine's max_seq_len is 32.* at most 31"),
        (Request(0, (1, VOCAB), 1), f"token id {VOCAB} is not .*allowed: 0 to {VOCAB - 1}"),
        (Request(0, (-1,), 1), "token id -1"),
        (Request(0, (1,), 0), "max_new_tokens is 0"),
        (Request(0, (1,) * 8, 10), "need 5 KV-cache blocks of 4 tokens, but the engine has 4"),
        (Request(0, (1,), 1, stop=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_requests_that_can_never_be_served(request_, message):
    executable = ToyExecutable(limits(num_blocks=4))
    with pytest.raises(RequestError, match=message):
        serve(executable, [request_])
    assert not executable.batches


def test_all_bad_requests_are_in_one_message():
    bad = [Request(i, (), 1) for i in range(12)]
    with pytest.raises(RequestError) as caught:
        serve(ToyExecutable(limits()), [Request(99, (1,), 1), *bad])
    assert "request 9: " in str(caught.value) and str(caught.value).endswith("; and 2 more")
