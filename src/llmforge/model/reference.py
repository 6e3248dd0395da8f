"""What every op means, in plain torch. The cpu target executes these; other targets are
compared with them.

Norms, rotations and softmax compute in float32 and round once to the dtype of their input, except
where a comment says otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.checkpoint.config import RopeConfig
from llmforge.comm import Comm, LocalComm

Tensor = torch.Tensor
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")}


@dataclass(frozen=True)
class Context:
    """What collectives need besides their inputs: the whole engine's ranks, those of this
    tensor-parallel group, and the step's sizes of symbolic dimensions."""

    world: Comm
    tensor_group: Comm
    sizes: Mapping[str, int]


LOCAL = Context(LocalComm(), LocalComm(), {})

Meaning = Callable[[Sequence[Any], Mapping[str, Any], Context], tuple[Tensor, ...]]
REFERENCE: dict[str, Meaning] = {}


def _meaning(
    name: str, *, collective: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of (inputs..., *, attributes...); a collective's first argument is
    the context."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            inputs: Sequence[Any], attrs: Mapping[str, Any], context: Context
        ) -> tuple[Tensor, ...]:
            first = (context,) if collective else ()
            result = function(*first, *inputs, **attrs)
            return result if isinstance(result, tuple) else (result,)

        REFERENCE[name] = call
        return function

    return register


@_meaning("embed")
def embed(ids: Tensor, weight: Tensor, *, start: int) -> Tensor:
    local = ids.long() - start
    held = (local >= 0) & (local < weight.shape[0])
    rows: Tensor = F.embedding(local.clamp(0, weight.shape[0] - 1), weight)
    return rows * held[:, None].to(rows.dtype)


@_meaning("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@_meaning("split")
def split(x: Tensor, *, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(x.split(list(sizes), dim=-1))


@_meaning("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    runs: Tensor = x.float().unflatten(-1, (-1, weight.shape[0]))
    normed = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + eps)
    # Rounded before the weight is applied, as the models were trained.
    return (normed.to(x.dtype) * weight).flatten(-2)


@_meaning("layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, run: int) -> Tensor:
    normed: Tensor = F.layer_norm(x.float().unflatten(-1, (-1, run)), (run,), eps=eps)
    scaled = normed * weight.float().view(-1, run)
    shifted = scaled if bias is None else scaled + bias.float().view(-1, run)
    return shifted.flatten(-2).to(x.dtype)


@_meaning("square_sum")
def square_sum(x: Tensor) -> Tensor:
    return x.float().square().sum(-1, keepdim=True)


@_meaning("rms_norm_by")
def rms_norm_by(x: Tensor, square_sum: Tensor, weight: Tensor, *, eps: float, size: int) -> Tensor:
    normed = x.float() * torch.rsqrt(square_sum / size + eps)
    return normed.to(x.dtype) * weight


@_meaning("scale")
def scale(x: Tensor, *, factor: float) -> Tensor:
    return x * factor


@_meaning("soft_cap")
def soft_cap(x: Tensor, *, cap: float) -> Tensor:
    return (torch.tanh(x.float() / cap) * cap).to(x.dtype)


@_meaning("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@_meaning("add_rms_norm")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm(total, weight, eps=eps)


@_meaning("rope_table")
def rope_table(
    positions: Tensor, query_starts: Tensor, prompt_lens: Tensor, *, rope: Mapping[str, Any]
) -> Tensor:
    config = RopeConfig(**rope)
    if config.by_length:
        per_token = prompt_lens.long().repeat_interleave(query_starts.diff().long())
        lengths = torch.maximum(per_token, positions.long() + 1)
        distinct, index = lengths.unique(return_inverse=True)
        table = torch.tensor([config.frequencies(int(n)) for n in distinct.tolist()])
        frequencies = table.to(positions.device)[index]
    else:
        frequencies = torch.tensor(config.frequencies(), device=positions.device)[None]
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * config.attention_factor


@_meaning("rope")
def rope(x: Tensor, table: Tensor, *, head_dim: int) -> Tensor:
    dim = table.shape[-1]
    heads = x.float().unflatten(-1, (-1, head_dim))
    cos, sin = table[:, None].chunk(2, dim=-1)
    first, second = heads[..., : dim // 2], heads[..., dim // 2 : dim]
    rotated = (first * cos - second * sin, second * cos + first * sin, heads[..., dim:])
    return torch.cat(rotated, dim=-1).flatten(-2).to(x.dtype)


def _attend(
    inputs: Sequence[Tensor],
    head_dim: int,
    window: int | None,
    score: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention with the scores ``score(products, behind)``: of the products of queries and keys
    [heads, queries, keys], and how many positions each key is behind each query."""
    q, k, v, key_cache, value_cache, query_starts, kv_lens, block_table = inputs
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    block_size = key_cache.shape[1]
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    bounds = query_starts.tolist()
    for sequence, (start, stop) in enumerate(itertools.pairwise(bounds)):
        kv_len = int(kv_lens[sequence])
        slots = torch.arange(kv_len, device=q.device)
        blocks = block_table[sequence].long()[slots // block_size]
        offsets = slots % block_size
        first_new = kv_len - (stop - start)
        key_cache[blocks[first_new:], offsets[first_new:]] = k[start:stop]
        value_cache[blocks[first_new:], offsets[first_new:]] = v[start:stop]
        keys = key_cache[blocks, offsets].float().repeat_interleave(group, dim=1)
        values = value_cache[blocks, offsets].float().repeat_interleave(group, dim=1)
        behind = slots[first_new:, None] - slots[None, :]
        scores = score(torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys), behind)
        visible = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out.flatten(-2)


@_meaning("attention")
def attention(*inputs: Tensor, head_dim: int, scale: float, window: int | None) -> Tensor:
    return _attend(inputs, head_dim, window, lambda products, _: products * scale)


@_meaning("scored_attention")
def scored_attention(
    *inputs: Tensor,
    head_dim: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes: Sequence[float],
) -> Tensor:
    def score(products: Tensor, behind: Tensor) -> Tensor:
        scores = products * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        if slopes:
            scores = scores - torch.tensor(slopes, device=scores.device)[:, None, None] * behind
        return scores

    return _attend(inputs, head_dim, window, score)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}


@_meaning("activation")
def activation(x: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x)


@_meaning("gated_activation")
def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


@_meaning("select_rows")
def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows.long()]


# -- collectives: sums and orders are fixed, so a result does not depend on timing ---------------


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy()


# Up to this many bytes one exchange of everything is faster than two of a share each.
_ONE_EXCHANGE_BYTES = 1 << 16


@_meaning("all_reduce", collective=True)
def all_reduce(context: Context, x: Tensor, *, ranks: int) -> Tensor:
    """Summed in rank order, one precision up, rounded once: a float32 sum over any number of
    ranks is then as exact as float32 can hold."""
    comm = context.tensor_group
    assert comm.size == ranks, "the group is not the graph's"
    if comm.size <= 2 or x.nbytes <= _ONE_EXCHANGE_BYTES:
        parts = torch.empty((comm.size, *x.shape), dtype=x.dtype)
        comm.all_gather(_bytes(x), parts.view(torch.uint8).numpy())
        return _rank_order_sum(parts)
    # Each rank sums one run of the elements for all (a reduce-scatter), then they are gathered.
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % comm.size)).view(comm.size, -1)
    mine = torch.empty_like(padded)
    comm.all_to_all(_bytes(padded), mine.view(torch.uint8).numpy())
    result = torch.empty_like(padded)
    comm.all_gather(_bytes(_rank_order_sum(mine)), result.view(torch.uint8).numpy())
    return result.view(-1)[: len(flat)].view(x.shape)


def _rank_order_sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    wide = torch.float64 if parts.dtype == torch.float32 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


@_meaning("all_gather", collective=True)
def all_gather(context: Context, x: Tensor, *, size: int, ranks: int) -> Tensor:
    comm = context.tensor_group
    assert comm.size == ranks, "the group is not the graph's"
    parts = torch.empty((comm.size, *x.shape), dtype=x.dtype)
    comm.all_gather(_bytes(x), parts.view(torch.uint8).numpy())
    return torch.cat(tuple(parts), dim=-1)[..., :size]


@_meaning("send", collective=True)
def send(context: Context, x: Tensor, *, to: int) -> tuple[Tensor, ...]:
    context.world.send(_bytes(x), to)
    return ()


@_meaning("recv", collective=True)
def recv(context: Context, *, source: int, shape: Sequence[int | str], dtype: str) -> Tensor:
    sizes = [context.sizes[d] if isinstance(d, str) else d for d in shape]
    x = torch.empty(sizes, dtype=DTYPES[dtype])
    context.world.receive(x.view(torch.uint8).numpy(), source)
    return x
