"""Steps with prompts for attention alone: random operands, what plain torch makes of them, and how
far the kernel is off. tests/kernels runs them on an emulated GPU, cuda_prompts.py on a real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attention_cases import row_distance

from llmforge.kernels.attention import Cache, attention
from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.wide_attention import (
    ITEM_INTS,
    AttentionPlan,
    list_items,
    wide_attention,
    wide_attention_plan,
)
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Launch, Tensors, int, int], None]
"""Launches on these tensors, by buffer, for a step of so many sequences and tokens, and waits."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A step of sequences with so many new tokens each, behind `past` ones in the cache."""

    tokens: tuple[int, ...]
    past: tuple[int, ...]
    head_dim: int = 64
    group: int = 4
    kv_heads: int = 2
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    block_size: int = 16
    keys: int | None = None  # of a tile, where not what the kernel chooses itself

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def lens(self) -> tuple[int, ...]:
        return tuple(n + p for n, p in zip(self.tokens, self.past, strict=True))

    @property
    def plan(self) -> AttentionPlan:
        plan = wide_attention_plan(
            self.dtype, self.heads, self.kv_heads, self.head_dim, self.block_size, self.keys
        )
        assert plan is not None, self
        return plan


MIXED = {"tokens": (40, 1, 100, 1, 7), "past": (0, 130, 29, 0, 300)}
PROMPTS = (
    Prompts(**MIXED),
    Prompts((70,), (0,), head_dim=128, group=1, dtype="float16", block_size=32),
    Prompts(**MIXED, head_dim=128, group=8, kv_heads=1, block_size=64),
    Prompts((33, 1, 64), (5, 100, 64), head_dim=80, group=7, kv_heads=1, block_size=128),
    Prompts((50, 1), (200, 77), head_dim=96, group=2, window=60),
    Prompts((3, 70), (250, 60), head_dim=128, window=100, soft_cap=5.0, dtype="float16"),
    Prompts((20, 1), (100, 190), head_dim=256, group=2, soft_cap=30.0, block_size=32),
    Prompts((1,) * 9, tuple(range(0, 270, 30)), head_dim=16, group=16, kv_heads=1, block_size=8),
    Prompts((5, 2), (0, 400), head_dim=48, group=64, kv_heads=1, block_size=256, keys=64),
)


def drawn(case: Prompts, seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The operands of a step: caches of shuffled blocks, in which what was never written is not a
    number, and neither is anything that kernels have to write."""
    torch.manual_seed(seed)
    dtype, count, size = DTYPES[case.dtype], len(case.lens), case.block_size
    needed = [-(-n // size) for n in case.lens]
    order = torch.randperm(sum(needed) + 2, dtype=torch.int32)
    # Where a sequence has no block there is a number that is no block's.
    table = torch.full((count, max(needed) + 1), 1 << 20, dtype=torch.int32)
    shape = 2, len(order), size, case.kv_heads, case.head_dim
    caches = torch.randn(shape, device=device).to(dtype)
    written = torch.zeros(shape[1:3], dtype=torch.bool)
    used = 0
    for s, blocks in enumerate(needed):
        table[s, :blocks] = order[used : used + blocks]
        places = torch.arange(case.lens[s])
        written[table[s, places // size].long(), places % size] = True
        used += blocks
    caches[:, ~written.to(device)] = torch.nan
    tokens, features = sum(case.tokens), case.heads * case.head_dim
    starts = torch.tensor((0, *case.tokens)).cumsum(0)
    items = case.plan.items(tokens, count)
    step = {
        "query_starts": starts.to(torch.int32),
        "kv_lens": torch.tensor(case.lens, dtype=torch.int32),
        "block_table": table,
        "items": torch.full((1 + items, ITEM_INTS), -9, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in step.items()} | {
        "q": torch.randn((tokens, features), device=device).to(dtype),
        "keys": caches[0].clone(),
        "values": caches[1].clone(),
        "out": torch.full((tokens, features), torch.nan, dtype=dtype, device=device),
    }


def launches(case: Prompts, tensors: Tensors, *, wide: bool = True) -> list[Launch]:
    """The step by wide_attention.cu, or by the kernel for all GPUs."""

    def operand(name: str, *dims: str) -> Operand:
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Operand(name, (*dims, *tensor.shape[len(dims) :]), dtype, int(tensor.shape[-1]))

    cache = Cache(
        operand("keys"), operand("values"), operand("query_starts"), operand("kv_lens"),
        operand("block_table"), case.kv_heads, case.head_dim, case.block_size,
        int(tensors["block_table"].shape[1]),
    )  # fmt: skip
    out, q = operand("out", "tokens"), operand("q", "tokens")
    options: dict[str, Any] = {
        "scale": case.head_dim**-0.5, "window": case.window, "soft_cap": case.soft_cap,
    }  # fmt: skip
    if not wide:
        return [attention(out, q, cache, **options)]
    items, plan = operand("items"), case.plan
    most = len(tensors["q"]), len(tensors["keys"])
    return [
        list_items(items, cache, plan, window=case.window),
        wide_attention(out, q, cache, items, plan, *most, **options),
    ]


def expected(case: Prompts, tensors: Tensors) -> torch.Tensor:
    """What attention gives by the ops' meanings, for which k and v are read from the cache."""
    features = case.kv_heads * case.head_dim
    fresh: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    for s, (past, length) in enumerate(zip(case.past, case.lens, strict=True)):
        places = torch.arange(past, length)
        blocks = tensors["block_table"][s, places // case.block_size].long()
        for name, rows in fresh.items():
            rows.append(tensors[name][blocks, places % case.block_size].reshape(-1, features))
    k, v = (torch.cat(rows) for rows in fresh.values())
    keys, values = (tensors[name].clone() for name in ("keys", "values"))
    step = [tensors[name] for name in ("query_starts", "kv_lens", "block_table")]
    attrs = {
        "head_dim": case.head_dim, "scale": case.head_dim**-0.5, "window": case.window,
        "soft_cap": case.soft_cap, "slopes": (),
    }  # fmt: skip
    (out,) = REFERENCE["scored_attention"](
        [tensors["q"], k, v, keys, values, *step, None], attrs, LOCAL
    )
    return out


def compare(case: Prompts, tensors: Tensors, run: Run) -> float:
    """With what was drawn for a case, how far wide_attention.cu is off plain torch."""
    memory = {name: tensor.clone() for name, tensor in tensors.items()}
    for launch in launches(case, memory):
        run(launch, memory, len(case.lens), len(memory["q"]))
    return row_distance(memory["out"], expected(case, tensors), case.head_dim)
