"""Layers that compute: element by element, along axes, and products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layer_table import INTEGERS, Tensor, layer, wide
from torch.nn import functional as F

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


@layer("IDENTITY")
def _identity(x: Tensor) -> Tensor:
    return x


@layer("CAST")
def _cast(x: Tensor, *, dtype: torch.dtype, to_type: torch.dtype) -> Tensor:
    assert dtype == to_type, f"declared {dtype}, casts to {to_type}"
    return x.to(to_type)


@layer("UNARY")
def _unary(x: Tensor, *, op: str) -> Tensor:
    assert (x.dtype == torch.bool) == (op == "NOT"), f"{op} of {x.dtype}"
    return UNARY[op](wide(x)).to(x.dtype)


@layer("ACTIVATION")
def _activation(x: Tensor, *, type: str, alpha: float, beta: float) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "RELU": F.relu,
        "SIGMOID": torch.sigmoid,
        "TANH": torch.tanh,
        "GELU_ERF": F.gelu,
        "GELU_TANH": lambda t: F.gelu(t, approximate="tanh"),
        "CLIP": lambda t: t.clamp(alpha, beta),
    }
    return functions[type](wide(x)).to(x.dtype)


@layer("ELEMENTWISE")
def _elementwise(x: Tensor, y: Tensor, *, op: str) -> Tensor:
    assert x.dtype == y.dtype, f"{op} of {x.dtype} and {y.dtype}"
    assert x.ndim == y.ndim, f"{op} of ranks {x.ndim} and {y.ndim}"
    if op in ("DIV", "FLOOR_DIV"):
        whole = x.dtype in INTEGERS
        rounding = "floor" if op == "FLOOR_DIV" else "trunc" if whole else None
        return torch.div(wide(x), wide(y), rounding_mode=rounding).to(x.dtype)
    result = BINARY[op](wide(x), wide(y))
    return result if result.dtype == torch.bool else result.to(x.dtype)


@layer("SELECT")
def _select(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    assert condition.dtype == torch.bool and x.dtype == y.dtype
    assert condition.ndim == x.ndim == y.ndim
    return torch.where(condition, x, y)


@layer("REDUCE")
def _reduce(x: Tensor, *, axes: tuple[int, ...], op: str, keep_dims: bool) -> Tensor:
    values = wide(x)
    if op in ("MAX", "MIN"):
        result = (torch.amax if op == "MAX" else torch.amin)(values, axes, keep_dims)
    elif op == "AVG":
        result = values.mean(axes, keep_dims)
    else:
        assert op == "SUM", op
        result = values.sum(axes, keep_dims)
    return result.to(x.dtype)


@layer("SOFTMAX")
def _softmax(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    (axis,) = axes
    return wide(x).softmax(axis).to(x.dtype)


@layer("TOPK")
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


@layer("CUMULATIVE")
def _cumulative(x: Tensor, axis: Tensor, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    assert op == "SUM", op
    along = int(axis)
    turned = x.flip(along) if reverse else x
    total = turned.cumsum(along).to(x.dtype)
    total = total - turned if exclusive else total
    return total.flip(along) if reverse else total


@layer("NORMALIZATION")
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
    values = wide(x)
    centred = values - values.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    if scale is not None:
        normed = normed * wide(scale)
    if bias is not None:
        normed = normed + wide(bias)
    return normed.to(x.dtype)


@layer("MATRIX_MULTIPLY")
def _matmul(x: Tensor, y: Tensor, *, op0: str, op1: str) -> Tensor:
    assert x.dtype == y.dtype, f"a product of {x.dtype} and {y.dtype}"
    assert "VECTOR" not in (op0, op1), "vector products are not known"
    assert x.ndim == y.ndim, f"a product of ranks {x.ndim} and {y.ndim}"
    left = x.mT if op0 == "TRANSPOSE" else x
    right = y.mT if op1 == "TRANSPOSE" else y
    return torch.matmul(wide(left), wide(right)).to(x.dtype)


@layer("EINSUM")
def _einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *map(wide, operands)).to(operands[0].dtype)
