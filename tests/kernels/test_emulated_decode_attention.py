"""decode_attention.cu on an emulated GPU beside its plain-torch meaning and the kernels for which
it is, for lengths and shapes that reach every way of dividing the keys."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype, steps, tolerance
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.decode_attention import decode_plan
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attention_cases import (  # noqa: E402
    CASES,
    RAGGED,
    Case,
    compare,
    drawn,
    launches,
    plan_of,
    wrong,
)


def check(case: Case, processors: int, seed: int = 0) -> None:
    def run(launch: Launch, tensors: Any, sequences: int) -> None:
        bench = Bench(seed)
        bench.tensors = tensors
        sizes = {"tokens": sequences, "sequences": sequences, "processors": processors}
        bench.run(launch, **sizes)

    off = compare(case, drawn(case, seed), run)
    assert not wrong(case, off), off


def division(case: Case, processors: int) -> str:
    """How decode_plan.cu divides the case's keys."""
    skipped = [max(0, n - case.window) // 16 if case.window else 0 for n in case.lens]
    units = [-(-n // 16) - first for n, first in zip(case.lens, skipped, strict=True)]
    plan = plan_of(case)
    blocks, longest = plan.blocks * processors, max(units)
    pair, join = plan.pair_cost * plan.warps, plan.join_cost * plan.warps

    def cost(candidate: int) -> int:
        uneven = candidate == 15
        quantum, pad = (1, pair // 2) if uneven else (-(-longest // (candidate + 1)), 0)
        pieces = -(-case.kv_heads * sum(-(-(n + pad) // quantum) for n in units) // blocks)
        share = pieces * quantum
        parts = -(-longest // share)
        joining = join + -(-parts * plan.warps // 4)
        working = pair + join // 2 if uneven else pieces * pair
        return 2 * share + working + (joining if candidate else 0)

    best = min(range(16), key=cost)
    return "uneven" if best == 15 else "parts" if best else "whole pairs"


ALL = (1, 2, 4, 8)
SLOW = pytest.mark.slow  # a kernel for each number of warps, compiled by g++


@pytest.mark.parametrize(
    ("how", "case", "processors", "warps"),
    [
        ("whole pairs", Case((40,) * 5), 1, ALL),
        pytest.param("whole pairs", Case(RAGGED), 40, (2, 4, 8), marks=SLOW),
        pytest.param("whole pairs", Case((1,)), 6, ALL, marks=SLOW),
        ("parts", Case((3000,), kv_heads=1), 40, ALL),
        pytest.param("parts", Case((1700, 1650)), 10, (2, 4, 8), marks=SLOW),
        ("parts", Case((900, 700, 500, 300), kv_heads=1, window=650), 5, (1, 2, 4)),
        ("uneven", Case((1700, 1650)), 10, (1,)),
        pytest.param("uneven", Case((3000, 1, 3, 40), head_dim=16), 6, ALL, marks=SLOW),
        ("uneven", Case((800, *RAGGED, 500, 17), kv_heads=1), 3, (2, 4, 8)),
        pytest.param(
            "uneven",
            Case((3000, *RAGGED), kv_heads=1, head_dim=16, window=2000),
            3,
            (2, 4, 8),
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_keys_are_divided(how: str, case: Case, processors: int, warps: tuple[int, ...]) -> None:
    for each in warps:
        chosen = dataclasses.replace(case, warps=each)
        assert division(chosen, processors) == how, chosen
        check(chosen, processors)


def divided(case: Case, processors: int) -> torch.Tensor:
    """What decode_plan.cu gives each block."""
    bench = Bench()
    bench.tensors = drawn(case, 0)
    launch, _ = launches(case, bench.tensors, fused=True)
    bench.run(launch, sequences=len(case.lens), processors=processors)
    plan = plan_of(case)
    blocks = plan.blocks * processors
    return bench.tensors["division"].flatten()[: blocks * plan.block_ints].view(blocks, -1)


def test_parts_of_pairs_have_a_price() -> None:
    case, processors = Case((3000, 1, 3, 40), head_dim=16, warps=2), 6
    found, plan = divided(case, processors), plan_of(case)
    blocks = len(found)
    sequence, begin, share = found[:, 0], found[:, 2], found[0, 7]
    pad = plan.pair_cost * plan.warps // 2
    places = case.kv_heads * sum(-(-n // 16) + pad for n in case.lens)
    assert share == -(-places // blocks) and set(found[:, 6].tolist()) == {pad}
    lens = torch.tensor(case.lens)[sequence.clamp(min=0)]
    assert ((sequence < 0) | (begin * 16 < lens)).all(), "no block begins behind a pair's keys"
    assert (sequence[:-1] <= sequence[1:]).all() and sequence[-1] == len(case.lens) - 1


def test_more_sequences_than_divide_at_once_lie_one_behind_the_other() -> None:
    """decode_plan.cu has 512 threads, and each lays out a sequence at a time."""
    case = Case(tuple(1 + 29 * i % 90 for i in range(1100)), head_dim=16, kv_heads=2, warps=1)
    found = divided(case, processors=9)
    quantum, pad, share = found[0, 5:8].tolist()
    lengths = [-(-(-(-n // 16) + pad) // quantum) * quantum for n in case.lens]
    pairs = [(s, h) for s, length in enumerate(lengths) for h in range(2) for _ in range(length)]
    for block, (sequence, head, begin, length, left, *_) in enumerate(found.tolist()):
        place = first = block * share
        if not begin:  # a pair begins here, or behind the padding of the one before
            first = next(i for i in range(place, len(pairs)) if pairs[i] != pairs[i - 1])
        assert (sequence, head) == pairs[first] and length == case.lens[sequence]
        assert left == share - (first - place)


@pytest.mark.parametrize("warps", [1, None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case: Case, warps: int | None) -> None:
    check(dataclasses.replace(case, warps=warps), processors=9)


def test_steps_of_more_sequences_than_a_block_has_threads() -> None:
    lens = tuple(1 + 7 * i % 23 for i in range(150))
    check(Case(lens, head_dim=16, group=2, kv_heads=1), processors=4)


def test_which_shapes_are_taken() -> None:
    room = 227 << 10
    plans = [
        decode_plan("bfloat16", 8 * g, 8, d, d, 256, room=room)
        for g, d in ((4, 128), (4, 64), (16, 128), (2, 256))
    ]
    found = [(p.warps, p.blocks, p.stages) for p in plans if p]
    assert found == [(1, 8, 4), (1, 8, 8), (1, 4, 8), (1, 4, 4)]
    assert decode_plan("float32", 32, 8, 128, 128, 1) is None
    assert decode_plan("bfloat16", 32, 8, 132, 132, 1) is None
    assert decode_plan("bfloat16", 32, 8, 64, 30, 1) is None, "angles are loaded four at once"
    assert decode_plan("bfloat16", 34, 2, 64, 64, 1) is None
    assert decode_plan("bfloat16", 32, 8, 128, 128, 6144) is None, "their lengths are in no memory"
    assert decode_plan("bfloat16", 32, 8, 128, 128, 1, room=40 << 10) is None, "40 KB are too few"


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "warps", "blocks"),
    [(1, 8, 8, 1), (16, 8, 8, 1), (24, 8, 4, 2), (32, 8, 4, 2), (48, 8, 2, 4), (64, 8, 2, 4),
     (96, 8, 1, 8), (256, 8, 1, 8), (96, 1, 8, 1), (256, 1, 4, 2)],
)  # fmt: skip
def test_a_block_has_about_one_pair(sequences: int, kv_heads: int, warps: int, blocks: int) -> None:
    shape = 4 * kv_heads, kv_heads, 128, 128
    plan = decode_plan("bfloat16", *shape, sequences, room=227 << 10)
    assert plan is not None and (plan.warps, plan.blocks) == (warps, blocks)
    least = decode_plan("bfloat16", *shape, sequences)
    assert least is not None and least.warps * least.blocks == 4
    assert plan.stages == (2 if warps == 8 else 4), "few leave room for the products around them"


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
            emulated(graph, weights, LIMITS, choice=KernelChoice(attention=kernel))
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
