"""Layers that move elements: shapes, slices, gathers."""

from __future__ import annotations

import torch
from layer_table import Tensor, in_range, layer
from torch.nn import functional as F


@layer("SHAPE")
def _shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


@layer("SHUFFLE")
def _shuffle(
    x: Tensor,
    dims: Tensor | None = None,
    *,
    first: tuple[int, ...],
    reshape: tuple[int, ...] | None,
    second: tuple[int, ...],
    zero_copies: bool,
) -> Tensor:
    x = x.permute(first[: x.ndim])
    wanted = list(reshape) if reshape is not None else None if dims is None else dims.tolist()
    if wanted is not None:
        if zero_copies:
            wanted = [x.shape[d] if size == 0 else size for d, size in enumerate(wanted)]
        x = x.reshape(wanted)
    return x.permute(second[: x.ndim])


@layer("UNSQUEEZE")
def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


@layer("SQUEEZE")
def _squeeze(x: Tensor, axes: Tensor) -> Tensor:
    assert all(x.shape[axis] == 1 for axis in axes.tolist()), "squeezes more than ones"
    return x.squeeze(tuple(axes.tolist()))


@layer("CONCATENATION")
def _concatenation(*parts: Tensor, axis: int) -> Tensor:
    assert len({part.dtype for part in parts}) == 1, "parts of several dtypes"
    return torch.cat(parts, dim=axis)


@layer("SLICE")
def _slice(
    x: Tensor,
    starts: Tensor | None = None,
    sizes: Tensor | None = None,
    strides: Tensor | None = None,
    fill: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    start: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
    stride: tuple[int, ...] | None,
    mode: str,
) -> Tensor:
    assert mode == "STRICT_BOUNDS" and fill is None, f"slices of mode {mode} are not known"

    def chosen(static: tuple[int, ...] | None, dynamic: Tensor | None) -> list[int]:
        return list(static) if static is not None else list(dynamic.tolist())  # type: ignore[union-attr]

    along = range(x.ndim) if axes is None else axes.tolist()
    pieces = zip(
        along, chosen(start, starts), chosen(shape, sizes), chosen(stride, strides), strict=True
    )
    for axis, begin, size, step in pieces:
        places = begin + step * torch.arange(size)
        x = x.index_select(axis, in_range(places, x.shape[axis]))
    return x


@layer("GATHER")
def _gather(
    x: Tensor, indices: Tensor, *, axis: int, mode: str, num_elementwise_dims: int
) -> Tensor:
    lead = num_elementwise_dims
    if mode == "DEFAULT":
        assert lead <= 1
        rows = in_range(indices, x.shape[axis])
        if not lead:
            flat = x.index_select(axis, rows.reshape(-1))
            return flat.unflatten(axis, rows.shape) if rows.ndim != 1 else flat
        each = [_gather_along(a, i, axis - 1) for a, i in zip(x, rows, strict=True)]
        return torch.stack(each)
    if mode == "ELEMENT":
        return x.gather(axis, in_range(indices, x.shape[axis]))
    depth = indices.shape[-1]
    for d in range(depth):
        in_range(indices[..., d], x.shape[lead + d])
    index = indices.long()
    if lead == 0:
        return x[tuple(index.unbind(-1))]
    assert lead == 1
    return torch.stack([a[tuple(i.unbind(-1))] for a, i in zip(x, index, strict=True)])


def _gather_along(x: Tensor, rows: Tensor, axis: int) -> Tensor:
    flat = x.index_select(axis, rows.reshape(-1))
    return flat.unflatten(axis, rows.shape) if rows.ndim else flat.squeeze(axis)


@layer("SCATTER")
def _scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, mode: str) -> Tensor:
    assert x.dtype == updates.dtype
    if mode == "ELEMENT":
        return x.scatter(axis, in_range(indices, x.shape[axis]), updates)
    out = x.clone()
    out[tuple(indices.long().unbind(-1))] = updates
    return out


@layer("FILL")
def _fill(
    dims: Tensor | None = None,
    first: Tensor | None = None,
    steps: Tensor | None = None,
    *,
    dtype: torch.dtype,
    operation: str,
    shape: tuple[int, ...] | None,
    alpha: float | None,
    beta: float | None,
) -> Tensor:
    assert operation == "LINSPACE", operation
    size = list(shape) if shape is not None else list(dims.tolist())  # type: ignore[union-attr]
    origin = torch.tensor(alpha) if first is None else first.reshape(())
    deltas = torch.tensor([beta]) if steps is None else steps.reshape(-1)
    assert len(deltas) == len(size), "one delta a dimension"
    result = torch.full(size, 0, dtype=torch.float64) + origin
    for axis, (count, delta) in enumerate(zip(size, deltas, strict=True)):
        along = torch.arange(count, dtype=torch.float64) * delta
        result += along.view(-1, *(1,) * (len(size) - axis - 1))
    return result.to(dtype)


@layer("ONE_HOT")
def _one_hot(indices: Tensor, values: Tensor, depth: Tensor, *, axis: int) -> Tensor:
    hot = F.one_hot(in_range(indices, int(depth)), int(depth)).bool()
    picked = torch.where(hot, values[1], values[0])
    return picked.movedim(-1, axis) if axis != -1 else picked
