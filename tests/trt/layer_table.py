"""The table of what each kind of TensorRT layer computes, and what its rows need."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
Result = Tensor | tuple[Tensor, ...]
LAYERS: dict[str, Callable[..., Result]] = {}
INTEGERS = (torch.int32, torch.int64)


def layer(kind: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Registers what a kind of layer computes: a function (inputs..., *, attributes...)."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        LAYERS[kind] = function
        return function

    return register


def wide(x: Tensor) -> Tensor:
    """x as it is computed with: two-byte numbers in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_range(indices: Tensor, size: int) -> Tensor:
    """TensorRT reads foreign memory, or clamps, where an index is out of range."""
    assert indices.dtype in INTEGERS, f"indices are {indices.dtype}"
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        assert low >= 0 and high < size, f"indices {low}..{high} of {size} rows"
    return indices.long()
