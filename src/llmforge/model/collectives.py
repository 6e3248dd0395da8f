"""What the collective ops mean. Sums and orders are fixed, so that a result does not depend on
timing. They are part of the table in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.model.meaning import DTYPES, Context, meaning

Tensor = torch.Tensor


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy()


# Up to this many bytes one exchange of everything is faster than two of a share each.
_ONE_EXCHANGE_BYTES = 1 << 16


@meaning("all_reduce", collective=True)
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


@meaning("all_gather", collective=True)
def all_gather(context: Context, x: Tensor, *, size: int, ranks: int) -> Tensor:
    comm = context.tensor_group
    assert comm.size == ranks, "the group is not the graph's"
    parts = torch.empty((comm.size, *x.shape), dtype=x.dtype)
    comm.all_gather(_bytes(x), parts.view(torch.uint8).numpy())
    return torch.cat(tuple(parts), dim=-1)[..., :size]


@meaning("send", collective=True)
def send(context: Context, x: Tensor, *, to: int) -> tuple[Tensor, ...]:
    context.world.send(_bytes(x), to)
    return ()


@meaning("recv", collective=True)
def recv(context: Context, *, source: int, shape: Sequence[int | str], dtype: str) -> Tensor:
    sizes = [context.sizes[d] if isinstance(d, str) else d for d in shape]
    x = torch.empty(sizes, dtype=DTYPES[dtype])
    context.world.receive(x.view(torch.uint8).numpy(), source)
    return x
