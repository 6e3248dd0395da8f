"""What computes the products of a decode step, and the benchmark that is to choose it."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_models import LIMITS, MODELS, REAL, of_dtype

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.cuda.program import Program
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.kernels.launch import Launch
from llmforge.kernels.rows import RowsTuning
from llmforge.model.decoder import trace
from llmforge.model.reference import LOCAL, REFERENCE
from llmforge.parallel import Topology


def decodes(config: ModelConfig, choice: KernelChoice, arch: str = "sm_90") -> dict[int, Program]:
    """The programs of the decode buckets, by size."""
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    found = programs(graph, LIMITS, arch, choice=choice)
    return {program.shape.tokens: program for program in found if program.shape.decode}


def entries(program: Program) -> Counter[str]:
    calls = [i.call for i in program.instructions]
    names = [c.kernel.entry if isinstance(c, Launch) else type(c).__name__ for c in calls]
    return Counter(names)


@pytest.mark.parametrize("config", REAL, ids=lambda c: f"hidden {c.hidden_size}")
def test_one_row_goes_to_the_kernel_that_is_asked_for(config: ModelConfig) -> None:
    streamed = entries(decodes(config, KernelChoice("stream_gemm"))[1])
    library = 1 if config.intermediate_size == 18944 else 0  # that stream_gemm.cu does not divide
    assert (streamed["stream_gemm"], streamed["Matmul"]) == (5 - library, library)
    assert streamed["gemv"] == 0
    ours = entries(decodes(config, KernelChoice("gemv"))[1])
    assert ours["gemv"] == 5 and ours["stream_gemm"] == ours["Matmul"] == ours["rms_norm"] == 0
    torchs = entries(decodes(config, KernelChoice("torch"))[1])
    assert torchs["Matmul"] == 5 and torchs["gemv"] == torchs["stream_gemm"] == 0


@pytest.mark.parametrize("config", REAL[:2], ids=lambda c: f"hidden {c.hidden_size}")
def test_few_rows_go_to_the_kernel_that_is_asked_for(config: ModelConfig) -> None:
    for size in (2, 4):
        ours = decodes(config, KernelChoice(few_rows="rows_gemm"))[size]
        assert entries(ours)["rows_gemm"] == 5 and entries(ours)["rms_norm"] == 0
        assert entries(ours)["stream_gemm"] == entries(ours)["Matmul"] == 0
        streamed = entries(decodes(config, KernelChoice(few_rows="stream_gemm"))[size])
        assert streamed["stream_gemm"] == 5 and streamed["rows_gemm"] == 0
        assert entries(decodes(config, KernelChoice(few_rows="torch"))[size])["Matmul"] == 5
    for chosen in ("stream_gemm", "rows_gemm", "torch"):
        one = decodes(config, KernelChoice(few_rows=chosen))[1]
        assert one == decodes(config, MEASURED)[1], "one row has its own choice"


def test_more_rows_are_wide_gemms_where_it_is_and_torchs_elsewhere() -> None:
    graph = CudaTarget().prepare(trace(REAL[1], Topology(), 0))
    limits = dataclasses.replace(LIMITS, max_batch_size=320, max_num_tokens=512)
    for arch, kernel in (("sm_90", "wide_gemm"), ("sm_100", "Matmul")):
        found = programs(graph, limits, arch)
        decodes = {p.shape.tokens: entries(p) for p in found if p.shape.decode}
        assert decodes[8]["rows_gemm"] == decodes[24][kernel] == decodes[128][kernel] == 5
        assert decodes[16][kernel] == decodes[192][kernel] == 5
        assert decodes[256][kernel] == (1 if kernel == "wide_gemm" else 5)
        assert decodes[320]["Matmul"] == 5
    prompts = {p.shape.tokens: entries(p) for p in programs(graph, limits, "sm_90")[:2]}
    # The rows that are wanted of a prompt are few: their product is torch's.
    assert prompts[128]["wide_gemm"] == 4 and prompts[128]["Matmul"] == 1
    assert prompts[512]["Matmul"] == 5 and prompts[512]["wide_gemm"] == 0


def test_what_rows_gemm_does_not_take_goes_on() -> None:
    chosen = KernelChoice(few_rows="rows_gemm")
    found = entries(decodes(REAL[2], chosen)[4])  # over 18944 elements for the last of a layer
    assert (found["rows_gemm"], found["Matmul"]) == (4, 1)
    found = entries(decodes(REAL[3], chosen)[4])  # over 6912, which stream_gemm.cu would take
    assert (found["rows_gemm"], found["stream_gemm"]) == (5, 0)
    whole = of_dtype(MODELS["wide"], "float32")
    assert set(entries(decodes(whole, chosen)[4])).isdisjoint({"rows_gemm", "stream_gemm"})


def test_rows_gemm_norms_what_cannot_overflow() -> None:
    chosen = KernelChoice(few_rows="rows_gemm")
    for dtype, separate in (("bfloat16", 0), ("float16", 3)):
        one = dataclasses.replace(MODELS["wide"], num_layers=1, sliding_window=(None,))
        found = entries(decodes(of_dtype(one, dtype), chosen)[4])
        assert (found["rows_gemm"], found["rms_norm"]) == (5, separate)


def test_the_scratch_is_as_large_as_the_product_that_needs_most_of_it() -> None:
    program = decodes(REAL[0], KernelChoice(few_rows="rows_gemm"))[4]
    sums = [
        call.arguments[6].features
        for call in (i.call for i in program.instructions)
        if isinstance(call, Launch) and call.kernel.entry == "rows_gemm"
    ]
    # 4 blocks share the rows of the last product of the layer: features and squares of 8 rows of x
    # for each, float32.
    assert sums == [1, 1, 1, 4 * 4097 * 8, 1]


@pytest.mark.parametrize(
    "choice",
    [MEASURED, KernelChoice("stream_gemm", few_rows="stream_gemm")],
    ids=["measured", "stream_gemm"],
)
def test_gpus_without_bulk_copies_or_room_for_two_rings_multiply_by_torch(
    choice: KernelChoice,
) -> None:
    for arch in ("sm_80", "sm_120"):
        for program in decodes(REAL[1], choice, arch).values():
            assert entries(program)["Matmul"] == 5
            calls = [i.call for i in program.instructions if isinstance(i.call, Launch)]
            assert max(call.shared_bytes for call in calls) < 99 << 10
    for program in decodes(REAL[1], choice, "sm_100").values():
        assert entries(program)["Matmul"] == 0


def test_what_gemv_does_not_take_goes_on() -> None:
    odd = of_dtype(MODELS["odd-sizes"], "bfloat16")
    assert entries(decodes(odd, KernelChoice("gemv"))[1])["gemv"] == 0
    whole = of_dtype(MODELS["wide"], "float32")
    assert set(entries(decodes(whole, KernelChoice("gemv"))[1])).isdisjoint({"gemv", "stream_gemm"})


def test_every_second_product_is_alone() -> None:
    for entry, rows in (("gemv", 1), ("rows_gemm", 4)):
        program = decodes(REAL[0], KernelChoice("gemv", few_rows="rows_gemm"))[rows]
        sizes = [
            call.shared_bytes
            for call in (i.call for i in program.instructions)
            if isinstance(call, Launch) and call.kernel.entry == entry
        ]
        assert [2 * size > 226 << 10 for size in sizes] == [False, True, False, True, False]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path("benchmarks").absolute()), *sys.path])
    import cuda_products

    return cuda_products


@pytest.mark.parametrize("rows", [1, 8])
def test_the_benchmark_has_every_product_by_the_kernel_that_it_names(
    benchmark: ModuleType, rows: int
) -> None:
    study = benchmark.study_of(rows)
    assert study.batches == ((1,) if rows == 1 else (2, 4, 8))
    for name, config in benchmark.MODELS.items():
        for checked in benchmark.checked_configs(config):
            graph = benchmark.prepared(checked)
            for variant, choice in study.variants.items():
                *_, largest = programs(graph, study.limits, "sm_90", choice=choice)
                assert largest.shape.tokens == study.rows
                entry = choice.one_row if study.rows == 1 else choice.few_rows
                found = entries(largest)
                assert found["Matmul" if entry == "torch" else entry] == 5, (name, variant, found)
                if study.checks(choice):
                    launches = list(benchmark.products_of(study, checked, choice, "sm_90"))
                    assert len(launches) == 5
                    assert all(launch.kernel.entry == study.entry for launch in launches)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_benchmark_expects_what_the_ops_mean(benchmark: ModuleType, rows: int) -> None:
    study = benchmark.study_of(rows)
    choice = KernelChoice("gemv", few_rows="rows_gemm", rows=RowsTuning(stages=2))
    config = dataclasses.replace(MODELS["wide-biases"], num_layers=1, sliding_window=(None,))
    torch.manual_seed(1)
    seen = set()
    for launch in benchmark.products_of(study, of_dtype(config, "bfloat16"), choice, "sm_90"):
        tensors = benchmark.random_operands(launch, rows, "cpu")
        out, x, weight, bias, residual, norm = (
            tensors[o.buffer] if o else None for o in launch.arguments[:6]
        )
        if norm is not None:
            (x,) = REFERENCE["rms_norm"]([x, norm], {"eps": config.norm_eps}, LOCAL)
        (want,) = REFERENCE["linear"]([x, weight, bias], {}, LOCAL)
        gated = dict(launch.kernel.defines)["GATED"]
        if gated:
            activation = {"activation": config.activation}
            (want,) = REFERENCE["gated_activation"](want.chunk(2, -1), activation, LOCAL)
        if residual is not None:
            want = want + residual
        got = benchmark.expected(launch, tensors)
        assert got.shape == out.shape and got.dtype == out.dtype
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
        seen.add((norm is not None, bias is not None, residual is not None, bool(gated)))
    assert {(True, True, False, True), (False, True, True, False)} <= seen


def test_the_benchmark_says_that_it_needs_a_gpu(benchmark: ModuleType) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(benchmark.main)
    assert result.exit_code == 1 and "needs an NVIDIA GPU" in result.output
