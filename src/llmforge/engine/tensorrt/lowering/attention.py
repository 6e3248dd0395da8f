"""Rows of attention over the cache.

What a step moves, for each layer and sequence (S new tokens, a slot of M positions):

native      the cache update writes S positions of k and v in place; attention reads the cache.
primitives  the network reads the cache where it lies, as an input of two products (q Kᵀ and p V),
            and gives S new positions of k and v, which a kernel of the runtime writes into the
            slot. Nothing of the cache is copied: attention over the cache and over the new
            tokens are computed apart and joined by their softmaxes' sums. Masked positions are
            read and count nothing, so a step reads M positions however short the sequence is; the
            S new ones of k and v are written twice.

scored_attention and latent_attention are the products of primitives in both columns, over the
updated cache where that is native: TensorRT's attention layer has no soft cap, no additive scores
in float32 and no sinks, and no kernel for the head sizes of a latent cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmforge.engine.tensorrt.io import PAST_LENS, POSITIONS
from llmforge.engine.tensorrt.lowering.basic import capped, merge_heads, run
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.lowering.table import lowers, lowers_natively
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.model.graph import Tensor

_MASKED = -1e30  # added to scores: far below all others, and its sums stay finite


@dataclass(frozen=True)
class Part:
    """Some of the keys and values that queries see: [B, kv heads, keys, size] each. which: "all"
    of the updated cache, "cache" as it was before the call, or the "new" tokens."""

    which: str
    keys: Value
    values: Value


@dataclass(frozen=True)
class Scoring:
    """How scores come about: see the ops' attributes."""

    scale: float
    window: int | None
    soft_cap: float | None = None
    slopes: Sequence[float] = ()
    sinks: Tensor | None = None


# -- rows ------------------------------------------------------------------------------------------


@lowers_natively("attention", "attention", "cache_update")
def native_attention(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    key_cache: Tensor,
    value_cache: Tensor,
    *step: None,
    head_dim: int,
    scale: float,
    window: int | None,
) -> Value:
    """The mask is a tensor of the network: windows need one, and the layer's own causal mask goes
    by the last key, which padding would shift. The layer has no scale: q is scaled."""
    net, features = g.net, g.features(q)
    keys, values = (
        updated(g, heads_first(g, x, head_dim), c) for x, c in ((k, key_cache), (v, value_cache))
    )
    scaled = net.cast(net.mul(net.cast(q, "float32"), scale), q.dtype)
    mask = visible(g, "all", window, groups=False)
    attended = net.attention(heads_first(g, scaled, head_dim), keys, values, mask)
    return merge_heads(net, attended, features)


@lowers("attention")
def attention(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    key_cache: Tensor,
    value_cache: Tensor,
    *step: None,
    head_dim: int,
    scale: float,
    window: int | None,
) -> Value:
    parts = stored(g, (k, v), (key_cache, value_cache))
    return attend(g, q, parts, Scoring(scale, window))


@lowers("scored_attention")
def scored_attention(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    key_cache: Tensor,
    value_cache: Tensor,
    query_starts: None,
    kv_lens: None,
    block_table: None,
    sinks: Tensor | None,
    *,
    head_dim: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes: Sequence[float],
) -> Value:
    parts = stored(g, (k, v), (key_cache, value_cache))
    return attend(g, q, parts, Scoring(scale, window, soft_cap, slopes, sinks))


@lowers("latent_attention")
def latent_attention(
    g: Lowering,
    q: Value,
    q_rope: Value,
    latent: Value,
    k_rope: Value,
    cache: Tensor,
    *step: None,
    scale: float,
) -> Value:
    net, rank, dim = g.net, g.features(latent), g.features(k_rope)
    heads = g.features(q) // rank
    queries = net.concat(
        [net.reshape(x, (0, 0, heads, size)) for x, size in ((q, rank), (q_rope, dim))], axis=-1
    )
    joined = net.reshape(queries, (0, 0, heads * (rank + dim)))
    parts = stored(g, (net.concat((latent, k_rope), axis=-1),), (cache,))
    attended = attend(g, joined, parts, Scoring(scale, None))
    outputs = run(g, net.reshape(attended, (0, 0, heads, rank + dim)), 0, rank)
    return net.reshape(outputs, (0, 0, heads * rank))


# -- the cache -------------------------------------------------------------------------------------


def heads_first(g: Lowering, x: Value, head_dim: int) -> Value:
    """[B, S, features] → [B, heads, S, head_dim]."""
    heads = g.features(x) // head_dim
    return g.net.reshape(x, (0, 0, heads, head_dim), after=(0, 2, 1, 3))


def updated(g: Lowering, new: Value, state: Tensor) -> Value:
    """The cache of a state with the new positions in it, in the same memory."""
    cache, output = g.cache(state)
    result = g.net.update_cache(cache, new, g.step_input(PAST_LENS))
    g.net.output(output, result)
    return result


def stored(g: Lowering, new: Sequence[Value], states: Sequence[Tensor]) -> list[Part]:
    """What queries see once the new keys and values ([B, S, features]; one for both where they
    are the same) are stored."""
    rows = [heads_first(g, x, int(s.shape[3])) for x, s in zip(new, states, strict=True)]
    if g.native_cache:
        caches = [updated(g, x, state) for x, state in zip(rows, states, strict=True)]
        return [Part("all", caches[0], caches[-1])]
    past = []
    for x, state in zip(rows, states, strict=True):
        cache, output = g.cache(state)
        past.append(cache)
        g.net.output(output, x)
    return [Part("cache", past[0], past[-1]), Part("new", rows[0], rows[-1])]


# -- masks -----------------------------------------------------------------------------------------


def visible(g: Lowering, which: str, window: int | None, *, groups: bool) -> Value:
    """Whether each query sees each key: [B, 1, S, keys], with `groups` [B, 1, 1, S, keys]."""

    def made() -> Value:
        net = g.net
        queries, keys = _positions(g, which, groups=groups)
        if which == "cache":
            past = net.reshape(g.step_input(PAST_LENS), (0, *(1,) * (keys.rank - 1)))
            seen = net.elementwise("LESS", keys, past)
        else:
            seen = net.unary("NOT", net.elementwise("GREATER", keys, queries))
        if window is None:
            return seen
        near = net.elementwise("GREATER", keys, net.sub(queries, window))
        return net.elementwise("AND", seen, near)

    return g.once(("visible", which, window, groups), made)


def _positions(g: Lowering, which: str, *, groups: bool) -> tuple[Value, Value]:
    """The positions of queries [B, 1, S, 1] and of keys [B or 1, 1, 1, keys], int32; with
    `groups`, one more dimension of size 1."""
    ones = (1, 1) if groups else (1,)
    positions = g.step_input(POSITIONS)
    queries = g.net.reshape(positions, (0, *ones, -1, 1))
    if which == "new":
        return queries, g.net.reshape(positions, (0, *ones, 1, -1))
    return queries, g.integers(*range(g.capacity), shape=(1, *ones, 1, g.capacity))


def _mask(g: Lowering, which: str, window: int | None) -> Value:
    """What is added to scores [B, kv heads, group, S, keys]: 0, or `_MASKED` where a query does
    not see a key."""

    def made() -> Value:
        seen = visible(g, which, window, groups=True)
        zero, masked = (g.floats(number, (1,) * 5) for number in (0.0, _MASKED))
        return g.net.select(seen, zero, masked)

    return g.once(("mask", which, window), made)


def _behind(g: Lowering, which: str) -> Value:
    """How many positions each key is behind each query, float32."""

    def made() -> Value:
        queries, keys = _positions(g, which, groups=True)
        return g.net.cast(g.net.sub(queries, keys), "float32")

    return g.once(("behind", which), made)


# -- scores ----------------------------------------------------------------------------------------


def attend(g: Lowering, q: Value, parts: Sequence[Part], scoring: Scoring) -> Value:
    """Attention of q [B, S, heads * size] to the keys of all parts, as under one softmax; products
    are in q's dtype, all else in float32."""
    net = g.net
    kv_heads, size = (int(parts[0].keys.tensor.shape[axis]) for axis in (1, 3))
    group = g.features(q) // size // kv_heads
    # A power of two is taken off before the product, which rounds nothing and keeps float16 in
    # range; the rest of the scale after it.
    power = 2.0 ** round(math.log2(scoring.scale))
    queries = net.reshape(net.mul(q, power), (0, 0, kv_heads, group, size), after=(0, 2, 3, 1, 4))
    softmaxes = [
        _softmax(net, _scored(g, _products(g, queries, part), part, scoring, scoring.scale / power))
        for part in parts
    ]
    summed = [
        net.cast(_weighted(g, net.cast(softmax.shares, q.dtype), part), "float32")
        for softmax, part in zip(softmaxes, parts, strict=True)
    ]
    sinks = scoring.sinks
    extra = None if sinks is None else g.vector(sinks, (1, kv_heads, group, 1, 1), "float32")
    attended = net.cast(_joined(net, summed, softmaxes, extra), q.dtype)
    return net.reshape(attended, (0, 0, kv_heads * group * size), before=(0, 3, 1, 2, 4))


def _products(g: Lowering, queries: Value, part: Part) -> Value:
    """queries keysᵀ: [B, kv heads, group, S, size] → [B, kv heads, group, S, keys]. With a cache,
    the queries of the heads that share a kv head are rows of one product, so that its keys are
    read once; the few new keys are read by each head (and the two dimensions of size S could not
    be told apart in a reshape)."""
    net, group, size = g.net, int(queries.tensor.shape[2]), int(queries.tensor.shape[4])
    if part.which == "new":
        return net.matmul(queries, _shared(g, part.keys), transpose=True)
    rows = net.reshape(queries, (0, 0, -1, size))
    products = net.matmul(rows, part.keys, transpose=True)
    return net.reshape(products, (0, 0, group, -1, g.capacity))


def _weighted(g: Lowering, share: Value, part: Part) -> Value:
    """The sum of values, each times its share [B, kv heads, group, S, keys]."""
    net, group, size = g.net, int(share.tensor.shape[2]), int(part.values.tensor.shape[3])
    if part.which == "new":
        return net.matmul(share, _shared(g, part.values))
    rows = net.reshape(share, (0, 0, -1, g.capacity))
    return net.reshape(net.matmul(rows, part.values), (0, 0, group, -1, size))


def _shared(g: Lowering, x: Value) -> Value:
    """[B, kv heads, S, size] → [B, kv heads, 1, S, size]."""
    heads, size = int(x.tensor.shape[1]), int(x.tensor.shape[3])
    return g.net.reshape(x, (0, heads, 1, -1, size))


def _scored(g: Lowering, products: Value, part: Part, scoring: Scoring, scale: float) -> Value:
    """The scores of products [B, kv heads, group, S, keys], in float32, masked."""
    net, heads = g.net, products.tensor.shape[1:3]
    scores = net.cast(products, "float32")
    if scale != 1:
        scores = net.mul(scores, scale)
    if scoring.soft_cap is not None:
        scores = capped(net, scores, scoring.soft_cap)
    if scoring.slopes:
        slopes = g.floats(scoring.slopes, (1, *heads, 1, 1))
        scores = net.sub(scores, net.mul(slopes, _behind(g, part.which)))
    return net.add(scores, _mask(g, part.which, scoring.window))


@dataclass(frozen=True)
class _Softmax:
    """The softmax of some scores: shares [..., keys] that sum to one, the largest score [..., 1],
    and the sum [..., 1] of the exponentials of what scores are less than that."""

    shares: Value
    largest: Value
    total: Value


def _softmax(net: Network, scores: Value) -> _Softmax:
    largest = net.reduce("MAX", scores, -1)
    powers = net.unary("EXP", net.sub(scores, largest))
    total = net.reduce("SUM", powers, -1)
    return _Softmax(net.mul(powers, net.unary("RECIP", total)), largest, total)


def _joined(
    net: Network, summed: Sequence[Value], softmaxes: Sequence[_Softmax], extra: Value | None
) -> Value:
    """What one softmax over all scores would have given: the parts' sums, each weighed by what its
    exponentials are of all (https://arxiv.org/abs/2205.14135, section 3.1). `extra`: one more
    score, of value zero.

    (TensorRT compiles this, and not one softmax over two parts: "value.cpp: CHECK(is_const())".)
    """
    if len(summed) == 1 and extra is None:
        return summed[0]
    largest = extra
    for softmax in softmaxes:
        most = softmax.largest
        largest = most if largest is None else net.elementwise("MAX", largest, most)
    assert largest is not None
    weights = [
        net.mul(softmax.total, net.unary("EXP", net.sub(softmax.largest, largest)))
        for softmax in softmaxes
    ]
    total = None if extra is None else net.unary("EXP", net.sub(extra, largest))
    for weight in weights:
        total = weight if total is None else net.add(total, weight)
    assert total is not None
    share, result = net.unary("RECIP", total), None
    for values, weight in zip(summed, weights, strict=True):
        weighed = net.mul(values, net.mul(weight, share))
        result = weighed if result is None else net.add(result, weighed)
    assert result is not None
    return result
