"""`Lowering`: a program in the making, for the rows and patterns that lower nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmforge.engine.cuda.program import (
    Call,
    Instruction,
    Program,
    StepLayout,
    StepShape,
    buffer_bytes,
    plan_arena,
)
from llmforge.engine.memory import largest_step
from llmforge.engine.step import Limits
from llmforge.kernels import stream
from llmforge.kernels.attention import Cache
from llmforge.kernels.decode_attention import DEFAULT_TUNING as DEFAULT_DECODE_TUNING
from llmforge.kernels.decode_attention import DecodeTuning
from llmforge.kernels.gemv import DEFAULT_TUNING, GemvTuning
from llmforge.kernels.launch import Dim, Operand
from llmforge.kernels.rows import DEFAULT_ROWS, RowsTuning
from llmforge.kernels.wide import DEFAULT_WIDE, InputNorm, WideTuning
from llmforge.model.graph import Graph, Node

# Blocks a sequence's keys are divided among at most: enough to fill a large GPU from one sequence.
MAX_SPLITS = 32
SUMS = "scratch.sums"  # the buffer of products that several blocks share
DIVISION = "division."  # how such buffers' names begin: of the keys, for decode_attention.cu

ProductKernel = Literal["stream_gemm", "gemv", "rows_gemm", "wide_gemm", "torch"]
AttentionKernel = Literal["separate", "fused"]


@dataclass(frozen=True)
class KernelChoice:
    """What computes the products of a step where the GPU has bulk copies: of decode steps of one
    token, and of 2 to 8. gemv.cu and rows_gemm.cu leave the shapes that they do not take to
    stream_gemm.cu, and that to torch. Where it has products of warpgroups: those of more tokens, as
    WideTuning says. wide_gemm.cu leaves what it does not take to torch. And what follows the
    product of q, k and v in decode steps: qkv.cu and the kernels of attention ("separate"), or
    decode_attention.cu ("fused"), which leaves what it does not take to those. In other steps
    attention is wide_attention.cu's where the GPU has products of warpgroups and it takes the
    shape, and otherwise, or by choice, that of the kernels for all GPUs."""

    one_row: Literal["stream_gemm", "gemv", "torch"] = "gemv"
    gemv: GemvTuning = DEFAULT_TUNING
    attention: AttentionKernel = "fused"
    decode: DecodeTuning = DEFAULT_DECODE_TUNING
    few_rows: Literal["stream_gemm", "rows_gemm", "torch"] = "rows_gemm"
    rows: RowsTuning = DEFAULT_ROWS
    many_rows: Literal["wide_gemm", "torch"] = "wide_gemm"
    wide: WideTuning = DEFAULT_WIDE
    prompts: Literal["wide_attention", "attention"] = "wide_attention"


MEASURED = KernelChoice()
"""Of those measured on an H200 (benchmarks/notes.md) the fastest."""


@dataclass(frozen=True)
class DeferredNorm:
    """A normed tensor that is not in memory: the products that read it compute it on the way in."""

    x: Operand
    weight: Operand
    eps: float


@dataclass(frozen=True)
class WeighedNorm:
    """A normed tensor that is not in memory: `weighed` is, and the products that read it finish
    the norm."""

    weighed: Operand
    norm: InputNorm


class Lowering:
    """The program of one graph and step shape in the making."""

    def __init__(
        self, graph: Graph, limits: Limits, shape: StepShape, choice: KernelChoice
    ) -> None:
        self.graph = graph
        self.limits = limits
        self.shape = shape
        self.choice = choice
        self.layout = StepLayout.of(shape, limits)
        self.readers = graph.consumers()
        self.parameters = {p.name for p in graph.parameters}
        self.operands: dict[str, Operand] = {}
        self.constants: dict[str, tuple[float, ...]] = {}
        self.deferred: dict[str, DeferredNorm] = {}
        self.weighed: dict[str, WeighedNorm] = {}
        self.streamed = 0  # products by stream_gemm.cu, gemv.cu and rows_gemm.cu so far
        # As Program has them.
        self.sharing: tuple[Call, ...] = ()
        self.group_slot = self.mail_slot = 0
        self._instructions: list[Instruction] = []
        self._buffers: dict[str, int] = {}
        self._sizes = largest_step(limits) | {
            "tokens": shape.tokens,
            "sequences": shape.sequences,
            "rows": shape.sequences,
        }
        for tensor in graph.inputs:
            self.operands[tensor.name] = self._whole(f"step.{tensor.name}", tensor.name)
        for tensor in (*graph.states, *graph.parameters):
            self.operands[tensor.name] = self._whole(tensor.name, tensor.name)

    def finish(self) -> Program:
        """The program of what was emitted."""
        outputs = [self.operands[name].buffer for name in self.graph.outputs]
        arena, nbytes = plan_arena(self._instructions, self._buffers, outputs)
        return Program(
            self.shape,
            self.layout,
            tuple(self._instructions),
            self.operands,
            self.graph.outputs,
            self.constants,
            arena,
            nbytes,
            self.sharing,
            self.group_slot,
            self.mail_slot,
        )

    def operand(self, name: str) -> Operand:
        """The operand of a graph tensor that is computed already."""
        return self.operands[name]

    def new(self, name: str) -> Operand:
        """A buffer of its own for a graph tensor."""
        tensor = self.graph.tensors[name]
        operand = self._whole(f"arena.{name}", name)
        self._buffers[operand.buffer] = buffer_bytes(tensor.shape, tensor.dtype, self._sizes)
        self.operands[name] = operand
        return operand

    def temporary(self, name: str, shape: tuple[Dim, ...], dtype: str) -> Operand:
        """A buffer that is no tensor of the graph."""
        stride = shape[-1] if isinstance(shape[-1], int) else 1
        operand = Operand(f"arena.{name}", shape, dtype, stride)
        self._buffers[operand.buffer] = buffer_bytes(shape, dtype, self._sizes)
        return operand

    def product_kernel(self) -> ProductKernel:
        """What is to compute the products of this program, where it takes their shapes."""
        tokens = self.shape.tokens
        wide = self.choice.wide
        most = wide.gated_rows if self.shape.decode else wide.prompt_rows
        if self.shape.warpgroups and wide.least_rows <= tokens <= most:
            return self.choice.many_rows
        if not self.shape.decode or not self.shape.bulk_copies or tokens > stream.STREAM_ROWS:
            return "torch"
        if tokens == 1:
            return self.choice.one_row
        return self.choice.few_rows

    def optional(self, name: str) -> Operand | None:
        """The operand of an optional input: None where it is absent."""
        return self.operands[name] if name else None

    def emit(self, call: Call, *tensors: str) -> None:
        """Append an instruction; `tensors` are computed once it has run."""
        self._instructions.append(Instruction(call, tensors))

    def emit_beside(self, call: Call, *tensors: str) -> None:
        """Have a program begin with this instruction, unless it has it already, and run it beside
        those that do not need what it writes. It reads the step's arrays alone."""
        instruction = Instruction(call, tensors, beside=True)
        if instruction not in self._instructions:
            self._instructions.insert(0, instruction)

    def largest(self, dim: Dim) -> int:
        """The most that a dimension is in steps of this program."""
        return dim if isinstance(dim, int) else self._sizes[dim]

    def split(self, node: Node) -> None:
        """The outputs of a split node: parts of every row, where they are."""
        x = self.operand(node.inputs[0])
        start = 0
        for name, size in zip(node.outputs, node.attrs["sizes"], strict=True):
            self.operands[name] = x.columns(start, start + size)
            start += size

    def only_reader(self, name: str) -> Node | None:
        """The node that reads a tensor, where there is just one and the graph does not give the
        tensor out."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.graph.outputs else None

    def selects_all(self, node: Node) -> bool:
        """Whether a node selects rows, and in steps of this program every one, in order."""
        wanted = node.op == "select_rows" and node.inputs[1] == "logit_rows"
        return wanted and self.shape.decode

    def cache(self, node: Node) -> Cache:
        """The cache and step tables of an attention node."""
        keys = self.graph.tensors[node.inputs[3]]
        kv_heads = keys.shape[2]
        assert isinstance(kv_heads, int)
        return Cache(
            keys=self.operand(node.inputs[3]),
            values=self.operand(node.inputs[4]),
            query_starts=self.operand(node.inputs[5]),
            kv_lens=self.operand(node.inputs[6]),
            block_table=self.operand(node.inputs[7]),
            kv_heads=kv_heads,
            head_dim=node.attrs["head_dim"],
            block_size=self.limits.block_size,
            table_stride=self.layout.table_stride,
        )

    def _whole(self, buffer: str, name: str) -> Operand:
        tensor = self.graph.tensors[name]
        last = tensor.shape[-1]
        stride = last if isinstance(last, int) else 1
        return Operand(buffer, tensor.shape, tensor.dtype, stride)
