"""decode_attention.cu on an emulated GPU beside its plain-torch meaning, for lengths and shapes
that reach every way of dividing the keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype, steps, tolerance
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu

from llmforge.engine.cuda.state import Products
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.attention import Cache, QkvSteps
from llmforge.kernels.decode_attention import (
    MAX_BLOCKS,
    PartScratch,
    decode_attention,
    decode_plan,
    part_size,
)
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TOLERANCE = {"bfloat16": 1e-2, "float16": 1.5e-3}  # relative to the norm of a row


@dataclasses.dataclass(frozen=True)
class Case:
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
    processors: int = 6

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


def rotation(lens: tuple[int, ...], dim: int) -> torch.Tensor:
    """Cosines and sines of the last position of each sequence."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = (torch.tensor(lens)[:, None] - 1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1).float()


def drawn(case: Case, seed: int) -> Bench:
    """The operands of a step: caches of shuffled blocks, of which unused slots are not numbers."""
    torch.manual_seed(seed)
    bench, dtype = Bench(seed), DTYPES[case.dtype]
    count, size = len(case.lens), case.block_size
    needed = [-(-n // size) for n in case.lens]
    order = torch.randperm(sum(needed) + 2, dtype=torch.int32)
    table = torch.zeros(count, max(needed) + 1, dtype=torch.int32)
    caches = torch.full((2, len(order), size, case.kv_heads, case.head_dim), torch.nan, dtype=dtype)
    used = 0
    for s, blocks in enumerate(needed):
        table[s, :blocks] = order[used : used + blocks]
        for p in range(case.lens[s] - 1):
            caches[:, table[s, p // size], p % size] = torch.randn(2, case.kv_heads, case.head_dim)
        used += blocks
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    dim = case.head_dim if case.rope_dim is None else case.rope_dim
    bench.tensors = {
        "qkv": torch.randn(count, width).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "q_norm": torch.rand(case.head_dim).to(dtype) + 0.5,
        "k_norm": torch.rand(case.head_dim).to(dtype) + 0.5,
        "sinks": torch.randn(case.heads).to(dtype),
        "angles": rotation(case.lens, dim),
        "keys": caches[0].clone(),
        "values": caches[1].clone(),
        "query_starts": torch.arange(count + 1, dtype=torch.int32),
        "kv_lens": torch.tensor(case.lens, dtype=torch.int32),
        "block_table": table,
        "out": torch.full((count, case.heads * case.head_dim), torch.nan, dtype=dtype),
        "partial": torch.full(
            (2 * MAX_BLOCKS, part_size(case.heads, case.kv_heads, case.head_dim)), torch.nan
        ),
        "counters": torch.zeros(MAX_BLOCKS, dtype=torch.int32),
    }
    return bench


def launched(case: Case, bench: Bench) -> None:
    matrix = bench.operand("qkv", "sequences")
    q, k = case.heads * case.head_dim, case.kv_heads * case.head_dim
    cache = Cache(
        bench.operand("keys"), bench.operand("values"), bench.operand("query_starts"),
        bench.operand("kv_lens"), bench.operand("block_table"), case.kv_heads, case.head_dim,
        case.block_size, bench.tensors["block_table"].shape[1],
    )  # fmt: skip
    plan = decode_plan(case.dtype, case.heads, case.kv_heads, case.head_dim, len(case.lens))
    assert plan is not None
    steps = QkvSteps(
        bench.operand("angles", "sequences") if case.rope_dim != 0 else None,
        bench.operand("bias") if case.bias else None,
        bench.operand("q_norm") if case.norm else None,
        bench.operand("k_norm") if case.norm else None,
        1e-5,
    )
    call = decode_attention(
        bench.operand("out", "sequences"),
        matrix.columns(0, q), matrix.columns(q, q + k), matrix.columns(q + k, q + 2 * k), cache,
        PartScratch(bench.operand("partial"), bench.operand("counters")), plan, steps,
        scale=case.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap,
        sinks=bench.operand("sinks") if case.sinks else None,
    )  # fmt: skip
    bench.run(call, sequences=len(case.lens), processors=case.processors)


def expected(case: Case, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Attention's result, and the caches after it, by the ops' meanings."""
    x = tensors["qkv"]
    if case.bias:
        x = x + tensors["bias"]
    q, k, v = x.split([n * case.head_dim for n in (case.heads, case.kv_heads, case.kv_heads)], -1)
    if case.norm:
        (q,) = REFERENCE["rms_norm"]([q, tensors["q_norm"]], {"eps": 1e-5}, LOCAL)
        (k,) = REFERENCE["rms_norm"]([k, tensors["k_norm"]], {"eps": 1e-5}, LOCAL)
    if case.rope_dim != 0:
        attrs = {"head_dim": case.head_dim}
        (q,) = REFERENCE["rope"]([q, tensors["angles"]], attrs, LOCAL)
        (k,) = REFERENCE["rope"]([k, tensors["angles"]], attrs, LOCAL)
    caches = [tensors[name].clone() for name in ("keys", "values")]
    step = [tensors[name] for name in ("query_starts", "kv_lens", "block_table")]
    attrs = {
        "head_dim": case.head_dim, "scale": case.head_dim**-0.5, "window": case.window,
        "soft_cap": case.soft_cap, "slopes": (),
    }  # fmt: skip
    sinks = tensors["sinks"] if case.sinks else None
    (out,) = REFERENCE["scored_attention"]([q, k, v, *caches, *step, sinks], attrs, LOCAL)
    return [out, *caches]


def check(case: Case, seed: int = 0) -> None:
    bench = drawn(case, seed)
    out, keys, values = expected(case, bench.tensors)
    launched(case, bench)
    got = bench.tensors["out"].unflatten(-1, (-1, case.head_dim)).float()
    want = out.unflatten(-1, (-1, case.head_dim)).float()
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(errors.nan_to_num(9).max()) <= TOLERANCE[case.dtype], errors
    for name, wanted in (("keys", keys), ("values", values)):
        torch.testing.assert_close(
            bench.tensors[name], wanted, rtol=1e-2, atol=2e-2, equal_nan=True
        )
    assert not bench.tensors["counters"].any(), "counters are zero again"


RAGGED = (1, 15, 16, 17, 31, 32, 33, 64, 65, 100)


def division(case: Case) -> str:
    """How decode_plan.cuh divides the case's keys."""
    skipped = [max(0, n - case.window) // 16 if case.window else 0 for n in case.lens]
    units = [-(-n // 16) - first for n, first in zip(case.lens, skipped, strict=True)]
    blocks, longest = 2 * case.processors, max(units)

    def cost(candidate: int) -> int:
        quantum = 1 if candidate == 15 else -(-longest // (candidate + 1))
        pieces = case.kv_heads * sum(-(-n // quantum) for n in units)
        share = -(-pieces // blocks) * quantum
        parts = -(-longest // share)
        return 2 * share + (40 + parts if candidate == 15 else 32 + parts if candidate else 0)

    best = min(range(16), key=cost)
    return "uneven" if best == 15 else "parts" if best else "whole pairs"


@pytest.mark.parametrize(
    ("how", "case"),
    [
        ("whole pairs", Case((40,) * 5, processors=1)),
        ("whole pairs", Case(RAGGED, processors=40)),
        ("whole pairs", Case((1,))),
        ("parts", Case((1500,), processors=40, kv_heads=1)),
        ("parts", Case((700, 650), processors=20)),
        ("parts", Case((900, 700, 500, 300), processors=5, kv_heads=1, window=650)),
        ("uneven", Case((3000, 1, 3, 40), processors=6, head_dim=16)),
        ("uneven", Case((800, *RAGGED, 500, 17), processors=3, kv_heads=1)),
        ("uneven", Case((3000, *RAGGED), processors=3, kv_heads=1, head_dim=16, window=2000)),
    ],
    ids=str,
)
def test_keys_are_divided(how: str, case: Case) -> None:
    assert division(case) == how
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, head_dim=128, group=1, kv_heads=3, norm=True, window=20),
        Case(RAGGED, head_dim=128, group=8, dtype="float16", bias=True, block_size=32),
        Case(RAGGED, head_dim=128, group=16, kv_heads=1, processors=2, window=40),
        Case((900, 33, 16), head_dim=80, group=7, kv_heads=1, bias=True, norm=True, processors=9),
        Case((500, 40), head_dim=96, group=2, rope_dim=48, window=100, processors=9),
        Case((40, 700), head_dim=256, group=2, soft_cap=5.0, window=600, processors=9),
        Case((600, 7), group=8, sinks=True, bias=True, dtype="float16", window=128, processors=9),
        Case((400, 7), group=4, sinks=True, processors=30, kv_heads=1),
        Case(RAGGED, head_dim=48, rope_dim=0, block_size=20),
        Case(RAGGED, head_dim=8, group=2, block_size=8),
    ],
    ids=str,
)
def test_shapes(case: Case) -> None:
    check(case)


def test_steps_of_more_sequences_than_a_block_has_threads() -> None:
    lens = tuple(1 + 7 * i % 23 for i in range(150))
    check(Case(lens, head_dim=16, group=2, kv_heads=1, processors=4))


def test_which_shapes_are_taken() -> None:
    plans = [decode_plan("bfloat16", 8 * g, 8, d, 256) for g, d in ((4, 128), (4, 64), (16, 128))]
    assert [(p.warps, p.stages) for p in plans if p] == [(4, 2), (4, 4), (2, 4)]
    assert decode_plan("float32", 32, 8, 128, 1) is None
    assert decode_plan("bfloat16", 32, 8, 132, 1) is None
    assert decode_plan("bfloat16", 34, 2, 64, 1) is None
    assert decode_plan("bfloat16", 32, 2, 256, 1) is None, "joining 16 rows of 256 takes too much"


@pytest.mark.parametrize(
    "name",
    [
        "all-biases",
        pytest.param("scaled-and-capped", marks=pytest.mark.slow),
        pytest.param("head-dim-256", marks=pytest.mark.slow),
        pytest.param("wide", marks=pytest.mark.slow),
    ],
)
def test_steps_of_a_model(name: str) -> None:
    config = of_dtype(MODELS[name], "bfloat16")
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    with emulated_gpu():
        weights = RandomWeights(config, seed=7)
        today, fused = (
            emulated(graph, weights, LIMITS, products=Products(attention=kernel))
            for kernel in ("separate", "fused")
        )
        seen = set()
        for batch in steps(Driver(LIMITS, config.vocab_size, 3, (19, 24, 40)), 3):
            want, got = today.step(batch).logits, fused.step(batch).logits
            assert want is not None and got is not None
            assert float(abs(got - want).max()) <= tolerance(config, want)
            calls = [i.call for i in fused.instructions(batch)]
            names = {call.kernel.entry for call in calls if isinstance(call, Launch)}
            seen.add(frozenset(names & {"qkv", "attention", "decode_attention"}))
        assert frozenset({"decode_attention"}) in seen and len(seen) == 2
