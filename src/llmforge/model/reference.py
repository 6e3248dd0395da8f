"""What every op means, in plain torch. The cpu target executes these; other targets are
compared with them.

The collectives are in collectives.py. Norms, rotations and softmax compute in float32 and round
once to the dtype of their input, except where a comment says otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.checkpoint.config import RopeConfig
from llmforge.model.collectives import all_gather, all_reduce, recv, send
from llmforge.model.meaning import DTYPES, LOCAL, REFERENCE, Context, Meaning, meaning

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "LOCAL",
    "REFERENCE",
    "Context",
    "Meaning",
    "all_gather",
    "all_reduce",
    "choose_experts",
    "expert_activation",
    "recv",
    "send",
]

Tensor = torch.Tensor


@meaning("embed")
def embed(ids: Tensor, weight: Tensor, *, start: int) -> Tensor:
    local = ids.long() - start
    held = (local >= 0) & (local < weight.shape[0])
    rows: Tensor = F.embedding(local.clamp(0, weight.shape[0] - 1), weight)
    return rows * held[:, None].to(rows.dtype)


@meaning("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@meaning("split")
def split(x: Tensor, *, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(x.split(list(sizes), dim=-1))


@meaning("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    runs: Tensor = x.float().unflatten(-1, (-1, weight.shape[0]))
    normed = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + eps)
    # Rounded before the weight is applied, as the models were trained.
    return (normed.to(x.dtype) * weight).flatten(-2)


@meaning("layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, run: int) -> Tensor:
    normed: Tensor = F.layer_norm(x.float().unflatten(-1, (-1, run)), (run,), eps=eps)
    scaled = normed * weight.float().view(-1, run)
    shifted = scaled if bias is None else scaled + bias.float().view(-1, run)
    return shifted.flatten(-2).to(x.dtype)


@meaning("square_sum")
def square_sum(x: Tensor) -> Tensor:
    return x.float().square().sum(-1, keepdim=True)


@meaning("rms_norm_by")
def rms_norm_by(x: Tensor, square_sum: Tensor, weight: Tensor, *, eps: float, size: int) -> Tensor:
    normed = x.float() * torch.rsqrt(square_sum / size + eps)
    return normed.to(x.dtype) * weight


@meaning("scale")
def scale(x: Tensor, *, factor: float) -> Tensor:
    return x * factor


@meaning("soft_cap")
def soft_cap(x: Tensor, *, cap: float) -> Tensor:
    return (torch.tanh(x.float() / cap) * cap).to(x.dtype)


@meaning("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@meaning("add_rms_norm")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm(total, weight, eps=eps)


@meaning("rope_table")
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


@meaning("rope")
def rope(x: Tensor, table: Tensor, *, head_dim: int) -> Tensor:
    dim = table.shape[-1]
    heads = x.float().unflatten(-1, (-1, head_dim))
    cos, sin = table[:, None].chunk(2, dim=-1)
    first, second = heads[..., : dim // 2], heads[..., dim // 2 : dim]
    rotated = (first * cos - second * sin, second * cos + first * sin, heads[..., dim:])
    return torch.cat(rotated, dim=-1).flatten(-2).to(x.dtype)


Score = Callable[[Tensor, Tensor], Tensor]


def _attend(
    q: Tensor,
    new: Sequence[Tensor],
    caches: Sequence[Tensor],
    step: Sequence[Tensor],
    window: int | None,
    score: Score,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [tokens, heads, size] with the scores ``score(products, behind)``: of the
    products of queries and keys [heads, queries, keys], and how many positions each key is behind
    each query. `new` [tokens, kv heads, size] are written into `caches`; keys are read from the
    first of them, values from the last."""
    query_starts, kv_lens, block_table = step
    block_size = caches[0].shape[1]
    group = q.shape[1] // new[0].shape[1]
    outputs = []
    for sequence, (start, stop) in enumerate(itertools.pairwise(query_starts.tolist())):
        kv_len = int(kv_lens[sequence])
        slots = torch.arange(kv_len, device=q.device)
        blocks = block_table[sequence].long()[slots // block_size]
        offsets = slots % block_size
        first_new = kv_len - (stop - start)
        for cache, values in zip(caches, new, strict=True):
            cache[blocks[first_new:], offsets[first_new:]] = values[start:stop]
        keys, values = (
            cache[blocks, offsets].float().repeat_interleave(group, dim=1)
            for cache in (caches[0], caches[-1])
        )
        behind = slots[first_new:, None] - slots[None, :]
        scores = score(torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys), behind)
        visible = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:  # one more key, whose value is zero
            extra = sinks.float()[:, None, None].expand(-1, stop - start, 1)
            scores, values = torch.cat((scores, extra), -1), F.pad(values, (0, 0, 0, 0, 0, 1))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype))
    return torch.cat(outputs)


@meaning("attention")
def attention(*inputs: Tensor, head_dim: int, scale: float, window: int | None) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in inputs[:3])
    caches, step = inputs[3:5], inputs[5:]
    return _attend(q, (k, v), caches, step, window, lambda p, _: p * scale).flatten(-2)


@meaning("scored_attention")
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

    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in inputs[:3])
    caches, step, sinks = inputs[3:5], inputs[5:8], inputs[8]
    return _attend(q, (k, v), caches, step, window, score, sinks).flatten(-2)


@meaning("latent_attention")
def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    *step: Tensor,
    scale: float,
) -> Tensor:
    rank, dim = latent.shape[-1], k_rope.shape[-1]
    queries = torch.cat((q.unflatten(-1, (-1, rank)), q_rope.unflatten(-1, (-1, dim))), -1)
    keys = torch.cat((latent, k_rope), -1)[:, None]
    out = _attend(queries, (keys,), (cache,), step, None, lambda p, _: p * scale)
    return out[..., :rank].flatten(-2)


@meaning("head_linear")
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    heads, _, in_features = weight.shape
    rows = x.unflatten(-1, (heads, in_features)).transpose(0, 1)
    return torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1).flatten(-2)


@meaning("clamp")
def clamp(x: Tensor, *, limit: float) -> Tensor:
    return x.clamp(-limit, limit)


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


@meaning("activation")
def activation(x: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x)


@meaning("gated_activation")
def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


@meaning("route")
def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, **attrs: Any
) -> tuple[Tensor, Tensor]:
    logits = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return choose_experts(logits, correction, **attrs)


def choose_experts(
    logits: Tensor,
    correction: Tensor | None,
    *,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`route` from its logits [tokens, experts] float32 on."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    choice = scores if correction is None else scores + correction
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        values = grouped.sort(-1, descending=True).values[..., :group_top].sum(-1)
        kept = values.sort(dim=-1, descending=True, stable=True).indices[:, :kept_groups]
        dropped = torch.ones_like(values, dtype=torch.bool).scatter(1, kept, False)
        choice = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.int(), weights * scale


@meaning("experts")
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    first: int,
    activation: str,
    alpha: float,
    limit: float | None,
) -> Tensor:
    total = torch.zeros(x.shape, device=x.device)
    for choice in range(ids.shape[1]):
        for expert in range(len(gate_up)):
            rows = (ids[:, choice] == first + expert).nonzero().flatten()
            biases = (b if b is None else b[expert] for b in (gate_up_bias, down_bias))
            up_bias, out_bias = biases
            both = F.linear(x[rows], gate_up[expert], up_bias)
            activated = expert_activation(both, activation, alpha, limit)
            out = F.linear(activated, down[expert], out_bias)
            total[rows] += weights[rows, choice, None] * out.float()
    return total.to(x.dtype)


def expert_activation(both: Tensor, activation: str, alpha: float, limit: float | None) -> Tensor:
    """What the rows of gate and up [rows, 2 I] of an expert become."""
    gate, up = both.chunk(2, dim=-1)
    if limit is None:
        return ACTIVATIONS[activation](gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


@meaning("token_gate")
def token_gate(x: Tensor, by: Tensor, weight: Tensor) -> Tensor:
    factor = F.linear(by.float(), weight.float()).sigmoid()
    return (x.float() * factor).to(x.dtype)


@meaning("select_rows")
def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows.long()]
