"""A rank's device memory: buffers at addresses that do not change while it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.device_sampling import PARAMS, history_ints
from llmforge.engine.memory import nbytes
from llmforge.engine.step import Limits
from llmforge.engine.tensorrt.device import Bytes, Device
from llmforge.engine.tensorrt.io import (
    LOGIT_ROWS,
    PAST_LENS,
    POSITIONS,
    PROMPT_LENS,
    TOKEN_IDS,
    Profile,
)
from llmforge.engine.tensorrt.kernels import (
    ARRIVED,
    BESTS,
    DRAWN,
    HISTORY,
    LARGEST,
    SAMPLING,
    SEEN,
    cache_groups,
)
from llmforge.engine.tensorrt.plan import RankPlan, Step
from llmforge.kernels.launch import DTYPE_BYTES
from llmforge.kernels.sampling import sample_parts, seen_words
from llmforge.model.graph import Tensor

ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a call lie in one block of memory, which one copy uploads.

    fields: byte offset, dtype and largest element count of each, by name.
    """

    fields: Mapping[str, tuple[int, np.dtype[np.generic], int]]
    nbytes: int

    @classmethod
    def of(cls, profile: Profile) -> Layout:
        """For any call of a profile."""
        batch, tokens, rows = profile.B[2], profile.B[2] * profile.S[2], profile.R[2]
        int32 = np.dtype(np.int32)
        sizes = {
            PAST_LENS: (int32, batch),
            PROMPT_LENS: (int32, batch),
            LOGIT_ROWS: (int32, rows),
            SAMPLING: (PARAMS, rows),
            TOKEN_IDS: (int32, tokens),
            POSITIONS: (int32, tokens),
        }
        fields, offset = {}, 0
        for name, (dtype, count) in sizes.items():
            fields[name] = (offset, dtype, count)
            offset += aligned(dtype.itemsize * count)
        return cls(fields, offset)

    def view(self, block: Bytes, name: str) -> NDArray[np.generic]:
        """The array of this name in host memory that is laid out so."""
        offset, dtype, count = self.fields[name]
        return block[offset : offset + dtype.itemsize * count].view(dtype)


class Memory:
    """Caches, the tensors between engines, and what sampling needs."""

    def __init__(self, plan: RankPlan, limits: Limits, device: Device) -> None:
        self._device = device
        self._addresses: dict[str, int] = {}
        self.slot_bytes: dict[str, int] = {}  # of each cache, by its name
        tokens = max(p.B[2] * p.S[2] for p in plan.profiles)
        self.rows = max(p.R[2] for p in plan.profiles)
        for cache in plan.caches:
            slot = cache.heads * plan.capacity * cache.size * DTYPE_BYTES[cache.dtype]
            self.slot_bytes[cache.name] = slot
            address = device.allocate(plan.slots * slot)
            self._addresses[cache.name] = self._addresses[cache.output] = address
            if not plan.native_cache:
                new = tokens * cache.heads * cache.size * DTYPE_BYTES[cache.dtype]
                self._addresses[cache.output] = device.allocate(new)
        for name, caches in cache_groups(plan).items():
            pairs = [(self._addresses[c.name], self._addresses[c.output]) for c in caches]
            self._addresses[name] = self._uploaded(np.array(pairs, np.uint64))
        self._allocate_tensors(plan, {"tokens": tokens, "rows": self.rows})
        if plan.logits is not None:
            self._allocate_sampling(plan.tensors[plan.logits], limits)

    def address(self, name: str) -> int:
        return self._addresses[name]

    def knows(self, name: str) -> bool:
        return name in self._addresses

    def _allocate_tensors(self, plan: RankPlan, sizes: Mapping[str, int]) -> None:
        needed = {t.name: aligned(nbytes(t, sizes)) for t in plan.tensors.values()}
        places, blocks = share_blocks(plan.steps, needed, plan.logits)
        addresses = [self._device.allocate(size) for size in blocks]
        self._addresses.update({name: addresses[block] for name, block in places.items()})

    def _allocate_sampling(self, logits: Tensor, limits: Limits) -> None:
        vocab = logits.shape[-1]
        assert isinstance(vocab, int)
        # The largest logits lie behind the tokens: one copy brings both.
        self._addresses[DRAWN] = self._device.allocate(8 * self.rows)
        self._addresses[LARGEST] = self._addresses[DRAWN] + 4 * self.rows
        self._addresses[HISTORY] = self._device.allocate(4 * history_ints(limits))
        self._addresses[SEEN] = self._device.allocate(4 * self.rows * seen_words(vocab))
        self._addresses[BESTS] = self._device.allocate(8 * self.rows * sample_parts(vocab))
        self._addresses[ARRIVED] = self._device.allocate(4 * self.rows)

    def _uploaded(self, array: NDArray[np.uint64]) -> int:
        address = self._device.allocate(array.nbytes)
        self._device.upload(address, array)
        self._device.synchronize()
        return address


def share_blocks(
    steps: Sequence[Step], sizes: Mapping[str, int], last: str | None
) -> tuple[dict[str, int], list[int]]:
    """A block of memory for each tensor that a step makes, and the blocks' sizes. Tensors of one
    size share a block where the one is not needed any more when the other is made; `last` is
    needed to the end."""
    needed = {name: len(steps) for name in (last,) if name is not None}
    for index, step in enumerate(steps):
        for name in (*step.inputs, step.x, *step.outputs, step.out):
            if name in sizes:
                needed[name] = max(index, needed.get(name, 0))
    places: dict[str, int] = {}
    blocks: list[int] = []
    free: dict[int, list[int]] = {}  # block numbers by size
    for index, step in enumerate(steps):
        for name in (*step.outputs, step.out):
            if name not in sizes or name in places:
                continue
            if spare := free.get(sizes[name]):
                places[name] = spare.pop()
            else:
                places[name] = len(blocks)
                blocks.append(sizes[name])
        for name, block in places.items():
            if needed[name] == index:
                free.setdefault(sizes[name], []).append(block)
    return places, blocks
