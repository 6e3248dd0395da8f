"""BlockAllocator and KvCache against a plain set of free blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import limits

from llmforge.runtime.cache import BlockAllocator, KvCache


def check_runs(allocator: BlockAllocator, free: set[int]) -> None:
    """The runs are those of `free`, each maximal up to a split, and indexed at both ends."""
    assert allocator.num_free == len(free)
    covered = [block for start, stop in allocator._stop_of.items() for block in range(start, stop)]
    assert sorted(covered) == sorted(free)
    assert {stop: start for start, stop in allocator._stop_of.items()} == allocator._start_of
    assert set(np.flatnonzero(allocator._is_free).tolist()) == free


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8), st.integers(0, 20)), max_size=60),
)
def test_blocks_are_conserved_and_never_given_twice(num_blocks, operations):
    allocator = BlockAllocator(num_blocks)
    free = set(range(num_blocks))
    held: dict[int, list[int]] = {}
    for owner, count, expected in operations:
        if owner in held and count > 6:
            blocks = held.pop(owner)
            allocator.release(blocks)
            free |= set(blocks)
        elif count <= len(free):
            mine = held.setdefault(owner, [])
            after = mine[-1] if mine else None
            blocks = allocator.allocate(count, after, expected)
            assert len(set(blocks)) == count and set(blocks) <= free
            if after is not None and after + 1 in free:
                assert blocks[0] == after + 1
            free -= set(blocks)
            mine += blocks
        check_runs(allocator, free)


def test_growing_sequences_stay_contiguous_in_a_cache_of_full_size():
    # max_batch_size sequences of max_seq_len: each can have a run of its own.
    cache = KvCache(limits(max_batch_size=4, max_seq_len=32, block_size=4, num_blocks=32))
    for tokens in range(4, 33):
        for sequence in range(4):
            assert cache.grow(sequence, tokens, 32)
    for sequence in range(4):
        assert (np.diff(cache.table(sequence)) == 1).all()
    assert cache.num_free == 0 and not cache.grow(5, 1)


def test_a_prompt_gets_a_run_that_is_long_enough():
    allocator = BlockAllocator(16)
    allocator.allocate(2, expected=2)
    assert allocator.allocate(10, expected=12) == list(range(4, 14))


def test_a_freed_block_joins_its_neighbours():
    allocator = BlockAllocator(6)
    blocks = allocator.allocate(6)
    for block in (blocks[1], blocks[3], blocks[2]):
        allocator.release([block])
    assert allocator._stop_of == {1: 4}


def test_freeing_twice_is_caught():
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(blocks)


def test_a_sequence_that_cannot_grow_is_left_as_it_was():
    cache = KvCache(limits(num_blocks=3))
    assert cache.grow(0, 8) and cache.grow(1, 1)
    assert not cache.grow(0, 9)
    assert cache.count(0) == 2 and cache.num_free == 0
    cache.free(1)
    assert cache.grow(0, 9) and cache.table(0).tolist() == [0, 1, 2]


def test_sequences_of_one_block_take_the_lowest_that_is_free():
    cache = KvCache(limits(max_batch_size=8, max_seq_len=32, block_size=32, num_blocks=8))
    for sequence in range(5):
        assert cache.grow(sequence, 3, 30)
    assert [cache.table(sequence)[0] for sequence in range(5)] == [0, 1, 2, 3, 4]
    cache.free(1)
    cache.free(3)
    assert cache.grow(5, 3, 30) and cache.grow(6, 3, 30) and cache.grow(7, 3, 30)
    assert [cache.table(sequence)[0] for sequence in (5, 6, 7)] == [1, 3, 5]


def test_the_tables_of_a_step_hold_its_blocks_and_zeros():
    cache = KvCache(limits(max_batch_size=2, max_seq_len=32, block_size=4, num_blocks=8))
    assert cache.grow(7, 12) and cache.grow(3, 8)
    assert cache.holds(7, 12) and not cache.holds(7, 13) and not cache.holds(9, 1)
    own, other = cache.table(7).tolist(), cache.table(3).tolist()
    # The last block of 7 is not part of this step.
    step = cache.tables([3, 7, 3], np.array([8, 5, 2], np.int32))
    assert step.tolist() == [other, own[:2], [other[0], 0]]
    cache.free(7)
    # More sequences than the batch size: the rows are extended, and keep what they hold.
    assert cache.grow(1, 4) and cache.grow(2, 4)
    assert len({*cache.table(1).tolist(), *cache.table(2).tolist(), *other}) == 4
    assert cache.table(3).tolist() == other
    assert cache.tables([1, 3], np.array([4, 8], np.int32))[1].tolist() == other
