"""What a program leaves to other libraries, bound to memory: each is a function of a stream."""

from __future__ import annotations

import torch

from llmforge.engine.cuda.buffers import Memory
from llmforge.engine.cuda.program import HeadMatmul, Matmul, Program, Transfer
from llmforge.engine.cuda.ranks import Ranks
from llmforge.kernels.collectives import PARTS
from llmforge.kernels.driver import Sizes


class BoundMatmul:
    """A product by torch (cuBLASLt), on views of the buffers."""

    def __init__(self, call: Matmul, memory: Memory, program: Program, sizes: Sizes) -> None:
        rows = program.shape.tokens if call.x.shape[0] == "tokens" else program.shape.sequences
        self._rows = str(call.x.shape[0])
        self._sizes = sizes
        self._x = memory.view(program, call.x, rows)
        self._out = memory.view(program, call.out, rows)
        self._weight = memory.view(program, call.weight).t()
        self._bias = memory.view(program, call.bias) if call.bias else None

    def __call__(self, stream: int) -> None:
        rows = self._sizes.get(self._rows)
        if not rows:
            return
        x, out = self._x[:rows], self._out[:rows]
        if self._bias is None:
            torch.mm(x, self._weight, out=out)
        else:
            torch.addmm(self._bias, x, self._weight, out=out)


class BoundHeadMatmul:
    """A product of each head by torch (cuBLAS), on views of the buffers."""

    def __init__(self, call: HeadMatmul, memory: Memory, program: Program, sizes: Sizes) -> None:
        rows, self._sizes = program.shape.tokens, sizes
        weight = memory.view(program, call.weight)
        heads = len(weight)
        self._weight = weight.transpose(1, 2)
        self._x, self._out = (
            memory.view(program, operand, rows).unflatten(-1, (heads, -1)).transpose(0, 1)
            for operand in (call.x, call.out)
        )

    def __call__(self, stream: int) -> None:
        rows = self._sizes.get("tokens")
        torch.bmm(self._x[:, :rows], self._weight, out=self._out[:, :rows])


class BoundTransfer:
    """NCCL's part of an exchange, on views of the buffers."""

    def __init__(
        self, call: Transfer, memory: Memory, program: Program, sizes: Sizes, ranks: Ranks
    ) -> None:
        self._rows = str(call.operand.shape[0])
        most = program.shape.tokens if self._rows == "tokens" else program.shape.sequences
        self._call, self._sizes, self._ranks = call, sizes, ranks
        self._operand = memory.view(program, call.operand, most)
        self._parts = memory.tensors[PARTS]

    def __call__(self, stream: int) -> None:
        if rows := self._sizes.get(self._rows):
            self._ranks.transfer(self._call, self._operand[:rows], self._parts)
