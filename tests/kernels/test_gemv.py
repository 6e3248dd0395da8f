"""Launches of gemv.cu: how rows are divided, what fits a multiprocessor, that it compiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from compiling import compile_all

from llmforge.kernels import compile as compiler
from llmforge.kernels.gemv import GemvTuning, gemv, gemv_plan
from llmforge.kernels.launch import Launch, Operand

MULTIPROCESSOR_BYTES = 228 << 10
SIZES = (64, 1000, 2048, 4096, 8192, 14336, 28672)
TUNINGS = (
    GemvTuning(),
    GemvTuning(warps=4, piece=8192),
    GemvTuning(narrow_stages=4),
    GemvTuning(narrow=0),
    GemvTuning(warps=12, piece=4096, stages=2),
)


def vector(name: str, size: int, dtype: str = "bfloat16") -> Operand:
    return Operand(name, (size,), dtype, size)


def call(
    n: int, k: int, tuning: GemvTuning | None = None, dtype: str = "bfloat16", **options: Any
) -> Launch:
    """A product over k elements that gives n features."""
    halves = 2 if options.get("activation") else 1
    out = Operand("out", ("tokens", n), dtype, n)
    x = Operand("x", ("tokens", k), dtype, k)
    weight = Operand("w", (halves * n, k), dtype, k)
    return gemv(out, x, weight, tuning or GemvTuning(), **options)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("gated", [False, True])
def test_pieces_make_up_a_row_and_rings_with_x_fit(k: int, gated: bool, tuning: GemvTuning) -> None:
    for alone in (False, True):
        plan = gemv_plan("bfloat16", k, tuning, gated=gated, alone=alone)
        assert plan is not None and plan.piece % 512 == 0 and plan.piece <= tuning.piece
        parts = -(-2 * k // plan.piece)
        assert 0 < 2 * k - (parts - 1) * plan.piece <= plan.piece, "the last piece is not empty"
        assert plan.shared_bytes >= tuning.warps * plan.stages * plan.piece + 2 * k


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_a_block_that_is_alone_has_room_for_one_that_is_not_and_for_none_like_it(
    tuning: GemvTuning,
) -> None:
    slots = 8 * tuning.warps * max(tuning.stages, tuning.narrow_stages) + 1024 + 64
    sizes: dict[bool, list[int]] = {}
    for alone in (False, True):
        plans = [
            gemv_plan("bfloat16", k, tuning, gated=gated, alone=alone)
            for k in SIZES
            for gated in (False, True)
        ]
        sizes[alone] = [plan.shared_bytes + slots for plan in plans if plan]
    for one, other in itertools.product(sizes[True], sizes[False]):
        assert one + other <= MULTIPROCESSOR_BYTES
    assert all(2 * one > MULTIPROCESSOR_BYTES for one in sizes[True])


def test_gated_products_of_short_rows_have_longer_rings() -> None:
    tuning = GemvTuning(stages=3, narrow_stages=5, narrow=2048)
    found = [
        plan.stages
        for k, gated in ((2048, True), (2048, False), (2056, True))
        if (plan := gemv_plan("bfloat16", k, tuning, gated=gated))
    ]
    assert found == [5, 3, 3]


def test_what_it_does_not_take() -> None:
    assert gemv_plan("float32", 4096, GemvTuning()) is None
    assert gemv_plan("bfloat16", 4092, GemvTuning()) is None, "rows that do not start at 16 bytes"
    assert gemv_plan("bfloat16", 60000, GemvTuning()) is None, "no room beside x"


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="gated or residual, not both"):
        call(64, 64, activation="silu", residual=vector("r", 64))
    with pytest.raises(ValueError, match="a norm of all of x"):
        call(64, 64, norm_weight=vector("n", 32))
    with pytest.raises(ValueError, match="several dtypes"):
        call(64, 64, bias=vector("b", 64, "float16"))
    with pytest.raises(ValueError, match="pieces of 512 bytes"):
        GemvTuning(piece=1000)
    with pytest.raises(ValueError, match="1 to 16 warps"):
        GemvTuning(warps=17)


@pytest.mark.skipif(compiler.unavailable() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_it_compiles_without_spills(arch: str) -> None:
    norm = {"norm_weight": vector("n", 4096), "eps": 1e-5}
    calls = [call(14336, 4096, tuning, activation="silu", **norm) for tuning in TUNINGS]
    calls += [
        call(4096, 14336, residual=vector("r", 4096), alone=True),
        call(4096, 14336),
        call(50, 1000, bias=vector("b", 50)),
        call(64, 64, None, "float16", activation="gelu"),
    ]
    compiled = compile_all([each.kernel for each in calls], arch)
    assert [result.spill_bytes for result in compiled] == [0] * len(calls)
