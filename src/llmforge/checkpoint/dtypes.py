"""Changing the dtype of weights, and finding values that are not finite, at memory speed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmforge.safetensors_io import NUMPY_DTYPES, Array

_PART = 1 << 20  # elements converted at a time
_SCAN = 1 << 18  # elements looked at at a time: they stay in the cache for the second look
# Of each float format, the bits of positive infinity: what is not finite is at least that.
_INFINITY = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}


def has_nonfinite(array: Array) -> bool:
    """Whether a contiguous array of floats holds a NaN or an infinity."""
    size = array.dtype.itemsize
    infinity = _INFINITY[array.dtype.name]
    sign = 1 << (8 * size - 1)
    flat = array.reshape(-1)
    # Floats order as their bits do, so two maxima tell: positive values are the largest as signed
    # numbers, negative ones as unsigned.
    signed, unsigned = flat.view(f"i{size}"), flat.view(f"u{size}")
    for start in range(0, flat.size, _SCAN):
        stop = start + _SCAN
        if signed[start:stop].max() >= infinity or unsigned[start:stop].max() >= sign + infinity:
            return True
    return False


def convert_parts(array: Array, dtype: str) -> Iterator[tuple[Array, Array]]:
    """Consecutive flat pieces of a contiguous array, as they are and in `dtype`, rounded to
    nearest even. Without a change of dtype both are the same piece."""
    flat = array.reshape(-1)
    if array.dtype == NUMPY_DTYPES[dtype]:
        for start in range(0, flat.size, _PART):
            part = flat[start : start + _PART]
            yield part, part
        return
    import torch

    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        converted = _as_torch(part).to(getattr(torch, dtype))
        yield part, converted.view(torch.uint8).numpy().view(NUMPY_DTYPES[dtype])


def _as_torch(part: Array):  # type: ignore[no-untyped-def]
    """The same memory as a torch tensor."""
    import torch

    dtype = getattr(torch, part.dtype.name)
    return torch.from_numpy(part.view(np.uint8)).view(dtype)
