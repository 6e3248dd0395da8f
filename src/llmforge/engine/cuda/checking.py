"""Each instruction of an engine beside the plain-torch meaning of the ops that it computes, to find
the first one that is wrong.

What the GPU computed stands in for what the meaning gives, so every instruction is judged by its
own inputs and errors of those before it do not add up. Buffers are filled with NaN before every
run: what is read before it was written shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.program import HeadMatmul, Instruction, Matmul, Transfer
from llmforge.engine.cuda.target import decode_buckets
from llmforge.engine.step import Int32, Limits, StepBatch
from llmforge.model.reference import LOCAL, REFERENCE, Context

Tensor = torch.Tensor
# Relative to the norm of a row: eight roundings to the dtype that all go one way, and in float32
# what sums of some 10^4 products in another order explain.
TOLERANCE = {"bfloat16": 8 * 2.0**-8, "float16": 8 * 2.0**-11, "float32": 2e-5}
_LONGEST = 40  # tokens of a sequence; more would not be other code
_FEW_TOKENS, _MANY_TOKENS = 100, 300  # of prompts that kernels for short ones take, and do not


@dataclass(frozen=True)
class Check:
    """An instruction that computes tensors of the graph. error: the largest of their rows'
    differences, relative to a row's norm."""

    index: int
    kernel: str
    tensors: tuple[str, ...]
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not where it is NaN

    def to_dict(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error
        return {**vars(self), "error": error, "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"instruction {self.index} ({self.kernel}: {', '.join(self.tensors)}) is "
            f"{self.error:.2g} of a row's norm off, tolerance {self.tolerance:.2g}"
        )


def check_instructions(
    executable: CudaExecutable,
    batch: StepBatch,
    context: Context = LOCAL,
    *,
    device: str | None = None,
    stop_after: int | None = None,
) -> Iterator[Check]:
    """Run a step up to each of its instructions in turn, at most to `stop_after`. Meanings are
    computed on `device`, the engine's own if None; where ranks exchange in them it is "cpu". The
    step's blocks of the cache hold what earlier steps wrote there."""
    meanings = _Meanings(executable, batch, context, device)
    for index, instruction in enumerate(executable.instructions(batch)):
        if stop_after is not None and index > stop_after:
            return
        if not instruction.tensors:
            continue
        _poison(executable)
        computed = executable.run(batch, stop_after=index)
        errors = [meanings.error(name, got) for name, got in computed.items()]
        # A NaN must not hide among numbers.
        error = max(errors, key=lambda e: (math.isnan(e), e))
        dtypes = [str(got.dtype).removeprefix("torch.") for got in computed.values()]
        tolerance = max(TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE)
        yield Check(index, _kernel_of(instruction), instruction.tensors, error, tolerance)


def _poison(executable: CudaExecutable) -> None:
    """Fill the buffers that steps share with NaN, in every dtype. The step runs on a stream of its
    own, so the fill must be over first."""
    executable.memory.arena.fill_(255)
    if executable.memory.arena.is_cuda:
        torch.cuda.synchronize()


def _kernel_of(instruction: Instruction) -> str:
    call = instruction.call
    if isinstance(call, Matmul | HeadMatmul):
        return "torch"
    if isinstance(call, Transfer):
        return "NCCL"
    return call.kernel.entry


class _Meanings:
    """The tensors of a step, computed as they are asked for."""

    def __init__(
        self,
        executable: CudaExecutable,
        batch: StepBatch,
        context: Context,
        device: str | None,
    ) -> None:
        graph, tensors = executable.graph, executable.memory.tensors
        self._context = context
        self._device = device or executable.memory.arena.device
        self._node_of = {name: node for node in graph.nodes for name in node.outputs}
        # Of a router: the experts chosen. In 16 bits it may choose others that are as good, which
        # their weights tell.
        self._choices = {node.outputs[0] for node in graph.nodes if node.op == "route"}
        self._exact = all(p.dtype in ("float32", "int32") for p in graph.parameters)
        self._values: dict[str, Any] = {"": None}
        for tensor in graph.inputs:
            array = getattr(batch, tensor.name)
            self._values[tensor.name] = torch.from_numpy(array).to(self._device)
        blocks = int(batch.block_table.max()) + 1
        for state in graph.states:
            self._values[state.name] = tensors[state.name][:blocks].to(self._device, copy=True)
        for parameter in graph.parameters:
            self._values[parameter.name] = tensors[parameter.name].to(self._device)

    def error(self, name: str, got: Tensor) -> float:
        """How far the GPU's tensor is from its meaning; from now on it is what counts."""
        want = self._value(name)
        self._values[name] = got = got[: len(want)].to(self._device)
        if name in self._choices and not self._exact:
            return 0.0
        rows = want.double().flatten(1) if want.dim() > 1 else want.double()[:, None]
        difference = got.double().view_as(rows) - rows
        norms = rows.norm(dim=1)
        least = norms.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return float((difference.norm(dim=1) / norms.clamp(min=float(least))).max())

    def _value(self, name: str) -> Any:
        if name not in self._values:
            node = self._node_of[name]
            inputs = [self._value(source) for source in node.inputs]
            results = REFERENCE[node.op](inputs, node.attrs, self._context)
            for output, result in zip(node.outputs, results, strict=True):
                self._values.setdefault(output, result)
        return self._values[name]


@dataclass(frozen=True)
class _Sequences:
    """What steps are made of: random tokens, and blocks of the cache from the first on."""

    tokens: list[Int32]
    blocks: int  # of each

    def step(self, spans: list[tuple[int, int]], first: int = 0) -> StepBatch:
        """A step of the tokens from a begin to an end of each sequence from `first` on; the next
        token of each is wanted."""
        chosen = list(enumerate(spans))[first:]
        starts = np.cumsum([0, *(end - begin for _, (begin, end) in chosen)], dtype=np.int32)
        table = np.arange(len(spans) * self.blocks, dtype=np.int32).reshape(len(spans), -1)
        positions = [np.arange(begin, end, dtype=np.int32) for _, (begin, end) in chosen]
        return StepBatch(
            token_ids=np.concatenate([self.tokens[i][begin:end] for i, (begin, end) in chosen]),
            positions=np.concatenate(positions),
            query_starts=starts,
            kv_lens=np.array([end for _, (_, end) in chosen], np.int32),
            block_table=table[first:],
            prompt_lens=np.array([len(self.tokens[i]) for i, _ in chosen], np.int32),
            logit_rows=starts[1:] - np.int32(1),
        )


def steps_to_check(
    executable: CudaExecutable, vocab_size: int, seed: int = 0
) -> Iterator[tuple[str, StepBatch]]:
    """A step for each program of the engine, with its name: prompts, of few tokens and of many, one
    of them continued and one with a single new token; then decode steps of every bucket."""
    limits = executable.limits
    sequences = _random_sequences(limits, vocab_size, np.random.default_rng(seed))
    lengths = [len(tokens) for tokens in sequences.tokens]
    for first, end in _groups(lengths, limits.max_num_tokens):
        executable.step(sequences.step([(0, n) for n in lengths[:end]], first))  # fills the cache
    for most in (_FEW_TOKENS, _MANY_TOKENS):
        _, count = _groups(lengths, min(most, limits.max_num_tokens))[0]
        spans = [(0, n) for n in lengths[:count]]
        spans[1:2] = [(n // 2, n) for _, n in spans[1:2]]
        spans[2:3] = [(n - 1, n) for _, n in spans[2:3]]
        yield f"prompts of {sum(end - begin for begin, end in spans)} tokens", sequences.step(spans)
    for size in decode_buckets(limits):
        if size <= len(lengths):
            yield f"decode of {size}", sequences.step([(n - 1, n) for n in lengths[:size]])


def _random_sequences(limits: Limits, vocab_size: int, rng: np.random.Generator) -> _Sequences:
    """As many as a step has at most, of different lengths, where the cache has room for them."""
    count = min(limits.max_batch_size, limits.max_num_tokens, limits.num_blocks)
    room = limits.num_blocks // count * limits.block_size
    longest = min(_LONGEST, limits.max_seq_len, limits.max_num_tokens, room)
    lengths = [longest - 7 * i % longest for i in range(count)]
    tokens = [rng.integers(vocab_size, size=n).astype(np.int32) for n in lengths]
    return _Sequences(tokens, -(-longest // limits.block_size))


def _groups(lengths: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of neighbours that together have at most `most` tokens: the index of the first, and that
    behind the last."""
    groups, first, total = [], 0, 0
    for index, length in enumerate(lengths):
        if total + length > most:
            groups.append((first, index))
            first, total = index, 0
        total += length
    return [*groups, (first, len(lengths))]
