"""Which chunks a step holds: order, chunking, admission, preemption."""

from __future__ import annotations

import numpy as np
from toy_model import VOCAB, ToyExecutable, limits, prompts, reference

from llmforge.comm import LocalComm
from llmforge.runtime.requests import Request
from llmforge.runtime.scheduler import Scheduler
from llmforge.runtime.session import Session


def request(index: int, prompt: int, new: int = 4) -> Request:
    return Request(index, tuple(prompts(1, prompt, seed=index)[0]), new)


def advance(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step in which every wanted token is 1: (request, start, stop) of its chunks."""
    chunks = scheduler.schedule()
    steps = [(chunk.sequence.request.index, chunk.start, chunk.stop) for chunk in chunks]
    for draw in scheduler.begun(chunks):
        draw.settle(1)
    return steps


def test_decodes_first_then_started_prompts_then_new_ones_in_order():
    scheduler = Scheduler(limits(max_num_tokens=10))
    scheduler.add(request(0, 3))
    assert advance(scheduler) == [(0, 0, 3)]
    scheduler.add(request(1, 12))
    scheduler.add(request(2, 8))
    assert advance(scheduler) == [(0, 3, 4), (1, 0, 9)]
    assert advance(scheduler) == [(0, 4, 5), (1, 9, 12), (2, 0, 6)]
    assert advance(scheduler) == [(0, 5, 6), (1, 12, 13), (2, 6, 8)]


def test_a_place_is_free_as_soon_as_a_request_finishes():
    scheduler = Scheduler(limits(max_batch_size=2))
    for index, new in enumerate([1, 3, 2]):
        scheduler.add(request(index, 2, new))
    assert advance(scheduler) == [(0, 0, 2), (1, 0, 2)]
    assert advance(scheduler) == [(1, 2, 3), (2, 0, 2)]


def test_more_decodes_than_tokens_take_turns_by_age():
    scheduler = Scheduler(limits(max_num_tokens=2, max_batch_size=3))
    for index in range(3):
        scheduler.add(request(index, 1, 3))
    while scheduler.has_work:
        assert len(advance(scheduler)) <= 2


def test_without_blocks_the_youngest_is_preempted_and_computed_again():
    # 6 blocks of 4: two prompts of 9 tokens fit (3 blocks each), growing does not.
    tight = limits(num_blocks=6)
    scheduler = Scheduler(tight)
    scheduler.add(request(0, 9, 8))
    scheduler.add(request(1, 7, 8))
    scheduler.add(request(2, 1, 1))
    steps = []
    while scheduler.has_work:
        steps.append(advance(scheduler))
    assert scheduler.num_preemptions == 1 and scheduler.cache.num_free == 6
    again = next(step for step in steps[1:] for step in step if step[0] == 1 and step[1] == 0)
    assert again[2] > 7, "recomputed with its generated tokens"
    order = [index for step in steps for index, start, _ in step if start == 0]
    assert order == [0, 1, 1, 2], "a preempted request goes before those that wait"


def test_a_sequence_that_is_preempted_while_its_last_token_is_drawn_ends_all_the_same():
    scheduler = Scheduler(limits(num_blocks=5))
    for index, prompt in enumerate([8, 7]):
        scheduler.add(request(index, prompt, 8))
    advance(scheduler)
    draws = scheduler.begun(scheduler.schedule())  # three blocks and two
    assert not scheduler.cache.num_free
    scheduler.begun(scheduler.schedule())  # the second needs a third
    second = draws[1].sequence
    assert list(scheduler.waiting) == [second]
    scheduler.end(second, draws[1].position)
    assert not scheduler.waiting and second.num_tokens == 8


def test_preempted_requests_get_the_same_tokens():
    tight = limits(max_batch_size=6, num_blocks=8, max_num_tokens=12)
    requests = [request(index, 5 + index, 20 - index) for index in range(8)]
    executable = ToyExecutable(tight)
    with Session(executable, LocalComm(), vocab_size=VOCAB) as session:
        for entry in requests:
            session.add(entry)
        done = {}
        while session.has_work:
            done.update({completion.index: completion for completion in session.step()})
    assert session.scheduler.num_preemptions > 3
    for entry in requests:
        assert list(done[entry.index].token_ids) == reference(entry, tight.max_seq_len)
        assert done[entry.index].num_drawn == entry.max_new_tokens


def test_admission_leaves_running_sequences_room_to_grow():
    scheduler = Scheduler(limits(num_blocks=5))
    scheduler.add(request(0, 8, 8))
    scheduler.add(request(1, 12, 1))
    advance(scheduler)
    # Three blocks are free, which the second prompt would fill; the first is about to need one.
    assert [sequence.request.index for sequence in scheduler.running] == [0]
    while scheduler.has_work:
        advance(scheduler)
    assert scheduler.num_preemptions == 0


def test_steps_count_prefill_and_decode_tokens():
    session = Session(ToyExecutable(limits()), LocalComm(), vocab_size=VOCAB)
    session.add(request(0, 5, 3))
    session.step()
    assert (session.last_step.prefill_tokens, session.last_step.decode_tokens) == (5, 0)
    session.add(request(1, 2, 3))
    session.step()
    assert (session.last_step.prefill_tokens, session.last_step.decode_tokens) == (2, 1)


def test_a_sequence_in_a_roomy_cache_reads_one_run_of_blocks():
    executable = ToyExecutable(limits(max_batch_size=4, num_blocks=32))
    with Session(executable, LocalComm(), vocab_size=VOCAB) as session:
        for index in range(4):
            session.add(request(index, 3, 25))
        while session.has_work:
            session.step()
    for batch in executable.batches:
        for row, length in zip(batch.block_table, batch.kv_lens, strict=True):
            assert (np.diff(row[: -(-length // 4)]) == 1).all()
