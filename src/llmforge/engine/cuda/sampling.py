"""The launch that samples on the device; engine/device_sampling.py has its parameters."""

from __future__ import annotations

from llmforge.engine.cuda.program import Program
from llmforge.kernels import launch as kernels
from llmforge.kernels.launch import Launch, Operand


def sampling_launch(program: Program) -> Launch:
    """The launch that draws a token for each row of the program's logits."""
    logits = program.operands[program.outputs[0]]
    scratch = {name: Operand(f"sample.{name}", (1,), "int32", 1) for name in SCRATCH}
    params = Operand("step.sampling", (1,), "int32", 1)
    return kernels.sample(
        scratch["tokens"], scratch["largest"], logits, params, scratch["history"], scratch["seen"]
    )


SCRATCH = ("tokens", "largest", "history", "seen")
