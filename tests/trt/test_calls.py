"""A StepBatch split into calls: each token computed once in its place, each result found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.engine.step import StepBatch
from llmforge.engine.tensorrt.calls import CallShapes, decode_batches, split

CAPACITY = 32


def step(sequences, *, wanted=None):
    """A batch of (slot, past, new), token ids distinct; `wanted`: those that want a token."""
    starts = np.cumsum([0, *(new for _, _, new in sequences)]).astype(np.int32)
    wanted = range(len(sequences)) if wanted is None else wanted
    return StepBatch(
        token_ids=np.arange(100, 100 + starts[-1], dtype=np.int32),
        positions=np.concatenate(
            [np.arange(past, past + new) for _, past, new in sequences]
        ).astype(np.int32),
        query_starts=starts,
        kv_lens=np.array([past + new for _, past, new in sequences], np.int32),
        block_table=np.array([[slot] for slot, _, _ in sequences], np.int32),
        prompt_lens=np.array([10 + slot for slot, _, _ in sequences], np.int32),
        logit_rows=np.array([starts[i + 1] - 1 for i in wanted], np.int32),
    )


def shapes(slots=8, prefill_batch=1):
    return CallShapes(CAPACITY, decode_batches(slots), prefill_batch)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (200, None)],
)
def test_decode_batches_end_with_the_number_of_slots(slots, expected):
    sizes = decode_batches(slots)
    assert sizes[-1] == slots and list(sizes) == sorted(set(sizes))
    assert expected is None or sizes == expected


def test_a_decode_step_is_one_call_from_slot_0():
    known = np.array([5, 9, 3, 0, 0, 0, 0, 0], np.int32)
    (call,) = split(step([(2, 3, 1), (0, 5, 1)]), known, shapes())
    assert call.decode and call.first_slot == 0 and call.shape == (4, 1)
    assert call.token_ids[:, 0].tolist() == [101, 0, 100, 0]
    # Slot 1 is not in the step: its dummy token comes behind the 9 that it holds.
    assert call.past_lens.tolist() == [5, 9, 3, 0]
    assert call.positions[:, 0].tolist() == [5, 9, 3, 0]
    assert call.prompt_lens.tolist() == [10, 1, 12, 1]
    assert call.logit_rows.tolist() == [0, 1, 2, 3] and call.results.tolist() == [1, -1, 0, -1]
    assert known.tolist() == [6, 9, 4, 0, 0, 0, 0, 0]


def test_a_full_slot_gets_its_dummy_behind_its_end():
    known = np.array([CAPACITY, 2], np.int32)
    (call,) = split(step([(1, 2, 1)]), known, shapes(2))
    assert call.past_lens.tolist() == [CAPACITY, 2]
    assert call.positions[:, 0].tolist() == [CAPACITY - 1, 2]  # tables have no entry behind it


def test_prefill_comes_before_decode_whose_dummies_come_behind_it():
    known = np.array([4, 0, 0, 0], np.int32)
    prefill, decode = split(step([(0, 4, 1), (1, 0, 7)]), known, shapes(4))
    assert not prefill.decode and prefill.first_slot == 1 and prefill.shape == (1, 7)
    assert prefill.past_lens.tolist() == [0] and prefill.results.tolist() == [1]
    assert prefill.logit_rows.tolist() == [6]
    assert decode.shape == (1, 1) and decode.results.tolist() == [0]
    (decode,) = split(step([(0, 5, 1), (2, 3, 1)]), known, shapes(4))
    assert decode.past_lens.tolist() == [5, 7, 3, 0]


def test_a_chunk_that_is_not_the_last_wants_no_result():
    known = np.zeros(2, np.int32)
    (call,) = split(step([(0, 0, 5)], wanted=[]), known, shapes(2))
    assert call.logit_rows.tolist() == [0] and call.results.tolist() == [-1]
    (call,) = split(step([(0, 5, 1)], wanted=[]), known, shapes(2))
    assert call.decode and call.results.tolist() == [-1]


def test_neighbours_of_equal_length_share_a_prefill_call():
    known = np.zeros(8, np.int32)
    batch = step([(3, 0, 4), (1, 0, 4), (2, 8, 4), (5, 0, 4), (6, 0, 3)])
    calls = split(batch, known, shapes(8, prefill_batch=2))
    assert [(c.first_slot, c.shape) for c in calls] == [
        (1, (2, 4)), (3, (1, 4)), (5, (1, 4)), (6, (1, 3)),
    ]  # fmt: skip
    assert calls[0].past_lens.tolist() == [0, 8] and calls[0].results.tolist() == [1, 2]
    assert calls[0].logit_rows.tolist() == [3, 7]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_token_is_computed_once_and_every_result_found(data):
    slots = data.draw(st.integers(1, 9))
    prefill_batch = data.draw(st.integers(1, slots))
    known = np.array(data.draw(st.lists(st.integers(0, CAPACITY), min_size=slots, max_size=slots)))
    known = known.astype(np.int32)
    chosen = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, unique=True))
    sequences = []
    for slot in chosen:
        new = data.draw(st.integers(1, 5))
        sequences.append((slot, data.draw(st.integers(0, CAPACITY - new)), new))
    wanted = [i for i in range(len(sequences)) if data.draw(st.booleans())]
    batch = step(sequences, wanted=wanted)
    before = known.copy()
    calls = split(batch, known, shapes(slots, prefill_batch))

    real = {(s, past + i): 100 + batch.query_starts[n] + i
            for n, (s, past, new) in enumerate(sequences) for i in range(new)}  # fmt: skip
    seen, results = {}, {}
    for call in calls:
        rows, tokens = call.shape
        assert call.decode == (tokens == 1)
        assert call.first_slot + rows <= slots
        flat = [(call.first_slot + b, s) for b in range(rows) for s in range(tokens)]
        for slot, s in flat:
            b = slot - call.first_slot
            at = (slot, int(call.past_lens[b]) + s)
            if at in real and slot in chosen and call.token_ids[b, s]:
                assert at not in seen and call.token_ids[b, s] == real[at]
                assert call.positions[b, s] == at[1]
                seen[at] = True
            else:  # a dummy writes nowhere that holds a token
                length = batch.kv_lens[chosen.index(slot)] if slot in chosen else before[slot]
                assert at[1] >= length and call.positions[b, s] < CAPACITY
        for row, result in zip(call.logit_rows, call.results, strict=True):
            if result >= 0:
                slot, s = flat[row]
                results[int(result)] = real[slot, int(call.past_lens[slot - call.first_slot]) + s]
    assert seen.keys() == real.keys()
    assert results == {i: batch.token_ids[row] for i, row in enumerate(batch.logit_rows)}
    expected = before
    expected[chosen] = batch.kv_lens
    assert (known == expected).all()
