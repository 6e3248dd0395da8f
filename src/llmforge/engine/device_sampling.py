"""What sample.cu needs to draw each row's token, as targets that sample on their device pass it.

What is drawn, and with which noise, is defined in runtime/sampling.py; sample.cu computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.step import Float32, Limits, SampleRow
from llmforge.errors import RequestError
from llmforge.kernels.sampling import SAMPLE_PARAMS_BYTES

PARAMS = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("seed", "u8"),
        ("position", "u8"),
        ("top_k", "i4"),
        ("repetition_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("history_start", "i4"),
        ("history_len", "i4"),
        ("generated", "i4"),
        ("ahead", "i4"),
    ]
)
assert PARAMS.itemsize == SAMPLE_PARAMS_BYTES
_MASK = (1 << 64) - 1


def history_ints(limits: Limits) -> int:
    """The most that a step's rows need of their sequences: see `fill_params`. All their tokens are
    in the cache behind the step."""
    cached = limits.num_blocks * limits.block_size
    return 3 * min(limits.max_batch_size * limits.max_seq_len, cached)


def fill_params(
    target: NDArray[np.void], rows: Sequence[SampleRow], history: NDArray[np.int32]
) -> int:
    """Write the rows' parameters to `target` [rows] and what they need of their sequences end to
    end to `history` (`history_ints` long): for each row the tokens that the repetition penalty is
    for, then those of `SampleRow.generated`, and how often each was. Returns how much of `history`
    that was."""
    target[:] = GREEDY
    used = 0
    for index, row in enumerate(rows):
        params = row.params
        if params.greedy and not params.penalises:
            continue
        nothing = row.history[:0]
        seen = row.known if params.repetition_penalty != 1.0 else nothing
        tokens, counts = row.generated() if params.deducts else (nothing, nothing)
        start = used
        for part in (seen, tokens, counts):
            history[used : used + len(part)] = part
            used += len(part)
        target[index] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.seed & _MASK,
            row.position,
            params.top_k,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            start,
            len(seen),
            len(tokens),
            params.penalises and row.ahead,
        )
    return used


# What a row without parameters of its own gets: the largest logit.
GREEDY = np.array((0.0, 1.0, 0.0, 0, 0, 0, 1.0, 0.0, 0.0, 0, 0, 0, 0), PARAMS)


def check_drawn(largest: Float32, rows: Sequence[SampleRow]) -> None:
    """Raises RequestError where a row's largest logit is not finite: nothing can be drawn."""
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise RequestError(
            f"the largest logit of the token at position {rows[row].position} is "
            f"{largest[row]}, so no token can be drawn; the weights or the engine's precision "
            "are unfit (look for NaN weights with: llmforge verify; build with a wider dtype)"
        )
