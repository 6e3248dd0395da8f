"""Which blocks of the KV cache belong to which sequence.

`BlockAllocator` hands out block numbers; `KvCache` keeps one block table a sequence. Targets read
a run of ascending neighbouring blocks faster than scattered ones, so both keep a sequence's blocks
together where they can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmforge.engine.step import Int32, Limits


class BlockAllocator:
    """The free blocks of ``range(num_blocks)``, kept as maximal runs.

    Both ends of each run are indexed, so extending a sequence and giving a block back take
    constant time; starting a new run looks at every free run once (about one a live sequence).
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._stop_of: dict[int, int] = {0: num_blocks} if num_blocks else {}
        self._start_of: dict[int, int] = {num_blocks: 0} if num_blocks else {}
        self._is_free = np.ones(num_blocks, np.bool_)
        self.num_free = num_blocks

    def allocate(self, count: int, after: int | None = None, expected: int = 0) -> list[int]:
        """`count` blocks, in the order to use them.

        after: the sequence's last block; the blocks that follow it are taken first.
        expected: blocks that the sequence may come to need from here on, to choose a place with
            room. There must be `count` free blocks.
        """
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken: list[int] = []
        start = None if after is None else after + 1
        while len(taken) < count:
            if start is None or start not in self._stop_of:
                start = self._place(max(expected, count) - len(taken))
            stop = min(self._stop_of[start], start + count - len(taken))
            self._take(start, stop)
            taken.extend(range(start, stop))
            start = stop
        return taken

    def release(self, blocks: list[int]) -> None:
        """Take blocks back; each must have been allocated."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
            start = self._start_of.pop(block, block)
            stop = self._stop_of.pop(block + 1, block + 1)
            self._stop_of[start] = stop
            self._start_of[stop] = start
        self.num_free += len(blocks)

    def _place(self, expected: int) -> int:
        """Where a new run of blocks should start: in the longest free run. Its first half is left
        to the sequence before it, as far as `expected` blocks still fit behind. A block that none
        will follow fits anywhere; the lowest keeps the live ones together, as targets want them
        whose sequences have a block each (a step of such a target computes a range of blocks)."""
        if expected <= 1:
            return min(self._stop_of)
        start, stop = max(self._stop_of.items(), key=lambda run: (run[1] - run[0], -run[0]))
        if start == 0:
            return start
        length = stop - start
        middle = start + max(0, min(length // 2, length - expected))
        if middle > start:
            # Split the run, so that `middle` starts one.
            self._stop_of[start], self._start_of[middle] = middle, start
            self._stop_of[middle], self._start_of[stop] = stop, middle
        return middle

    def _take(self, start: int, stop: int) -> None:
        """Remove ``start:stop``, the beginning of a free run."""
        end = self._stop_of.pop(start)
        if stop < end:
            self._stop_of[stop], self._start_of[end] = end, stop
        else:
            del self._start_of[end]
        self._is_free[start:stop] = False
        self.num_free -= stop - start


class KvCache:
    """Block tables of the sequences that have blocks, by a number that names the sequence."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self._width = limits.max_blocks_per_seq
        self._allocator = BlockAllocator(limits.num_blocks)
        # All tables are rows of one matrix, so that a step's are taken in one go.
        self._tables = np.zeros((limits.max_batch_size, self._width), np.int32)
        self._free_rows = list(range(limits.max_batch_size - 1, -1, -1))
        self._rows: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has."""
        return self._allocator.num_free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self._block_size)

    def count(self, sequence: int) -> int:
        """Blocks that the sequence has."""
        return self._counts.get(sequence, 0)

    def table(self, sequence: int) -> Int32:
        """The sequence's blocks in order of position. A view, valid until the next call that
        changes the sequence."""
        return self._tables[self._rows[sequence], : self._counts[sequence]]

    def tables(self, sequences: Sequence[int], tokens: Int32) -> Int32:
        """A row for each sequence with the blocks of its first `tokens`, zeros behind them."""
        widths = -(-tokens // self._block_size)
        columns = np.arange(widths.max(initial=0))
        rows = self._tables[[self._rows[sequence] for sequence in sequences], : len(columns)]
        rows[columns >= widths[:, None]] = 0
        return rows

    def holds(self, sequence: int, tokens: int) -> bool:
        """Whether the sequence's blocks hold this many tokens."""
        return tokens <= self._counts.get(sequence, 0) * self._block_size

    def missing(self, sequence: int, tokens: int) -> int:
        """Blocks to allocate before the sequence can hold `tokens` tokens."""
        return max(0, self.blocks_for(tokens) - self.count(sequence))

    def grow(self, sequence: int, tokens: int, final_tokens: int = 0) -> bool:
        """Give the sequence blocks for `tokens` tokens, of at most `final_tokens` that it will
        come to; False, and no change, where there are not enough."""
        have = self.count(sequence)
        missing = self.missing(sequence, tokens)
        if missing == 0:
            return True
        if missing > self.num_free:
            return False
        if have == 0:
            self._rows[sequence] = self._free_row()
        table = self._tables[self._rows[sequence]]
        last = int(table[have - 1]) if have else None
        blocks = self._allocator.allocate(missing, last, self.blocks_for(final_tokens) - have)
        table[have : have + missing] = blocks
        self._counts[sequence] = have + missing
        return True

    def free(self, sequence: int) -> None:
        """Give back all blocks of the sequence, which must have some."""
        self._allocator.release(self.table(sequence).tolist())
        self._free_rows.append(self._rows.pop(sequence))
        del self._counts[sequence]

    def _free_row(self) -> int:
        if not self._free_rows:
            count = len(self._tables)
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
            self._free_rows = list(range(2 * count - 1, count - 1, -1))
        return self._free_rows.pop()
