"""`Memory`: every buffer of a rank on the GPU, each at an address that does not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from llmforge.engine.cuda.program import Program
from llmforge.engine.cuda.state import DIVISION, MAX_SPLITS, SUMS
from llmforge.engine.device_sampling import PARAMS, check_drawn, fill_params, history_ints
from llmforge.engine.memory import largest_step
from llmforge.engine.step import Limits, StepBatch
from llmforge.kernels.attention import split_scratch_sizes
from llmforge.kernels.collectives import PARTS
from llmforge.kernels.decode_attention import MAX_BLOCKS
from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.sampling import sample_parts, seen_words
from llmforge.model.graph import Graph
from llmforge.model.reference import DTYPES

Tensor = torch.Tensor


class Staging:
    """The host's side of a step: its arrays, and what it draws. In pinned memory, where the GPU
    fetches and delivers them itself."""

    def __init__(self, nbytes: int, limits: Limits) -> None:
        self.arrays = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        # The tokens, then the largest logits.
        self.drawn = torch.zeros(2 * limits.max_batch_size, dtype=torch.int32, pin_memory=True)
        # What drawing needs of the sequences; a copy takes it, if there is any.
        self.history = torch.zeros(history_ints(limits), dtype=torch.int32, pin_memory=True)
        self.done = torch.cuda.Event()  # recorded behind the step
        self._arrays = self.arrays.numpy()
        self._drawn = self.drawn.numpy()
        self._limits = limits

    def array(self, program: Program, name: str, dtype: Any = np.int32) -> Any:
        """An array of the program's step."""
        field = program.layout.fields[name]
        itemsize = np.dtype(dtype).itemsize
        return self._arrays[field.offset : field.offset + field.count * itemsize].view(dtype)

    def tokens(self, batch: StepBatch) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The tokens drawn; waits for them. Raises RequestError where a row had no finite largest
        logit."""
        self.done.synchronize()
        count = len(batch.logit_rows)
        largest = self._drawn[self._limits.max_batch_size :].view(np.float32)[:count]
        check_drawn(largest, batch.sampling)
        tokens: np.ndarray[Any, np.dtype[np.int32]] = self._drawn[:count].copy()
        return tokens


class Memory:
    """Weights, KV cache, the arena that programs share, their scratch, and the step's arrays on
    both sides: on the host's those of two steps, for the next is prepared while one runs. The cache
    has one block more than the limits say, for what fills up a bucket."""

    def __init__(
        self,
        graph: Graph,
        limits: Limits,
        weights: Mapping[str, Tensor],
        all_programs: list[Program],
        device: torch.device,
        shared: Mapping[str, int],
    ) -> None:
        """shared: addresses of the buffers that ranks exchange by."""
        self._shared = shared
        self.programs = all_programs
        self.limits = limits
        sizes = largest_step(limits)
        sizes["blocks"] += 1
        self.tensors: dict[str, Tensor] = dict(weights)
        for state in graph.states:
            shape = [sizes[d] if isinstance(d, str) else d for d in state.shape]
            # Zeros, so that a block that was never written holds no NaN.
            self.tensors[state.name] = torch.zeros(shape, dtype=DTYPES[state.dtype], device=device)
        for program in all_programs:
            for name, values in program.constants.items():
                self.tensors[name] = torch.tensor(values, dtype=torch.float32, device=device)
        batch = limits.max_batch_size
        partial, counters = _split_scratch(graph, all_programs)
        outputs = [p.operands[name] for p in all_programs for name in p.outputs]
        vocab = max((logits.features for logits in outputs), default=0)
        shapes = {
            "scratch.partial": (partial, torch.float32),
            "scratch.counters": (counters, torch.int32),
            SUMS: (_sums(all_programs), torch.float32),
            # One a group of blocks that share a product, or a pair's keys.
            "scratch.arrived": (MAX_BLOCKS, torch.int32),
            **_divisions(all_programs),
            "sample.tokens": (2 * batch, torch.int32),
            "sample.history": (history_ints(limits), torch.int32),
            "sample.seen": (batch * seen_words(vocab), torch.int32),
            "sample.bests": (batch * 2 * sample_parts(vocab), torch.int32),
            "sample.arrived": (batch, torch.int32),
        }
        gathered = [p.group_slot for p in all_programs if not p.shape.links.group]
        shapes[PARTS] = (max(gathered, default=0), torch.uint8)
        for name, (count, dtype) in shapes.items():
            self.tensors[name] = torch.zeros(max(count, 1), dtype=dtype, device=device)
        # The largest logits lie behind the tokens: one copy brings both.
        self.tensors["sample.largest"] = self.tensors["sample.tokens"][batch:].view(torch.float32)
        self.arena = torch.zeros(
            max(p.arena_bytes for p in all_programs), dtype=torch.uint8, device=device
        )
        most = max(p.layout.nbytes for p in all_programs)
        self.tensors["step"] = torch.zeros(most, dtype=torch.uint8, device=device)
        self._staging = (Staging(most, limits), Staging(most, limits))
        self._turn = 0
        self.tensors["staging.turn"] = torch.zeros(1, dtype=torch.int32, device=device)
        for turn, staging in enumerate(self._staging):
            self.tensors[f"staging.arrays.{turn}"] = staging.arrays
            self.tensors[f"staging.drawn.{turn}"] = staging.drawn

    def address(self, program: Program, name: str) -> int:
        if name.startswith("arena."):
            return self.arena.data_ptr() + program.arena[name]
        if name.startswith("step."):
            field = program.layout.fields[name.removeprefix("step.")]
            return self.tensors["step"].data_ptr() + field.offset
        if name in self._shared:
            return self._shared[name]
        return self.tensors[name].data_ptr()

    def view(self, program: Program, operand: Operand, rows: int | None = None) -> Tensor:
        """The operand as a tensor; `rows` of it where its first dimension is symbolic."""
        shape = [d if isinstance(d, int) else rows or 0 for d in operand.shape]
        dtype = DTYPES[operand.dtype]
        if operand.buffer.startswith("arena."):
            start = program.arena[operand.buffer] + operand.offset * dtype.itemsize
            base = self.arena[start:].view(-1)[: (len(self.arena) - start) // 16 * 16].view(dtype)
            strides = [operand.row_stride, 1] if len(shape) == 2 else [1]
            return base.as_strided(shape, strides)
        return self.tensors[operand.buffer]

    def next_staging(self) -> Staging:
        """The area that the next step will fetch: to be called once for each step that runs. Waits
        for the step that used it last, whose tokens nobody may have asked for."""
        staging = self._staging[self._turn]
        staging.done.synchronize()
        self._turn = 1 - self._turn
        return staging

    def fill_sampling(self, staging: Staging, program: Program, batch: StepBatch) -> None:
        """Write how to sample each row, and upload what any row needs of its sequence."""
        rows = staging.array(program, "sampling", PARAMS)[: len(batch.sampling)]
        if used := fill_params(rows, batch.sampling, staging.history.numpy()):
            there = self.tensors["sample.history"]
            there[:used].copy_(staging.history[:used], non_blocking=True)


def _split_scratch(graph: Graph, all_programs: list[Program]) -> tuple[int, int]:
    """Elements of the scratch that split attention needs, for the largest of the programs."""
    partial = counters = 1
    for node in graph.nodes:
        if node.op != "attention":
            continue
        features = graph.tensors[node.inputs[0]].shape[-1]
        assert isinstance(features, int)
        head_dim = node.attrs["head_dim"]
        for program in all_programs:
            sizes = split_scratch_sizes(
                program.shape.sequences, features // head_dim, head_dim, MAX_SPLITS
            )
            partial, counters = max(partial, sizes[0]), max(counters, sizes[1])
    return partial, counters


def _operands(all_programs: list[Program]) -> Iterator[Operand]:
    """Those of all launches."""
    calls = [i.call for program in all_programs for i in program.instructions]
    for call in calls:
        if isinstance(call, Launch):
            yield from (o for o in call.arguments if isinstance(o, Operand))


def _sums(all_programs: list[Program]) -> int:
    """Elements of the scratch for products that several blocks share, for the largest of them."""
    return max((o.features for o in _operands(all_programs) if o.buffer == SUMS), default=0)


def _divisions(all_programs: list[Program]) -> dict[str, tuple[int, torch.dtype]]:
    """The buffers in which is how steps' keys are divided. Each has its own: they are read before
    the kernels before are known to be complete."""
    used = {o.buffer: o for o in _operands(all_programs) if o.buffer.startswith(DIVISION)}
    return {name: (MAX_BLOCKS * o.features, torch.int32) for name, o in used.items()}
