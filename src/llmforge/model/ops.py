"""Every op: its inputs, attributes, and the rule that gives its outputs' shapes.

What an op computes is in reference.py; a target has a row for each op in its own table.
Activations are packed [tokens, features]: heads lie side by side in the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmforge.model.graph import Shape, Tensor

Signature = tuple[tuple[Shape, str], ...]  # one (shape, dtype) an output
Rule = Callable[[Sequence[Tensor | None], Mapping[str, Any]], Signature]


@dataclass(frozen=True)
class Op:
    """`inputs` in order, those ending in "?" optional. `attributes` are all required."""

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    infer: Rule

    def check(self, inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
        """The outputs' shapes and dtypes. Raises ValueError on a call that is not of this form."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{self.name} takes {len(self.inputs)} inputs, got {len(inputs)}")
        for value, name in zip(inputs, self.inputs, strict=True):
            if value is None and not name.endswith("?"):
                raise ValueError(f"{self.name} needs its input {name}")
        if set(attrs) != set(self.attributes):
            raise ValueError(
                f"{self.name} takes the attributes {sorted(self.attributes)}, got {sorted(attrs)}"
            )
        return self.infer(inputs, attrs)


OPS: dict[str, Op] = {}


def _op(name: str, inputs: str, attributes: str = "") -> Callable[[Rule], Rule]:
    def register(infer: Rule) -> Rule:
        OPS[name] = Op(name, tuple(inputs.split()), tuple(attributes.split()), infer)
        return infer

    return register


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _equal(what: str, left: object, right: object) -> None:
    if left != right:
        raise ValueError(f"{what}: {left} and {right} differ")


def _last(tensor: Tensor, size: object) -> Shape:
    return (*tensor.shape[:-1], size)  # type: ignore[arg-type]


@_op("embed", "ids weight", "start")
def _embed(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """Rows of `weight` [local vocabulary, hidden], whose first row is token `start`; tokens that
    another rank holds give zeros."""
    ids, weight = map(_given, inputs)
    return (((*ids.shape, weight.shape[1]), weight.dtype),)


@_op("linear", "x weight bias?")
def _linear(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x weightᵀ + bias."""
    x, weight = _given(inputs[0]), _given(inputs[1])
    _equal("linear: in_features", x.shape[-1], weight.shape[1])
    if inputs[2] is not None:
        _equal("linear: bias", inputs[2].shape, weight.shape[:1])
    return ((_last(x, weight.shape[0]), x.dtype),)


@_op("split", "x", "sizes")
def _split(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """The last dimension cut into runs of `sizes`."""
    x = _given(inputs[0])
    _equal("split: sizes", sum(attrs["sizes"]), x.shape[-1])
    return tuple((_last(x, size), x.dtype) for size in attrs["sizes"])


@_op("rms_norm", "x weight", "eps")
def _rms_norm(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x / rms(x) weight, over runs of the last dimension as long as `weight` (so a weight of
    head_dim normalises each head). https://arxiv.org/abs/1910.07467"""
    x, weight = map(_given, inputs)
    features, run = x.shape[-1], weight.shape[0]
    if not isinstance(features, int) or not isinstance(run, int) or features % run:
        raise ValueError(f"rms_norm: {features} features are not whole runs of {run}")
    return ((x.shape, x.dtype),)


@_op("layer_norm", "x weight bias?", "eps run")
def _layer_norm(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """(x - mean) / deviation over runs of `run` elements of the last dimension, then weight and
    bias. These are as long as a run (the same for every run) or as all features.
    https://arxiv.org/abs/1607.06450"""
    x, weight = _given(inputs[0]), _given(inputs[1])
    features, run = x.shape[-1], attrs["run"]
    if not isinstance(features, int) or features % run:
        raise ValueError(f"layer_norm: {features} features are not whole runs of {run}")
    if weight.shape not in ((run,), (features,)):
        raise ValueError(f"layer_norm: a weight of {weight.shape} for runs of {run}")
    if inputs[2] is not None:
        _equal("layer_norm: bias", inputs[2].shape, weight.shape)
    return ((x.shape, x.dtype),)


@_op("square_sum", "x")
def _square_sum(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """[tokens, 1] float32: the sum of each row's squares. Summed over ranks, it makes the norm of
    features that the ranks share among them."""
    return ((_last(_given(inputs[0]), 1), "float32"),)


@_op("rms_norm_by", "x square_sum weight", "eps size")
def _rms_norm_by(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """rms_norm where the mean square is `square_sum` / `size`: x is a part of `size` features."""
    x, square_sum, weight = map(_given, inputs)
    _equal("rms_norm_by: square_sum", square_sum.shape, _last(x, 1))
    _equal("rms_norm_by: weight", weight.shape, x.shape[-1:])
    return ((x.shape, x.dtype),)


@_op("scale", "x", "factor")
def _scale(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x factor."""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op("soft_cap", "x", "cap")
def _soft_cap(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """cap tanh(x / cap)."""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op("add", "x y")
def _add(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x + y; y has x's shape, or is one row for all."""
    x, y = map(_given, inputs)
    _equal("add: features", x.shape[-len(y.shape) :], y.shape)
    return ((x.shape, x.dtype),)


@_op("add_rms_norm", "x residual weight", "eps")
def _add_rms_norm(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """(x + residual, rms_norm of that)."""
    x, residual, weight = map(_given, inputs)
    _equal("add_rms_norm: shapes", x.shape, residual.shape)
    _rms_norm((x, weight), attrs)
    return ((x.shape, x.dtype), (x.shape, x.dtype))


@_op("rope_table", "positions query_starts prompt_lens", "rope")
def _rope_table(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """[tokens, dim] float32: the cosines of the dim / 2 angles, then their sines.
    `rope` holds the fields of a RopeConfig. A token's angles may depend on the longer of its
    prompt and its own position (dynamic, longrope), never on how the prompt was cut into steps."""
    positions = _given(inputs[0])
    return (((*positions.shape, attrs["rope"]["dim"]), "float32"),)


@_op("rope", "x table", "head_dim")
def _rope(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """The first `dim` elements of each head rotated, element i with i + dim / 2.
    https://arxiv.org/abs/2104.09864"""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op(
    "attention",
    "q k v key_cache value_cache query_starts kv_lens block_table",
    "head_dim scale window",
)
def _attention(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """Writes k and v into the caches [blocks, block_size, kv_heads, head_dim], then each query
    attends to its sequence's positions up to its own, the last `window` of them (None: all).
    Query head h reads kv head h // (heads / kv_heads)."""
    q, k, v = (_given(t) for t in inputs[:3])
    _equal("attention: k and v", k.shape, v.shape)
    return ((q.shape, q.dtype),)


@_op(
    "scored_attention",
    "q k v key_cache value_cache query_starts kv_lens block_table sinks?",
    "head_dim scale window soft_cap slopes",
)
def _scored_attention(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """attention whose scaled scores are changed before the softmax: capped as by soft_cap (None:
    not), then lowered by the query head's entry of `slopes` (empty: not) for every position that
    the key is behind the query (ALiBi, https://arxiv.org/abs/2108.12409). `sinks` [heads] are
    scores of one more key, of value zero, that every query of a head sees: they take part in the
    softmax's sum alone (https://arxiv.org/abs/2309.17453). An op of its own, so that a target
    without it says so."""
    q, cache = _given(inputs[0]), _given(inputs[3])
    heads = q.shape[-1] // cache.shape[3]  # type: ignore[operator]
    if attrs["slopes"]:
        _equal("scored_attention: slopes and heads", len(attrs["slopes"]), heads)
    if inputs[8] is not None:
        _equal("scored_attention: sinks and heads", inputs[8].shape, (heads,))
    return _attention(inputs, attrs)


@_op(
    "latent_attention",
    "q q_rope latent k_rope latent_cache query_starts kv_lens block_table",
    "scale",
)
def _latent_attention(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """Attention over a cache that all heads share (https://arxiv.org/abs/2405.04434, section 2.1,
    the key's and value's up-projections absorbed into what is before and behind).

    Writes [latent | k_rope] of each token, rank + dim elements, into the cache
    [blocks, block_size, 1, rank + dim]. Each head's query is [its part of q | its part of q_rope];
    its key at a position is what is cached there, its value the first `rank` elements of that.
    q and the result are [tokens, heads x rank], q_rope is [tokens, heads x dim]."""
    q, q_rope, latent, k_rope, cache = (_given(t) for t in inputs[:5])
    rank, dim = latent.shape[-1], k_rope.shape[-1]
    assert isinstance(rank, int) and isinstance(dim, int)
    _equal("latent_attention: cache", cache.shape[2:], (1, rank + dim))
    heads = q.shape[-1] // rank  # type: ignore[operator]
    _equal("latent_attention: features of q", q.shape[-1], heads * rank)
    _equal("latent_attention: features of q_rope", q_rope.shape[-1], heads * dim)
    return ((q.shape, q.dtype),)


@_op("head_linear", "x weight")
def _head_linear(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """A linear of its own for each head: x [tokens, heads x in] and weight [heads, out, in] give
    [tokens, heads x out]."""
    x, weight = map(_given, inputs)
    heads, out_features, in_features = (int(size) for size in weight.shape)
    _equal("head_linear: features", x.shape[-1], heads * in_features)
    return ((_last(x, heads * out_features), x.dtype),)


@_op("clamp", "x", "limit")
def _clamp(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x, what is beyond -limit or limit being set to it."""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op("activation", "x", "activation")
def _activation(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """activation(x)."""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op("gated_activation", "gate up", "activation")
def _gated_activation(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """activation(gate) up. https://arxiv.org/abs/2002.05202"""
    gate, up = map(_given, inputs)
    _equal("gated_activation: shapes", gate.shape, up.shape)
    return ((gate.shape, gate.dtype),)


@_op(
    "route",
    "x weight bias? correction?",
    "top_k score groups kept_groups group_top normalize scale",
)
def _route(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """The experts of each token: their ids [tokens, top_k] int32, best first, and their weights
    [tokens, top_k] float32. Everything is computed in float32.

    The scores are softmax(x weightᵀ + bias) over all experts, or the sigmoid (`score`). The
    choice is by scores + correction [experts] float32; of equal ones the lower id is better. With
    `groups` > 1 of neighbouring experts, only those of the `kept_groups` best groups can be
    chosen: the value of a group is the sum of its `group_top` best. A chosen expert's weight is
    its score (without the correction), divided, with `normalize`, by the sum of the chosen ones'
    plus 1e-20, times `scale`. (So a softmax over the chosen experts alone is `normalize`.)"""
    x, weight = _given(inputs[0]), _given(inputs[1])
    _equal("route: in_features", x.shape[-1], weight.shape[1])
    experts, groups, top_k = int(weight.shape[0]), attrs["groups"], attrs["top_k"]
    for extra in inputs[2:]:
        if extra is not None:
            _equal("route: experts", extra.shape, (experts,))
    if attrs["score"] not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score {attrs['score']!r} is not softmax or sigmoid")
    if experts % groups or not 0 < top_k <= experts // groups * attrs["kept_groups"] <= experts:
        raise ValueError(f"route: {top_k} of {experts} experts in {groups} groups")
    return ((_last(x, top_k), "int32"), (_last(x, top_k), "float32"))


@_op(
    "experts",
    "x ids weights gate_up down gate_up_bias? down_bias?",
    "first activation alpha limit",
)
def _experts(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """For each token the sum, over its experts that are held here, of the expert's weight times
    its gated MLP of x. Held are experts `first` up to `first` + E, in gate_up [E, 2 I, hidden]
    (rows of gate, then of up) and down [E, hidden, I]; the biases are [E, 2 I] and [E, hidden].
    Other experts are another rank's and add nothing.

    `limit` None: activation(gate) up. Otherwise, with gate at most `limit` and up within ±`limit`:
    gate sigmoid(alpha gate) (up + 1). Products round to x's dtype as `linear` does, the weighted
    sum is in float32 and rounds once."""
    x, ids, weights, gate_up, down = (_given(t) for t in inputs[:5])
    count, rows, hidden = (int(size) for size in gate_up.shape)
    _equal("experts: ids and weights", ids.shape, weights.shape)
    _equal("experts: in_features", x.shape[-1], hidden)
    _equal("experts: gate, up and down", (count, rows), (count, 2 * int(down.shape[2])))
    _equal("experts: down", down.shape[:2], (count, hidden))
    for bias, size in zip(inputs[5:], (rows, hidden), strict=True):
        if bias is not None:
            _equal("experts: bias", bias.shape, (count, size))
    return ((x.shape, x.dtype),)


@_op("token_gate", "x by weight")
def _token_gate(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x sigmoid(by · weight): one factor a token, computed in float32. `by` [tokens, hidden] and
    weight [1, hidden]."""
    x, by, weight = map(_given, inputs)
    _equal("token_gate: weight", weight.shape, (1, by.shape[-1]))
    return ((x.shape, x.dtype),)


@_op("select_rows", "x rows")
def _select_rows(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x[rows]."""
    x, rows = map(_given, inputs)
    return (((*rows.shape, *x.shape[1:]), x.dtype),)


@_op("all_reduce", "x", "ranks")
def _all_reduce(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """The sum of x over the `ranks` tensor-parallel ranks, in rank order."""
    x = _given(inputs[0])
    return ((x.shape, x.dtype),)


@_op("all_gather", "x", "size ranks")
def _all_gather(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """The x of the `ranks` tensor-parallel ranks side by side in the last dimension; its first
    `size` elements (what is beyond is padding)."""
    x = _given(inputs[0])
    return ((_last(x, attrs["size"]), x.dtype),)


@_op("send", "x", "to")
def _send(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """x to the rank `to` of the whole engine."""
    return ()


@_op("recv", "", "source shape dtype")
def _recv(inputs: Sequence[Tensor | None], attrs: Mapping[str, Any]) -> Signature:
    """What the rank `source` of the whole engine sends."""
    return ((tuple(attrs["shape"]), attrs["dtype"]),)
