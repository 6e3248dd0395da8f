"""Sampling on the device: the launch, and the parameters that each row needs.

What is drawn, and with which noise, is defined in runtime/sampling.py; sample.cu computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.cuda.program import Program
from llmforge.engine.step import SampleRow
from llmforge.kernels import launch as kernels
from llmforge.kernels.launch import SAMPLE_PARAMS_BYTES, Launch, Operand

PARAMS = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("seed", "u8"),
        ("position", "u8"),
        ("top_k", "i4"),
        ("repetition_penalty", "f4"),
        ("history_start", "i4"),
        ("history_len", "i4"),
    ]
)
assert PARAMS.itemsize == SAMPLE_PARAMS_BYTES
_MASK = (1 << 64) - 1


def sampling_launch(program: Program) -> Launch:
    """The launch that draws a token for each row of the program's logits."""
    logits = program.operands[program.outputs[0]]
    scratch = {name: Operand(f"sample.{name}", (1,), "int32", 1) for name in SCRATCH}
    params = Operand("step.sampling", (1,), "int32", 1)
    return kernels.sample(
        scratch["tokens"], scratch["largest"], logits, params, scratch["history"], scratch["seen"]
    )


SCRATCH = ("tokens", "largest", "history", "seen")


def fill_params(
    target: NDArray[np.void], rows: Sequence[SampleRow], history: NDArray[np.int32]
) -> int:
    """Write the rows' parameters to `target` [rows] and the histories that they need end to end to
    `history`. Returns how many tokens of history that was."""
    target[:] = GREEDY
    used = 0
    for index, row in enumerate(rows):
        params = row.params
        if params.greedy and params.repetition_penalty == 1.0:
            continue
        length = 0
        if params.repetition_penalty != 1.0:
            length = len(row.history)
            history[used : used + length] = row.history
        target[index] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.seed & _MASK,
            row.position,
            params.top_k,
            params.repetition_penalty,
            used,
            length,
        )
        used += length
    return used


# What a row without parameters of its own gets: the largest logit.
GREEDY = np.array((0.0, 1.0, 0.0, 0, 0, 0, 1.0, 0, 0), PARAMS)
