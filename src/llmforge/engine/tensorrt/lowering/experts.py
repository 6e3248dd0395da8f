"""Rows of mixtures of experts. TensorRT's own layer for them builds on no GPU that tensorrt_rtx is
for (docs/tensorrt.md): every expert computes every token, and what was not chosen counts zero. That
costs experts / top_k times the arithmetic of the chosen ones; at small batches a step's time is the
reading of the weights."""

from __future__ import annotations

from llmforge.engine.tensorrt.lowering.basic import activated
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
    _, ids = net.top_k(choice, top_k)
    # The chosen experts' scores: [B, S, top_k, experts] has one match a row.
    chosen = net.cast(_matches(g, ids, 0, experts), "float32")
    weights = net.reduce("SUM", net.mul(chosen, net.reshape(scores, (0, 0, 1, experts))), -1)
    weights = net.reshape(weights, (0, 0, top_k))
    if normalize:
        weights = net.div(weights, net.add(net.reduce("SUM", weights, -1), 1e-20))
    return ids, net.mul(weights, scale)


def _softmax(net: Network, x: Value) -> Value:
    powers = net.unary("EXP", net.sub(x, net.reduce("MAX", x, -1)))
    return net.div(powers, net.reduce("SUM", powers, -1))


def _of_kept_groups(
    g: Lowering, choice: Value, groups: int, kept_groups: int, group_top: int
) -> Value:
    """`choice` with the experts of all but the best groups dropped."""
    net, experts = g.net, g.features(choice)
    each = experts // groups
    grouped = net.reshape(choice, (0, 0, groups, each))
    best, _ = net.top_k(grouped, group_top)
    values = net.reshape(net.reduce("SUM", best, -1), (0, 0, groups))
    _, kept = net.top_k(values, kept_groups)
    among = net.cast(_matches(g, kept, 0, groups), "int32")  # [B, S, kept, groups]
    by_group = net.reshape(among, (0, 0, groups, kept_groups), before=(0, 1, 3, 2))
    held = net.elementwise("GREATER", net.reduce("MAX", by_group, -1), 0)
    dropped = g.floats(_DROPPED, (1, 1, 1, 1))
    return net.reshape(net.select(held, grouped, dropped), (0, 0, experts))


def _matches(g: Lowering, ids: Value, first: int, count: int) -> Value:
    """[B, S, k, count] bool: which of the numbers from `first` on each of ids [B, S, k] is."""
    k = g.features(ids)
    numbers = g.integers(*range(first, first + count), shape=(1, 1, 1, count))
    return g.net.elementwise("EQUAL", g.net.reshape(ids, (0, 0, k, 1)), numbers)


@lowers("experts")
def experts(
    g: Lowering,
    x: Value,
    ids: Value,
    weights: Value,
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
    """Products are [B, experts, S, features]."""
    net, hidden = g.net, g.features(x)
    count, k = int(gate_up.shape[0]), g.features(ids)
    matches = net.cast(_matches(g, ids, first, count), "float32")
    shares = net.mul(matches, net.reshape(weights, (0, 0, k, 1)))
    by_token = net.reshape(net.reduce("SUM", shares, 2), (0, 0, count))
    by_expert = net.reshape(by_token, (0, count, -1, 1), before=(0, 2, 1))
    tokens = net.reshape(x, (0, 1, -1, hidden))
    both = _product(g, tokens, gate_up, gate_up_bias)
    middle = _activated(g, both, int(down.shape[2]), activation, alpha, limit)
    outputs = net.cast(_product(g, middle, down, down_bias), "float32")
    total = net.reduce("SUM", net.mul(outputs, by_expert), 1)  # [B, 1, S, hidden]
    return net.cast(net.reshape(total, (0, -1, hidden)), x.dtype)


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
