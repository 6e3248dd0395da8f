"""Decode steps for attention alone: random operands, what plain torch makes of them, and how far
the kernels are off. tests/kernels runs them on an emulated GPU, cuda_attention.py on a real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmforge.kernels.attention import Cache, QkvSteps, SplitScratch, attention, qkv
from llmforge.kernels.decode_attention import (
    MAX_BLOCKS,
    DecodePlan,
    DecodeTuning,
    PartScratch,
    decode_attention,
    decode_plan,
    divide_keys,
    part_size,
)
from llmforge.kernels.launch import Launch, Operand
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Launch, Tensors, int], None]
"""Launches on these tensors, by buffer, for a step of so many sequences, and waits."""

TOLERANCE = {"bfloat16": 1e-2, "float16": 1.5e-3}  # relative to the norm of a head's row
EPS = 1e-5
_DIVISION_INTS = 16  # that a block has at most
_SPLITS = 4  # of today's kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of sequences of these lengths, the new token included."""

    lens: tuple[int, ...]
    head_dim: int = 64
    group: int = 4
    kv_heads: int = 2
    dtype: str = "bfloat16"
    rope_dim: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    bias: bool = False
    norm: bool = False
    block_size: int = 16
    warps: int | None = None  # of decode_attention.cu's blocks, where not what it chooses itself
    room: int = 227 << 10  # shared memory of a multiprocessor

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def angles(self) -> int:
        """Elements of a head that are rotated."""
        return self.head_dim if self.rope_dim is None else self.rope_dim


RAGGED = (1, 15, 16, 17, 31, 32, 33, 64, 65, 100)
CASES = (
    Case(RAGGED),
    Case(RAGGED, head_dim=128, group=1, kv_heads=3, norm=True, window=20),
    Case(RAGGED, head_dim=128, group=8, dtype="float16", bias=True, block_size=32),
    Case(RAGGED, head_dim=128, group=16, kv_heads=1, window=40),
    Case((900, 33, 16), head_dim=80, group=7, kv_heads=1, bias=True, norm=True),
    Case((500, 40), head_dim=96, group=2, rope_dim=48, window=100),
    Case((40, 700), head_dim=256, group=2, soft_cap=5.0, window=600),
    Case((600, 7), group=8, sinks=True, bias=True, dtype="float16", window=128),
    Case((400, 7), sinks=True, kv_heads=1),
    Case(RAGGED, head_dim=48, rope_dim=0, block_size=20),
    Case(RAGGED, head_dim=8, group=2, block_size=8),
    Case(RAGGED, head_dim=128, kv_heads=8, bias=True, norm=True, block_size=32),
    Case(RAGGED, head_dim=128, kv_heads=8, bias=True, norm=True, block_size=32, warps=1),
    Case((*RAGGED, 900), head_dim=128, kv_heads=8, block_size=32, warps=2),
    Case((900, *RAGGED), head_dim=128, group=7, dtype="float16", block_size=32, warps=4),
)


def _angles(lens: tuple[int, ...], dim: int) -> torch.Tensor:
    """Cosines and sines of the last position of each sequence."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / max(dim, 1))
    angles = (torch.tensor(lens)[:, None] - 1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1).float()


def drawn(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """The operands of a step: caches of shuffled blocks, in which what was never written is not a
    number, and neither is anything that kernels have to write."""
    torch.manual_seed(seed)
    dtype, count, size = DTYPES[case.dtype], len(case.lens), case.block_size
    needed = [-(-n // size) for n in case.lens]
    order = torch.randperm(sum(needed) + 2, dtype=torch.int32)
    table = torch.zeros(count, max(needed) + 1, dtype=torch.int32)
    caches = torch.full((2, len(order), size, case.kv_heads, case.head_dim), torch.nan, dtype=dtype)
    used = 0
    for s, blocks in enumerate(needed):
        table[s, :blocks] = order[used : used + blocks]
        places = torch.arange(case.lens[s] - 1)
        rows = torch.randn(2, len(places), case.kv_heads, case.head_dim).to(dtype)
        caches[:, table[s, places // size].long(), places % size] = rows
        used += blocks
    features, kv_features = case.heads * case.head_dim, case.kv_heads * case.head_dim
    width = features + 2 * kv_features
    parts = 2 * MAX_BLOCKS, part_size(case.heads, case.kv_heads, case.head_dim)
    return {
        "qkv": torch.randn(count, width).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "q_norm": torch.rand(case.head_dim).to(dtype) + 0.5,
        "k_norm": torch.rand(case.head_dim).to(dtype) + 0.5,
        "sinks": torch.randn(case.heads).to(dtype),
        "angles": _angles(case.lens, case.angles),
        "keys": caches[0].clone(),
        "values": caches[1].clone(),
        "query_starts": torch.arange(count + 1, dtype=torch.int32),
        "positions": torch.tensor(case.lens, dtype=torch.int32) - 1,
        "kv_lens": torch.tensor(case.lens, dtype=torch.int32),
        "block_table": table,
        "rotated": torch.full((count, features), torch.nan, dtype=dtype),
        "out": torch.full((count, features), torch.nan, dtype=dtype),
        "partial": torch.full(parts, torch.nan),
        "division": torch.full((MAX_BLOCKS, _DIVISION_INTS), -9, dtype=torch.int32),
        "splits": torch.full((count * case.heads * _SPLITS * (case.head_dim + 2),), torch.nan),
        "counters": torch.zeros(max(MAX_BLOCKS, count * case.heads), dtype=torch.int32),
    }


def _operand(tensors: Tensors, name: str, *dims: str) -> Operand:
    tensor = tensors[name]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Operand(name, (*dims, *tensor.shape[len(dims) :]), dtype, int(tensor.shape[-1]))


def plan_of(case: Case) -> DecodePlan:
    shape = case.heads, case.kv_heads, case.head_dim, case.angles
    tuning = DecodeTuning(warps=case.warps)
    plan = decode_plan(case.dtype, *shape, len(case.lens), tuning, case.room)
    assert plan is not None, case
    return plan


def launches(case: Case, tensors: Tensors, *, fused: bool) -> list[Launch]:
    """The step by decode_attention.cu, or by the kernels for which it is."""

    def operand(name: str, *dims: str) -> Operand:
        return _operand(tensors, name, *dims)

    cache = Cache(
        operand("keys"), operand("values"), operand("query_starts"), operand("kv_lens"),
        operand("block_table"), case.kv_heads, case.head_dim, case.block_size,
        int(tensors["block_table"].shape[1]),
    )  # fmt: skip
    steps = QkvSteps(
        operand("angles", "sequences") if case.angles else None,
        operand("bias") if case.bias else None,
        operand("q_norm") if case.norm else None,
        operand("k_norm") if case.norm else None,
        EPS,
    )
    matrix, out = operand("qkv", "tokens"), operand("out", "tokens")
    q, k = case.heads * case.head_dim, case.kv_heads * case.head_dim
    inputs = matrix.columns(0, q), matrix.columns(q, q + k), matrix.columns(q + k, q + 2 * k)
    counters = operand("counters")
    options: dict[str, Any] = {
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sinks": operand("sinks") if case.sinks else None,
    }
    if fused:
        plan = plan_of(case)
        ints = plan.block_ints
        division = Operand("division", (MAX_BLOCKS, ints), "int32", ints)
        scratch = PartScratch(operand("partial"), counters)
        return [
            divide_keys(division, cache, plan, window=case.window),
            decode_attention(out, *inputs, cache, division, scratch, plan, steps, **options),
        ]
    rotated = operand("rotated", "tokens")
    split = SplitScratch(operand("splits"), counters, _SPLITS)
    return [
        qkv(rotated, *inputs, cache, operand("positions"), steps),
        attention(out, rotated, cache, split=split, **options),
    ]


def expected(case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Attention's result, and the caches after it, by the ops' meanings."""
    x = tensors["qkv"]
    if case.bias:
        x = x + tensors["bias"]
    q, k, v = x.split([n * case.head_dim for n in (case.heads, case.kv_heads, case.kv_heads)], -1)
    if case.norm:
        (q,) = REFERENCE["rms_norm"]([q, tensors["q_norm"]], {"eps": EPS}, LOCAL)
        (k,) = REFERENCE["rms_norm"]([k, tensors["k_norm"]], {"eps": EPS}, LOCAL)
    if case.angles:
        attrs = {"head_dim": case.head_dim}
        (q,) = REFERENCE["rope"]([q, tensors["angles"]], attrs, LOCAL)
        (k,) = REFERENCE["rope"]([k, tensors["angles"]], attrs, LOCAL)
    keys, values = (tensors[name].clone() for name in ("keys", "values"))
    step = [tensors[name] for name in ("query_starts", "kv_lens", "block_table")]
    attrs = {
        "head_dim": case.head_dim, "scale": case.head_dim**-0.5, "window": case.window,
        "soft_cap": case.soft_cap, "slopes": (),
    }  # fmt: skip
    sinks = tensors["sinks"] if case.sinks else None
    (out,) = REFERENCE["scored_attention"]([q, k, v, keys, values, *step, sinks], attrs, LOCAL)
    return {"out": out, "keys": keys, "values": values}


def row_distance(got: torch.Tensor, want: torch.Tensor, head_dim: int) -> float:
    """The largest distance of a head's row, relative to its norm; infinite where either is NaN."""
    rows = (got.unflatten(-1, (-1, head_dim)).float(), want.unflatten(-1, (-1, head_dim)).float())
    off = (rows[0] - rows[1]).norm(dim=-1) / rows[1].norm(dim=-1)
    return float(off.nan_to_num(torch.inf).max())


def compare(case: Case, tensors: Tensors, run: Run) -> dict[str, float]:
    """With what was drawn for a case, how far decode_attention.cu is off: of plain torch ("out"),
    of the kernels for which it is ("others"), and with what it writes into the caches of plain
    torch ("cache"); "counters": those that are not zero again."""
    want = expected(case, tensors)
    results = {}
    for fused in (False, True):
        memory = {name: tensor.clone() for name, tensor in tensors.items()}
        for launch in launches(case, memory, fused=fused):
            run(launch, memory, len(case.lens))
        results[fused] = memory
    got = results[True]
    written = [(got[n].nan_to_num(), want[n].nan_to_num()) for n in ("keys", "values")]
    cache = max(float((a - b).abs().max() / b.abs().max()) for a, b in written)
    left_alone = all(torch.equal(got[n].isnan(), want[n].isnan()) for n in ("keys", "values"))
    return {
        "out": row_distance(got["out"], want["out"], case.head_dim),
        "others": row_distance(got["out"], results[False]["out"], case.head_dim),
        "cache": cache if left_alone else torch.inf,
        "counters": float(got["counters"].count_nonzero()),
    }


def wrong(case: Case, off: Mapping[str, float]) -> bool:
    """Whether what `compare` found is more than rounding."""
    return not all(off[name] <= TOLERANCE[case.dtype] for name in ("out", "others", "cache")) or (
        off["counters"] > 0
    )
