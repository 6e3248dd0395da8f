"""The launch that samples on the device; engine/device_sampling.py has its parameters."""

from __future__ import annotations

from llmforge.engine.cuda.program import Program
from llmforge.kernels import launch as kernels
from llmforge.kernels.launch import Launch, Operand

# The tokens that a step draws, one a row. The next step may take its own from there.
DRAWN = Operand("sample.tokens", (1,), "int32", 1)
_SCRATCH = ("largest", "history", "seen")


def sampling_launch(program: Program) -> Launch:
    """The launch that draws a token for each row of the program's logits."""
    logits = program.operands[program.outputs[0]]
    largest, history, seen = (Operand(f"sample.{n}", (1,), "int32", 1) for n in _SCRATCH)
    params = Operand("step.sampling", (1,), "int32", 1)
    return kernels.sample(DRAWN, largest, logits, params, history, seen)
