"""Changing the dtype of weights, and finding values that are not finite, at memory speed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmforge.safetensors_io import Array

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


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within this, torch, where it is installed, computes in the calling thread alone. Pieces that
    fit the cache are converted faster than threads meet, above all when other threads keep the
    cores busy."""
    torch = _torch()
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convert_into(values: Array, out: Array) -> None:
    """Copy floats into `out` of the same size and another dtype, rounded to nearest even. Both
    are flat and contiguous. torch does it several times faster than numpy."""
    torch = _torch()
    if torch is None:
        with np.errstate(over="ignore"):  # too large a number becomes infinite, as in torch
            np.copyto(out, values, casting="unsafe")
        return
    as_torch = [
        torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
        for array in (out, values)
    ]
    as_torch[0].copy_(as_torch[1])


@functools.cache
def _torch() -> Any:
    """The module, or None where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch
