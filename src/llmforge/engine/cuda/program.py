"""`Program`: a graph lowered for one kind of step, and where its buffers lie.

A program is a list of kernel launches and matrix products over named buffers. It holds no
addresses, so it is made at build time too, to know which kernels the engine needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmforge.engine.step import Limits
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.launch import DTYPE_BYTES, Dim, HeadsMap, Launch, Operand, TensorMap
from llmforge.kernels.sampling import SAMPLE_PARAMS_BYTES

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and more than any load needs


@dataclass(frozen=True)
class Links:
    """How ranks exchange: in memory that they share (kernels/exchange.py), else by NCCL. group:
    those of a tensor-parallel group; messages: those of neighbouring pipeline stages."""

    group: bool = True
    messages: bool = True


@dataclass(frozen=True)
class StepShape:
    """What a program is for: steps of at most `tokens` and `sequences`. decode: each sequence has
    exactly one token, and the next token of each is wanted. bulk_copies: the GPU has them,
    and shared memory for the rings of two kernels (compute capability 9 to 11), so few rows may be
    multiplied by stream_gemm.cu and gemv.cu. warpgroups: the GPU has products of warpgroups
    (compute capability 9.0), so more rows may be multiplied by wide_gemm.cu, and prompts have
    wide_attention.cu."""

    tokens: int
    sequences: int
    decode: bool
    bulk_copies: bool = False
    links: Links = Links()
    warpgroups: bool = False


@dataclass(frozen=True)
class Matmul:
    """out = x weightᵀ + bias, by the vendor's library."""

    x: Operand
    weight: Operand
    bias: Operand | None
    out: Operand


@dataclass(frozen=True)
class HeadMatmul:
    """out = x weightᵀ for each head by itself, by the vendor's library: x [tokens, heads * in],
    weight [heads, out, in]."""

    x: Operand
    weight: Operand
    out: Operand


@dataclass(frozen=True)
class Transfer:
    """NCCL's part of an exchange. gather: the operand of every rank of the tensor-parallel
    group into `collectives.PARTS`; send, receive: the operand to or from the rank `peer`."""

    kind: Literal["gather", "send", "receive"]
    operand: Operand
    peer: int = 0


Call = Launch | Matmul | HeadMatmul | Transfer


@dataclass(frozen=True)
class Instruction:
    """One step of a program, and the graph tensors that are computed once it has run. beside: it
    reads the step's arrays alone, and may run beside the instructions behind it, up to the first
    that uses one of its other buffers (`Program.joins`). Such instructions come first."""

    call: Call
    tensors: tuple[str, ...]
    beside: bool = False

    @property
    def operands(self) -> list[Operand]:
        if isinstance(self.call, Transfer):
            return [self.call.operand]
        if isinstance(self.call, HeadMatmul):
            return [self.call.x, self.call.weight, self.call.out]
        if isinstance(self.call, Matmul):
            found = (self.call.x, self.call.weight, self.call.bias, self.call.out)
            return [o for o in found if o is not None]
        arguments = self.call.arguments
        maps = [a.matrix for a in arguments if isinstance(a, TensorMap | HeadsMap)]
        return [a for a in arguments if isinstance(a, Operand)] + maps


@dataclass(frozen=True)
class Field:
    """An array of the step's upload: bytes from its start, and elements."""

    offset: int
    count: int


@dataclass(frozen=True)
class StepLayout:
    """Where the step's arrays lie in the one buffer that is uploaded."""

    fields: Mapping[str, Field]
    nbytes: int
    table_stride: int

    @classmethod
    def of(cls, shape: StepShape, limits: Limits) -> StepLayout:
        stride = limits.max_blocks_per_seq
        sizes = {
            "sampling": (shape.sequences, SAMPLE_PARAMS_BYTES),
            "token_ids": (shape.tokens, 4),
            "positions": (shape.tokens, 4),
            "query_starts": (shape.sequences + 1, 4),
            "kv_lens": (shape.sequences, 4),
            "prompt_lens": (shape.sequences, 4),
            "logit_rows": (shape.sequences, 4),
            "block_table": (shape.sequences * stride, 4),
        }
        fields = {}
        offset = 0
        for name, (count, size) in sizes.items():
            fields[name] = Field(offset, count)
            offset += -(-count * size // 16) * 16
        return cls(fields, offset, stride)


@dataclass(frozen=True)
class Program:
    """Instructions over buffers: of the arena (byte offsets in `arena`), the parameters, the
    states, the step's upload ("step.NAME"), `constants`, and the scratch that programs share.
    `sharing` follows once the step's tokens are drawn: it brings them to the other ranks of the
    group, where ranks look up tokens together. `group_slot` and `mail_slot`: the bytes that its
    exchanges with other ranks need at once."""

    shape: StepShape
    layout: StepLayout
    instructions: tuple[Instruction, ...]
    operands: Mapping[str, Operand]  # of every graph tensor that exists in memory
    outputs: tuple[str, ...]
    constants: Mapping[str, tuple[float, ...]]
    arena: Mapping[str, int]
    arena_bytes: int
    sharing: tuple[Call, ...] = ()
    group_slot: int = 0
    mail_slot: int = 0

    @property
    def beside(self) -> int:
        """How many instructions, the first, may run beside others."""
        return sum(instruction.beside for instruction in self.instructions)

    @property
    def joins(self) -> int:
        """The index of the first instruction that needs what those have written."""
        first = self.instructions[: self.beside]
        written = {o.buffer for i in first for o in i.operands if not o.buffer.startswith("step.")}
        for index, instruction in enumerate(self.instructions):
            if index >= len(first) and written & {o.buffer for o in instruction.operands}:
                return index
        return len(first)

    @property
    def kernels(self) -> dict[str, KernelSpec]:
        """The kernels that it launches, by key."""
        calls = (*(i.call for i in self.instructions), *self.sharing)
        return {call.kernel.key: call.kernel for call in calls if isinstance(call, Launch)}


def plan_arena(
    instructions: Sequence[Instruction],
    buffers: Mapping[str, int],
    kept: Sequence[str],
) -> tuple[dict[str, int], int]:
    """Byte offsets for `buffers` (sizes by name), so that those alive at once do not overlap, and
    the bytes needed. A buffer lives from its first use to its last; `kept` ones to the end."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, instruction in enumerate(instructions):
        for operand in instruction.operands:
            if operand.buffer in buffers:
                first.setdefault(operand.buffer, index)
                last[operand.buffer] = index
    for name in kept:
        last[name] = len(instructions)
    placed: list[tuple[int, int, str]] = []  # (offset, end, name)
    offsets: dict[str, int] = {}
    total = 0
    for name in sorted(first, key=lambda n: -buffers[n]):
        size = -(-buffers[name] // ALIGNMENT) * ALIGNMENT
        offset = 0
        for start, end, other in sorted(placed):
            overlaps = first[name] <= last[other] and first[other] <= last[name]
            if not overlaps:
                continue
            if offset + size <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
        placed.append((offset, offset + size, name))
        total = max(total, offset + size)
    return offsets, total


def buffer_bytes(shape: Sequence[Dim], dtype: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a contiguous tensor at these sizes of symbolic dimensions."""
    count = DTYPE_BYTES[dtype]
    for dim in shape:
        count *= dim if isinstance(dim, int) else sizes[dim]
    return count
