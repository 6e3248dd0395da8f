"""The launches around a step's program: the step's arrays come from the host, tokens are drawn
(engine/device_sampling.py has the parameters), and they go back to the host."""

from __future__ import annotations

from llmforge.engine.cuda.program import Program
from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.sampling import SampleScratch, sample
from llmforge.kernels.staging import deliver, fetch

# The tokens that a step draws, one a row. The next step may take its own from there.
DRAWN = Operand("sample.tokens", ("rows",), "int32", 1)
_TURN = Operand("staging.turn", (1,), "int32", 1)


def fetch_launch(program: Program) -> Launch:
    """The launch that brings the step's arrays."""
    step = Operand("step", (1,), "int32", 1)
    return fetch(step, _areas("arrays"), _TURN, program.layout.nbytes)


def sampling_launch(program: Program) -> Launch:
    """The launch that draws a token for each row of the program's logits."""
    logits = program.operands[program.outputs[0]]
    largest, history, seen, bests, arrived = (
        Operand(f"sample.{name}", (1,), "int32", 1)
        for name in ("largest", "history", "seen", "bests", "arrived")
    )
    params = Operand("step.sampling", (1,), "int32", 1)
    scratch = SampleScratch(seen, bests, arrived)
    step = Operand("step.token_ids", (1,), "int32", 1), Operand("step.logit_rows", (1,), "int32", 1)
    return sample(DRAWN, largest, logits, params, history, scratch, step)


def deliver_launch(max_batch_size: int) -> Launch:
    """The launch that takes what was drawn to the host."""
    return deliver(_areas("drawn"), DRAWN, _TURN, max_batch_size)


def _areas(name: str) -> tuple[Operand, Operand]:
    first, second = (Operand(f"staging.{name}.{turn}", (1,), "int32", 1) for turn in (0, 1))
    return first, second
