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
    RowsTuning(stages=2),
    RowsTuning(piece=4096),
    RowsTuning(piece=1024, stages=6),
    RowsTuning(piece=512, stages=8),
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
        assert plan is not None
        columns, rest = divmod(k, plan.split)
        assert rest == 0 and columns % 256 == 0 and columns <= 4096
        assert 0 < plan.piece <= min(tuning.piece, 2 * columns) and plan.piece % 512 == 0
        ring = tuning.stages * 8 * (plan.piece + 64)
        assert plan.shared_bytes >= ring + max(8 * 256, 2 * columns)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_a_block_that_is_alone_has_room_for_one_that_is_not_and_for_none_like_it(
    tuning: RowsTuning,
) -> None:
    others = 8 * tuning.stages + 8 * 32 + 64 + 1024
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
    assert found[512] == (1, 1024) and found[2048] == found[4096] == found[3584] == (1, 2048)
    assert found[8192] == (2, 2048) and found[14336] == (4, 2048) and found[28672] == (7, 2048)


def test_reads_of_weights_have_no_bank_conflicts() -> None:
    """A load of 16 bytes a lane takes the lanes in eights; their 128 bytes are all banks once."""
    for tuning in TUNINGS:
        plan = rows_plan("bfloat16", 4096, tuning)
        assert plan is not None
        for first, half in itertools.product(range(0, 32, 8), (0, 64)):
            lanes = range(first, first + 8)
            places = [lane // 4 * (plan.piece + 64) + lane % 4 * 16 + half for lane in lanes]
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
    with pytest.raises(ValueError, match="a norm of bfloat16"):
        call(64, 512, dtype="float16", norm_weight=vector("n", 512, "float16"))
    with pytest.raises(ValueError, match="a norm of all of x"):
        call(64, 512, norm_weight=vector("n", 256))
    with pytest.raises(ValueError, match="several dtypes"):
        call(64, 512, bias=vector("b", 64, "float16"))
    with pytest.raises(ValueError, match="pieces of 512 bytes"):
        RowsTuning(piece=1000)
    with pytest.raises(ValueError, match="1 to 16 stages"):
        RowsTuning(stages=17)


@pytest.mark.skipif(compiler.unavailable() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])  # no others have room for its blocks
def test_it_compiles_without_spills(arch: str) -> None:
    norm = {"norm_weight": vector("n", 4096), "eps": 1e-5}
    calls = [call(14336, 4096, tuning, activation="silu", **norm) for tuning in TUNINGS]
    calls += [
        call(4096, 14336, residual=vector("r", 4096), alone=True),
        call(6144, 8192, norm_weight=vector("n", 8192), eps=1e-5),
        call(4096, 4096, bias=vector("b", 4096)),
        call(14336, 14336, dtype="float16", activation="gelu", bias=vector("b", 28672, "float16")),
    ]
    compiled = compile_all([each.kernel for each in calls], arch)
    assert [result.spill_bytes for result in compiled] == [0] * len(calls)
