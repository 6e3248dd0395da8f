"""Rows of what works on each token by itself. Values are [B, S, features]; behind select_rows they
are [1, R, features]. Norms, activations and scales compute in float32 and round once, as
model/reference.py does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmforge.engine.tensorrt.io import LOGIT_ROWS
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.lowering.table import lowers
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.model.graph import Tensor


@lowers("embed")
def embed(g: Lowering, ids: Value, weight: Tensor, *, start: int) -> Value:
    """Tokens that another rank holds read a row of this rank, times zero."""
    net, rows = g.net, int(weight.shape[0])
    assert g.node is not None
    shared = any(n.op == "all_reduce" for n in g.graph.consumers()[g.node.outputs[0]])
    table = g.weight(weight)
    if not shared:
        if g.node.inputs[0] == "positions" and rows < g.capacity:
            # The positions of a slot's end belong to no token.
            ids = net.elementwise("MIN", ids, rows - 1)
        return _rows(net, table, ids)
    local = net.sub(ids, start) if start else ids
    inside = net.elementwise("MIN", net.elementwise("MAX", local, 0), rows - 1)
    held = net.cast(net.elementwise("EQUAL", inside, local), table.dtype)
    return net.mul(_rows(net, table, inside), net.reshape(held, (0, 0, 1)))


def _rows(net: Network, table: Value, ids: Value) -> Value:
    """The rows `ids` [B, S] of a table [1, rows, features]."""
    found = net.gather(table, ids, axis=1)  # [1, B, S, features]
    features = int(table.tensor.shape[2])
    return net.reshape(found, (0, 0, features), before=(1, 2, 0, 3))


@lowers("linear")
def linear(g: Lowering, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
    product = g.net.matmul(x, g.weight(weight), transpose=True)
    if bias is None:
        return product
    return g.net.add(product, g.vector(bias, (1, 1, int(bias.shape[0]))))


@lowers("split")
def split(g: Lowering, x: Value, *, sizes: Sequence[int]) -> tuple[Value, ...]:
    parts, start = [], 0
    for size in sizes:
        parts.append(run(g, x, start, size))
        start += size
    return tuple(parts)


def run(g: Lowering, x: Value, start: int, size: int) -> Value:
    """Elements ``start : start + size`` of the last dimension. By a gather: a slice would need the
    other dimensions' sizes as a tensor."""
    if (start, size) == (0, g.features(x)):
        return x
    return g.net.gather(x, g.integers(*range(start, start + size)), axis=-1)


@lowers("rms_norm")
def rms_norm(g: Lowering, x: Value, weight: Tensor, *, eps: float) -> Value:
    features, size = g.features(x), int(weight.shape[0])
    if size == features:
        return _rms_norm(g, x, g.vector(weight, (1, 1, size)), eps)
    heads = g.net.reshape(x, (0, 0, features // size, size))
    normed = _rms_norm(g, heads, g.vector(weight, (1, 1, 1, size)), eps)
    return g.net.reshape(normed, (0, 0, features))


def _rms_norm(g: Lowering, x: Value, weight: Value, eps: float) -> Value:
    net, wide = g.net, g.net.cast(x, "float32")
    mean = net.reduce("AVG", net.mul(wide, wide), -1)
    normed = net.mul(wide, _inverse_root(net, net.add(mean, eps)))
    return net.mul(net.cast(normed, x.dtype), weight)


def _inverse_root(net: Network, x: Value) -> Value:
    return net.unary("RECIP", net.unary("SQRT", x))


@lowers("layer_norm")
def layer_norm(
    g: Lowering, x: Value, weight: Tensor, bias: Tensor | None, *, eps: float, run: int
) -> Value:
    net, features = g.net, g.features(x)
    heads = features // run
    each = heads if int(weight.shape[0]) == features else 1
    wide = net.cast(net.reshape(x, (0, 0, heads, run)), "float32")
    centred = net.sub(wide, net.reduce("AVG", wide, -1))
    variance = net.reduce("AVG", net.mul(centred, centred), -1)
    normed = net.mul(centred, _inverse_root(net, net.add(variance, eps)))
    result = net.mul(normed, g.vector(weight, (1, 1, each, run), "float32"))
    if bias is not None:
        result = net.add(result, g.vector(bias, (1, 1, each, run), "float32"))
    return net.reshape(net.cast(result, x.dtype), (0, 0, features))


@lowers("square_sum")
def square_sum(g: Lowering, x: Value) -> Value:
    wide = g.net.cast(x, "float32")
    return g.net.reduce("SUM", g.net.mul(wide, wide), -1)


@lowers("rms_norm_by")
def rms_norm_by(
    g: Lowering, x: Value, square_sum: Value, weight: Tensor, *, eps: float, size: int
) -> Value:
    net = g.net
    root = _inverse_root(net, net.add(net.mul(square_sum, 1 / size), eps))
    normed = net.cast(net.mul(net.cast(x, "float32"), root), x.dtype)
    return net.mul(normed, g.vector(weight, (1, 1, int(weight.shape[0]))))


@lowers("scale")
def scale(g: Lowering, x: Value, *, factor: float) -> Value:
    return g.net.cast(g.net.mul(g.net.cast(x, "float32"), factor), x.dtype)


@lowers("soft_cap")
def soft_cap(g: Lowering, x: Value, *, cap: float) -> Value:
    return g.net.cast(capped(g.net, g.net.cast(x, "float32"), cap), x.dtype)


def capped(net: Network, x: Value, cap: float) -> Value:
    return net.mul(net.activation("TANH", net.mul(x, 1 / cap)), cap)


@lowers("clamp")
def clamp(g: Lowering, x: Value, *, limit: float) -> Value:
    return g.net.elementwise("MIN", g.net.elementwise("MAX", x, -limit), limit)


@lowers("add")
def add(g: Lowering, x: Value, y: Value | Tensor) -> Value:
    if isinstance(y, Tensor):  # a bias
        y = g.vector(y, (1, 1, int(y.shape[0])))
    return g.net.add(x, y)


@lowers("add_rms_norm")
def add_rms_norm(
    g: Lowering, x: Value, residual: Value, weight: Tensor, *, eps: float
) -> tuple[Value, Value]:
    total = g.net.add(x, residual)
    return total, rms_norm(g, total, weight, eps=eps)


# -- activations, of float32 values ----------------------------------------------------------------


def _silu(net: Network, x: Value) -> Value:
    return net.mul(x, net.activation("SIGMOID", x))


def _gelu(net: Network, x: Value) -> Value:
    erf = net.unary("ERF", net.mul(x, 2**-0.5))
    return net.mul(net.mul(x, 0.5), net.add(erf, 1.0))


def _gelu_tanh(net: Network, x: Value) -> Value:
    cube = net.mul(net.mul(x, x), x)
    inner = net.mul(net.add(x, net.mul(cube, 0.044715)), 0.7978845608028654)  # sqrt(2 / pi)
    return net.mul(net.mul(x, 0.5), net.add(net.activation("TANH", inner), 1.0))


def _relu(net: Network, x: Value) -> Value:
    return net.activation("RELU", x)


def _relu2(net: Network, x: Value) -> Value:
    positive = net.activation("RELU", x)
    return net.mul(positive, positive)


ACTIVATIONS: dict[str, Callable[[Network, Value], Value]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}


def activated(net: Network, x: Value, name: str) -> Value:
    return net.cast(ACTIVATIONS[name](net, net.cast(x, "float32")), x.dtype)


@lowers("activation")
def activation(g: Lowering, x: Value, *, activation: str) -> Value:
    return activated(g.net, x, activation)


@lowers("gated_activation")
def gated_activation(g: Lowering, gate: Value, up: Value, *, activation: str) -> Value:
    return g.net.mul(activated(g.net, gate, activation), up)


@lowers("token_gate")
def token_gate(g: Lowering, x: Value, by: Value, weight: Tensor) -> Value:
    net, size = g.net, int(weight.shape[1])
    products = net.mul(net.cast(by, "float32"), g.vector(weight, (1, 1, size), "float32"))
    factor = net.activation("SIGMOID", net.reduce("SUM", products, -1))
    return net.cast(net.mul(net.cast(x, "float32"), factor), x.dtype)


@lowers("head_linear")
def head_linear(g: Lowering, x: Value, weight: Tensor) -> Value:
    net, (heads, out, size) = g.net, map(int, weight.shape)
    rows = net.reshape(x, (0, 0, heads, size), after=(0, 2, 1, 3))
    products = net.matmul(rows, g.weight(weight), transpose=True)
    return merge_heads(net, products, heads * out)


def merge_heads(net: Network, x: Value, features: int) -> Value:
    """[B, heads, S, size] → [B, S, features]."""
    return net.reshape(x, (0, 0, features), before=(0, 2, 1, 3))


@lowers("select_rows")
def select_rows(g: Lowering, x: Value, rows: None) -> Value:
    flat = g.net.reshape(x, (1, -1, g.features(x)))
    return g.net.gather(flat, g.step_input(LOGIT_ROWS), axis=1)
