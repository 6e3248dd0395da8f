"""Launches of rows_gemm.cu: how products are divided, what fits a GPU, that it compiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from compiling import compile_all

from llmforge.kernels import compile as compiler
from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.rows import RowsTuning, rows_gemm, rows_plan
from llmforge.kernels.stream import StreamScratch

MULTIPROCESSOR_BYTES = 228 << 10
SIZES = (512, 768, 2048, 2560, 3584, 4096, 5120, 8192, 12288, 14336, 28672)
TUNINGS = (
    RowsTuning(),
    RowsTuning(piece=256, stages=6),
    RowsTuning(stages=2),
    RowsTuning(warps=4, piece=1024),
    RowsTuning(warps=4, stages=6),
)
SCRATCH = StreamScratch(Operand("p", (1,), "float32", 1), Operand("c", (1,), "int32", 1))


def vector(name: str, size: int, dtype: str = "bfloat16") -> Operand:
    return Operand(name, (size,), dtype, size)


def call(
    n: int, k: int, tuning: RowsTuning | None = None, dtype: str = "bfloat16", **options: Any
) -> Launch:
    """A product over k elements that gives n features."""
    halves = 2 if options.get("activation") else 1
    out = Operand("out", ("tokens", n), dtype, n)
    x = Operand("x", ("tokens", k), dtype, k)
    weight = Operand("w", (halves * n, k), dtype, k)
    return rows_gemm(out, x, weight, SCRATCH, tuning or RowsTuning(), **options)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("k", SIZES)
def test_warps_share_k_evenly_and_rings_fit(k: int, tuning: RowsTuning) -> None:
    for alone in (False, True):
        plan = rows_plan("bfloat16", k, tuning, alone=alone)
        if plan is None:
            assert k == 768 and tuning.warps == 8
            continue
        row, rest = divmod(2 * k, plan.split * tuning.warps)
        assert rest == 0 and row % 128 == 0 and row * tuning.warps <= 2 * 4096
        assert 0 < plan.piece <= tuning.piece and plan.piece % 128 == 0
        assert row > (-(-row // plan.piece) - 1) * plan.piece, "the last piece is not empty"
        assert plan.area >= max(row, 4 * 256)
        rings = tuning.stages * 8 * (plan.piece + 16)
        assert plan.shared_bytes >= tuning.warps * (rings + plan.area)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_a_block_that_is_alone_has_room_for_one_that_is_not_and_for_none_like_it(
    tuning: RowsTuning,
) -> None:
    others = 8 * tuning.warps * tuning.stages + 32 * tuning.warps + 1024
    sizes: dict[bool, list[int]] = {}
    for alone in (False, True):
        plans = [rows_plan("bfloat16", k, tuning, alone=alone) for k in SIZES]
        sizes[alone] = [plan.shared_bytes + others for plan in plans if plan]
    for one, other in itertools.product(sizes[True], sizes[False]):
        assert one + other <= MULTIPROCESSOR_BYTES
    assert all(2 * one > MULTIPROCESSOR_BYTES for one in sizes[True])


def test_few_blocks_share_the_rows_of_real_models() -> None:
    plans = {k: rows_plan("bfloat16", k, RowsTuning()) for k in SIZES}
    found = {k: (plan.split, plan.piece) for k, plan in plans.items() if plan}
    assert found[2048] == (1, 512) and found[4096] == (1, 512) and found[3584] == (1, 512)
    assert found[8192] == (2, 512) and found[14336] == (4, 512) and found[28672] == (7, 512)


def test_reads_of_weights_have_no_bank_conflicts() -> None:
    """A load of 16 bytes a lane takes the lanes in eights; their 128 bytes are all banks once."""
    for tuning in TUNINGS:
        plan = rows_plan("bfloat16", 4096, tuning)
        assert plan is not None
        for first, half in itertools.product(range(0, 32, 8), (0, 16)):
            lanes = range(first, first + 8)
            places = [lane // 4 * (plan.piece + 16) + lane % 4 * 32 + half for lane in lanes]
            assert sorted(place % 128 for place in places) == list(range(0, 128, 16))


def test_what_it_does_not_take() -> None:
    assert rows_plan("float32", 4096, RowsTuning()) is None
    assert rows_plan("bfloat16", 4100, RowsTuning()) is None
    assert rows_plan("bfloat16", 18944, RowsTuning()) is None, "37 parts of 512"
    assert rows_plan("bfloat16", 4096, RowsTuning(stages=16)) is None, "no room"
    assert rows_plan("bfloat16", 65536, RowsTuning()) is None, "more blocks than may share a row"


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="gated or residual, not both"):
        call(64, 512, activation="silu", residual=vector("r", 64))
    with pytest.raises(ValueError, match="a norm needs all of k"):
        call(64, 8192, norm_weight=vector("n", 8192))
    with pytest.raises(ValueError, match="several dtypes"):
        call(64, 512, bias=vector("b", 64, "float16"))
    with pytest.raises(ValueError, match="pieces of 128 bytes"):
        RowsTuning(piece=1000)
    with pytest.raises(ValueError, match="4 or 8 warps"):
        RowsTuning(warps=16)


@pytest.mark.skipif(compiler.unavailable() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_it_compiles_without_spills(arch: str) -> None:
    norm = {"norm_weight": vector("n", 4096), "eps": 1e-5}
    calls = [call(14336, 4096, tuning, activation="silu", **norm) for tuning in TUNINGS]
    calls += [
        call(4096, 14336, residual=vector("r", 4096), alone=True),
        call(6144, 4096, RowsTuning(early=False, release="with copies"), **norm),
        call(4096, 4096, RowsTuning(release="with x"), bias=vector("b", 4096)),
        call(14336, 14336, dtype="float16", activation="gelu", bias=vector("b", 28672, "float16")),
    ]
    compiled = compile_all([each.kernel for each in calls], arch)
    assert [result.spill_bytes for result in compiled] == [0] * len(calls)
