"""What each kind of TensorRT layer computes, in torch, by the documentation of its API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from network_reader import Step
from torch.nn import functional as F

Tensor = torch.Tensor
Result = Tensor | tuple[Tensor, ...]
LAYERS: dict[str, Callable[..., Result]] = {}
INTEGERS = (torch.int32, torch.int64)


def evaluate(step: Step, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs of a layer. AssertionError where TensorRT would refuse or misread the inputs."""
    if step.kind in ("FILL", "UNSQUEEZE", "SQUEEZE", "CAST"):
        result = LAYERS[step.kind](*inputs, dtype=step.outputs[0].dtype, **step.attrs)
    else:
        result = LAYERS[step.kind](*inputs, **step.attrs)
    return result if isinstance(result, tuple) else (result,)


def _layer(kind: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        LAYERS[kind] = function
        return function

    return register


def _wide(x: Tensor) -> Tensor:
    """x as it is computed with: two-byte numbers in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _in_range(indices: Tensor, size: int) -> Tensor:
    """TensorRT reads foreign memory, or clamps, where an index is out of range."""
    assert indices.dtype in INTEGERS, f"indices are {indices.dtype}"
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        assert low >= 0 and high < size, f"indices {low}..{high} of {size} rows"
    return indices.long()


# -- element by element ----------------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal,
    "ABS": torch.abs, "NEG": torch.neg, "SIN": torch.sin, "COS": torch.cos, "ERF": torch.erf,
    "NOT": torch.logical_not, "FLOOR": torch.floor, "CEIL": torch.ceil, "TANH": torch.tanh,
}  # fmt: skip

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum,
    "SUB": torch.sub, "POW": torch.pow, "AND": torch.logical_and, "OR": torch.logical_or,
    "XOR": torch.logical_xor, "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
}  # fmt: skip


@_layer("IDENTITY")
def _identity(x: Tensor) -> Tensor:
    return x


@_layer("CAST")
def _cast(x: Tensor, *, dtype: torch.dtype, to_type: torch.dtype) -> Tensor:
    assert dtype == to_type, f"declared {dtype}, casts to {to_type}"
    return x.to(to_type)


@_layer("UNARY")
def _unary(x: Tensor, *, op: str) -> Tensor:
    assert (x.dtype == torch.bool) == (op == "NOT"), f"{op} of {x.dtype}"
    return UNARY[op](_wide(x)).to(x.dtype)


@_layer("ACTIVATION")
def _activation(x: Tensor, *, type: str, alpha: float, beta: float) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "RELU": F.relu,
        "SIGMOID": torch.sigmoid,
        "TANH": torch.tanh,
        "GELU_ERF": F.gelu,
        "GELU_TANH": lambda t: F.gelu(t, approximate="tanh"),
        "CLIP": lambda t: t.clamp(alpha, beta),
    }
    return functions[type](_wide(x)).to(x.dtype)


@_layer("ELEMENTWISE")
def _elementwise(x: Tensor, y: Tensor, *, op: str) -> Tensor:
    assert x.dtype == y.dtype, f"{op} of {x.dtype} and {y.dtype}"
    assert x.ndim == y.ndim, f"{op} of ranks {x.ndim} and {y.ndim}"
    if op in ("DIV", "FLOOR_DIV"):
        whole = x.dtype in INTEGERS
        rounding = "floor" if op == "FLOOR_DIV" else "trunc" if whole else None
        return torch.div(_wide(x), _wide(y), rounding_mode=rounding).to(x.dtype)
    result = BINARY[op](_wide(x), _wide(y))
    return result if result.dtype == torch.bool else result.to(x.dtype)


@_layer("SELECT")
def _select(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    assert condition.dtype == torch.bool and x.dtype == y.dtype
    assert condition.ndim == x.ndim == y.ndim
    return torch.where(condition, x, y)


# -- shapes and places -----------------------------------------------------------------------------


@_layer("SHAPE")
def _shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


@_layer("SHUFFLE")
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


@_layer("UNSQUEEZE")
def _unsqueeze(x: Tensor, axes: Tensor, *, dtype: torch.dtype) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


@_layer("SQUEEZE")
def _squeeze(x: Tensor, axes: Tensor, *, dtype: torch.dtype) -> Tensor:
    assert all(x.shape[axis] == 1 for axis in axes.tolist()), "squeezes more than ones"
    return x.squeeze(tuple(axes.tolist()))


@_layer("CONCATENATION")
def _concatenation(*parts: Tensor, axis: int) -> Tensor:
    assert len({part.dtype for part in parts}) == 1, "parts of several dtypes"
    return torch.cat(parts, dim=axis)


@_layer("SLICE")
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
        x = x.index_select(axis, _in_range(places, x.shape[axis]))
    return x


@_layer("GATHER")
def _gather(
    x: Tensor, indices: Tensor, *, axis: int, mode: str, num_elementwise_dims: int
) -> Tensor:
    lead = num_elementwise_dims
    if mode == "DEFAULT":
        assert lead <= 1
        rows = _in_range(indices, x.shape[axis])
        if not lead:
            flat = x.index_select(axis, rows.reshape(-1))
            return flat.unflatten(axis, rows.shape) if rows.ndim != 1 else flat
        each = [_gather_along(a, i, axis - 1) for a, i in zip(x, rows, strict=True)]
        return torch.stack(each)
    if mode == "ELEMENT":
        return x.gather(axis, _in_range(indices, x.shape[axis]))
    depth = indices.shape[-1]
    for d in range(depth):
        _in_range(indices[..., d], x.shape[lead + d])
    index = indices.long()
    if lead == 0:
        return x[tuple(index.unbind(-1))]
    assert lead == 1
    return torch.stack([a[tuple(i.unbind(-1))] for a, i in zip(x, index, strict=True)])


def _gather_along(x: Tensor, rows: Tensor, axis: int) -> Tensor:
    flat = x.index_select(axis, rows.reshape(-1))
    return flat.unflatten(axis, rows.shape) if rows.ndim else flat.squeeze(axis)


@_layer("SCATTER")
def _scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, mode: str) -> Tensor:
    assert x.dtype == updates.dtype
    if mode == "ELEMENT":
        return x.scatter(axis, _in_range(indices, x.shape[axis]), updates)
    out = x.clone()
    out[tuple(indices.long().unbind(-1))] = updates
    return out


@_layer("FILL")
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


@_layer("ONE_HOT")
def _one_hot(indices: Tensor, values: Tensor, depth: Tensor, *, axis: int) -> Tensor:
    hot = F.one_hot(_in_range(indices, int(depth)), int(depth)).bool()
    picked = torch.where(hot, values[1], values[0])
    return picked.movedim(-1, axis) if axis != -1 else picked


# -- reductions ------------------------------------------------------------------------------------


@_layer("REDUCE")
def _reduce(x: Tensor, *, axes: tuple[int, ...], op: str, keep_dims: bool) -> Tensor:
    wide = _wide(x)
    if op in ("MAX", "MIN"):
        result = (torch.amax if op == "MAX" else torch.amin)(wide, axes, keep_dims)
    elif op == "AVG":
        result = wide.mean(axes, keep_dims)
    else:
        assert op == "SUM", op
        result = wide.sum(axes, keep_dims)
    return result.to(x.dtype)


@_layer("SOFTMAX")
def _softmax(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    (axis,) = axes
    return _wide(x).softmax(axis).to(x.dtype)


@_layer("TOPK")
def _topk(
    x: Tensor, count: Tensor | None = None, *, axes: tuple[int, ...], op: str, k: int
) -> tuple[Tensor, ...]:
    (axis,) = axes
    wanted = k if count is None else int(count)
    assert wanted <= 3840, "TensorRT's TopK takes k up to 3840"
    order = x.sort(dim=axis, descending=op == "MAX", stable=True)
    places = torch.arange(wanted)
    return (
        order.values.index_select(axis, places),
        order.indices.index_select(axis, places).to(torch.int32),
    )


@_layer("CUMULATIVE")
def _cumulative(x: Tensor, axis: Tensor, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    assert op == "SUM", op
    along = int(axis)
    turned = x.flip(along) if reverse else x
    total = turned.cumsum(along).to(x.dtype)
    total = total - turned if exclusive else total
    return total.flip(along) if reverse else total


@_layer("NORMALIZATION")
def _normalization(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    num_groups: int,
) -> Tensor:
    assert num_groups == 1, "group norms are not known"
    for given in (scale, bias):
        assert given is None or (given.dtype == x.dtype and given.ndim == x.ndim)
    wide = _wide(x)
    centred = wide - wide.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    if scale is not None:
        normed = normed * _wide(scale)
    if bias is not None:
        normed = normed + _wide(bias)
    return normed.to(x.dtype)


# -- products --------------------------------------------------------------------------------------


@_layer("MATRIX_MULTIPLY")
def _matmul(x: Tensor, y: Tensor, *, op0: str, op1: str) -> Tensor:
    assert x.dtype == y.dtype, f"a product of {x.dtype} and {y.dtype}"
    assert "VECTOR" not in (op0, op1), "vector products are not known"
    assert x.ndim == y.ndim, f"a product of ranks {x.ndim} and {y.ndim}"
    left = x.mT if op0 == "TRANSPOSE" else x
    right = y.mT if op1 == "TRANSPOSE" else y
    return torch.matmul(_wide(left), _wide(right)).to(x.dtype)


@_layer("EINSUM")
def _einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *map(_wide, operands)).to(operands[0].dtype)


# -- attention and its cache -----------------------------------------------------------------------


@_layer("ROTARY_EMBEDDING")
def _rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool,
    rotary_embedding_dim: int,
) -> Tensor:
    assert x.ndim == 4, "heads stand before tokens: [B, H, S, D]"
    assert x.dtype == cos.dtype == sin.dtype, f"tables of {cos.dtype} for {x.dtype}"
    dim = rotary_embedding_dim or x.shape[-1]
    if positions is not None:
        assert cos.ndim == 2, "tables by position are [positions, dim / 2]"
        rows = _in_range(positions, cos.shape[0])
        cos, sin = cos[rows], sin[rows]
    assert cos.shape == (x.shape[0], x.shape[2], dim // 2), f"tables {tuple(cos.shape)}"
    cos, sin = _wide(cos)[:, None], _wide(sin)[:, None]
    turning, rest = _wide(x).split((dim, x.shape[-1] - dim), dim=-1)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined, rest), dim=-1).to(x.dtype)


@_layer("KV_CACHE_UPDATE")
def _kv_cache_update(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor,
    update_lengths: Tensor | None = None,
    *,
    cache_mode: str,
    update_form: str,
) -> Tensor:
    """In place: the output is the cache's own memory. Writes beyond the cache are ignored."""
    assert cache_mode == "LINEAR" and update_form == "PADDED_BHND" and update_lengths is None
    assert cache.dtype == update.dtype and write_indices.dtype in INTEGERS
    assert cache.shape[:2] == update.shape[:2] and cache.shape[3] == update.shape[3]
    assert len(write_indices) == len(cache)
    capacity = cache.shape[2]
    for row, start in enumerate(write_indices.tolist()):
        count = min(update.shape[2], capacity - start)
        if count > 0 and start >= 0:
            cache[row, :, start : start + count] = update[row, :, :count]
    return cache


@_layer("ATTENTION_INPUT")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    quantize_scale: Tensor | None = None,
    query_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    *,
    causal: str,
    norm: str,
    num_ranks: int,
    forms: tuple[str, str],
) -> Tensor:
    """softmax(q kᵀ + mask) v, with no scale. What is masked has the weight 0, which makes NaN of
    a NaN in memory that nobody has written."""
    assert norm == "SOFTMAX" and num_ranks == 1 and forms == ("PADDED_BHND", "PADDED_BHND")
    assert quantize_scale is None and query_lengths is None
    assert q.dtype == k.dtype == v.dtype, "attention of several dtypes"
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[0] == k.shape[0]
    batch, heads, new, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    keys, values = (_wide(t).repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.matmul(_wide(q), keys.mT)
    if mask is not None:
        assert causal == "NONE", "a mask beside a causal kind is dropped"
        assert mask.ndim == 4 and mask.dtype in (torch.bool, q.dtype), mask.dtype
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + _wide(mask)
    columns = torch.arange(length)
    ends = torch.full((batch,), length) if kv_lengths is None else kv_lengths.long()
    scores = scores.masked_fill(columns >= ends[:, None, None, None], -torch.inf)
    if causal != "NONE":
        rows = torch.arange(new)[:, None]
        offset = ends - new if causal == "LOWER_RIGHT" else torch.zeros_like(ends)
        scores = scores.masked_fill(columns > rows + offset[:, None, None, None], -torch.inf)
    return torch.matmul(scores.softmax(-1), values).to(q.dtype)


@_layer("ATTENTION_OUTPUT")
def _attention_output(x: Tensor) -> Tensor:
    return x
