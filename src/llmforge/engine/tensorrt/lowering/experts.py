"""Rows of mixtures of experts. TensorRT's own layer for them builds on no GPU that tensorrt_rtx is
for (docs/tensorrt.md): every expert computes every token, and what was not chosen counts zero. That
costs experts / top_k times the arithmetic of the chosen ones; at small batches a step's time is the
reading of the weights.

TensorRT 8.6 crashes on a router with TopK: of nine families it compiled one (SIGSEGV, behind
"tensor.cpp: DCHECK(designated_stride_order.size() == …)"). Experts are chosen there by comparing
each score with each, which gives the same ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmforge.engine.tensorrt.lowering.basic import activated, run
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.lowering.table import lowers
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.model.graph import Tensor

_DROPPED = -1e30  # of a group of experts that is not kept: below all scores


@lowers("route")
def route(
    g: Lowering,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    *,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Value, Value]:
    """Ids and weights of the chosen are lowered as one: how much each expert counts for each
    token, [B, S, experts] in float32, 0 for those that are not chosen."""
    net, experts = g.net, int(weight.shape[0])
    matrix = g.vector(weight, (1, *map(int, weight.shape)), "float32")
    logits = net.matmul(net.cast(x, "float32"), matrix, transpose=True)
    if bias is not None:
        logits = net.add(logits, g.vector(bias, (1, 1, experts), "float32"))
    scores = _softmax(net, logits) if score == "softmax" else net.activation("SIGMOID", logits)
    choice = scores
    if correction is not None:
        choice = net.add(scores, g.vector(correction, (1, 1, experts), "float32"))
    if groups > 1:
        choice = _of_kept_groups(g, choice, groups, kept_groups, group_top)
    shares = net.mul(scores, _largest(g, choice, top_k))
    if normalize:
        shares = net.div(shares, net.add(net.reduce("SUM", shares, -1), 1e-20))
    if scale != 1:
        shares = net.mul(shares, scale)
    return shares, shares


def _softmax(net: Network, x: Value) -> Value:
    powers = net.unary("EXP", net.sub(x, net.reduce("MAX", x, -1)))
    return net.div(powers, net.reduce("SUM", powers, -1))


def _of_kept_groups(
    g: Lowering, choice: Value, groups: int, kept_groups: int, group_top: int
) -> Value:
    """`choice` with the experts of all but the best groups dropped."""
    net, experts = g.net, g.features(choice)
    grouped = net.reshape(choice, (0, 0, groups, experts // groups))
    best = net.mul(grouped, _largest(g, grouped, group_top))
    values = net.reshape(net.reduce("SUM", best, -1), (0, 0, groups))
    kept = net.reshape(_largest(g, values, kept_groups), (0, 0, groups, 1))
    held = net.elementwise("GREATER", kept, 0.5)
    dropped = g.floats(_DROPPED, (1, 1, 1, 1))
    return net.reshape(net.select(held, grouped, dropped), (0, 0, experts))


def _largest(g: Lowering, x: Value, count: int) -> Value:
    """1 for the `count` largest along the last axis of x, 0 for the others, in float32; of equal
    ones the first."""
    if not g.net.package.features.top_k:
        return _largest_by_rank(g, x, count)
    net, size, outer = g.net, g.features(x), [0] * (x.rank - 1)
    _, ids = net.top_k(x, count)
    numbers = g.integers(*range(size), shape=(*[1] * x.rank, size))
    matches = net.elementwise("EQUAL", net.reshape(ids, (*outer, count, 1)), numbers)
    chosen = net.reduce("MAX", net.cast(matches, "float32"), -2)
    return net.reshape(chosen, (*outer, size))


def _largest_by_rank(g: Lowering, x: Value, count: int) -> Value:
    """`_largest` by comparing each with each."""
    net, size, outer = g.net, g.features(x), [0] * (x.rank - 1)
    mine, other = net.reshape(x, (*outer, size, 1)), net.reshape(x, (*outer, 1, size))
    before = g.floats(np.tri(size, k=-1), (*[1] * (x.rank - 1), size, size))
    greater = net.cast(net.elementwise("GREATER", other, mine), "float32")
    equal = net.cast(net.elementwise("EQUAL", other, mine), "float32")
    better = net.reduce("SUM", net.add(greater, net.mul(equal, before)), -1)
    chosen = net.elementwise("LESS", net.reshape(better, (*outer, size)), float(count))
    return net.cast(chosen, "float32")


@lowers("experts")
def experts(
    g: Lowering,
    x: Value,
    _: Value,
    shares: Value,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    first: int,
    activation: str,
    alpha: float,
    limit: float | None,
) -> Value:
    """shares: from `route`, of all experts; those held here are `first` on. Where weights are
    mapped, products are [B, experts, S, features]. TensorRT 8.6 copies them anyway and has the
    experts side by side, as two products of [B, S, experts x features]."""
    net, hidden, count = g.net, g.features(x), int(gate_up.shape[0])
    held = run(g, shares, first, count)

    def middle_of(both: Value) -> Value:
        return _activated(g, both, int(down.shape[2]), activation, alpha, limit)

    if not net.package.features.strongly_typed:
        return _side_by_side(g, x, held, middle_of, gate_up, down, gate_up_bias, down_bias)
    by_expert = net.reshape(held, (0, count, -1, 1), before=(0, 2, 1))
    tokens = net.reshape(x, (0, 1, -1, hidden))
    middle = middle_of(_product(g, tokens, gate_up, gate_up_bias))
    outputs = net.cast(_product(g, middle, down, down_bias), "float32")
    total = net.reduce("SUM", net.mul(outputs, by_expert), 1)  # [B, 1, S, hidden]
    return net.cast(net.reshape(total, (0, -1, hidden)), x.dtype)


def _side_by_side(
    g: Lowering,
    x: Value,
    held: Value,
    middle_of: Callable[[Value], Value],
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Value:
    """The second product sums over the experts: what it reads has been weighed."""
    net, (count, hidden, size) = g.net, map(int, down.shape)
    rows = count * 2 * size
    both = net.matmul(x, g.vector(gate_up, (1, rows, hidden)), transpose=True)
    if gate_up_bias is not None:
        both = net.add(both, g.vector(gate_up_bias, (1, 1, rows)))
    middle = net.cast(middle_of(net.reshape(both, (0, 0, count, 2 * size))), "float32")
    weighed = net.cast(net.mul(middle, net.reshape(held, (0, 0, count, 1))), x.dtype)
    columns = g.vector(down, (1, hidden, count * size), order=(1, 0, 2))
    total = net.matmul(net.reshape(weighed, (0, 0, count * size)), columns, transpose=True)
    if down_bias is None:
        return total
    bias = net.matmul(held, g.vector(down_bias, (1, count, hidden), "float32"))
    return net.add(total, net.cast(bias, x.dtype))


def _product(g: Lowering, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
    net, count, rows = g.net, int(weight.shape[0]), int(weight.shape[1])
    product = net.matmul(x, g.weight(weight), transpose=True)
    return product if bias is None else net.add(product, g.vector(bias, (1, count, 1, rows)))


def _activated(
    g: Lowering, both: Value, size: int, activation: str, alpha: float, limit: float | None
) -> Value:
    net = g.net
    gate, up = (
        net.gather(both, g.integers(*range(start, start + size)), axis=-1) for start in (0, size)
    )
    if limit is None:
        return net.mul(activated(net, gate, activation), up)
    gate = net.elementwise("MIN", gate, limit)
    up = net.elementwise("MIN", net.elementwise("MAX", up, -limit), limit)
    wide = net.cast(gate, "float32")
    swish = net.mul(wide, net.activation("SIGMOID", net.mul(wide, alpha)))
    return net.mul(net.cast(swish, both.dtype), net.add(up, 1.0))
