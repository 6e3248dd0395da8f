"""Launches of staging.cu: a step's arrays from the host's memory, and back what it drew."""

from __future__ import annotations

from llmforge.kernels.launch import Launch, Operand, Size, require, specialised

_PACK_BYTES = 16
_THREADS = 512


def fetch(out: Operand, areas: tuple[Operand, Operand], turn: Operand, nbytes: int) -> Launch:
    """The first bytes of the host's area whose turn it is, to `out`; then it is the other's."""
    require(nbytes % _PACK_BYTES == 0, f"fetch: multiples of {_PACK_BYTES} bytes")
    spec = specialised("staging.cu", "fetch", "float32", THREADS=_THREADS)
    arguments = (out, *areas, turn, nbytes // _PACK_BYTES)
    return Launch(spec, arguments, (1, 1, 1), _THREADS)


def deliver(areas: tuple[Operand, Operand], drawn: Operand, turn: Operand, most: int) -> Launch:
    """What the rows of a step drew, to the area of the step that was fetched last. `drawn` and the
    areas: int32 [2 most], tokens and then largest logits."""
    spec = specialised("staging.cu", "deliver", "float32", THREADS=_THREADS)
    arguments = (*areas, drawn, turn, Size("rows"), most)
    return Launch(spec, arguments, (1, 1, 1), _THREADS)
