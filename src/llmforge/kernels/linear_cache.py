"""The launch that writes a step's keys and values into linear caches."""

from __future__ import annotations

from llmforge.kernels.launch import DTYPE_BYTES, Launch, Operand, Size, require, specialised

_THREADS = 256
_PER_THREAD = 4  # packs


def cache_write(
    table: Operand,
    past_lens: Operand,
    *,
    caches: int,
    heads: int,
    size: int,
    capacity: int,
    dtype: str,
    first_row: Size,
    tokens: Size,
) -> Launch:
    """Write what `table` [2 x caches] names, pairs of addresses (a cache, and what goes into it);
    see cache_write.cu. `tokens`: the new ones of a row."""
    require(past_lens.dtype == "int32", "cache_write: past_lens")
    width = 16 // DTYPE_BYTES[dtype]
    if size % width:
        width = 1
    spec = specialised(
        "cache_write.cu", "cache_write", dtype,
        HEADS=heads, SIZE=size, CAPACITY=capacity, WIDTH=width, THREADS=_THREADS,
    )  # fmt: skip
    blocks = Size(tokens.name, heads * size // width, _THREADS * _PER_THREAD)
    arguments = (table, past_lens, first_row, tokens)
    return Launch(spec, arguments, (blocks, Size(str(past_lens.shape[0])), caches), _THREADS)
