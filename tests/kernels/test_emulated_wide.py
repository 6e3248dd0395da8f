"""wide_gemm.cu on an emulated GPU beside the ops' plain-torch meaning."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu
from op_meanings import check_instructions
from product_meanings import check_twice, guarded, meaning, random_operands

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.launch import Launch
from llmforge.kernels.stream import StreamScratch
from llmforge.kernels.wide import WidePlan, wide_gemm, wide_plan
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def check(
    rows: int,
    features: int,
    k: int,
    plan: WidePlan,
    dtype: str = "bfloat16",
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    seed: int = 0,
) -> None:
    """Compare a product of `rows` rows that gives `features` features of k elements, twice."""
    torch.manual_seed(features + k + rows + seed)
    bench = Bench(seed)
    gated = activation is not None
    bench.tensors.update(random_operands(rows, features, k, dtype, gated=gated))
    # Rows of very different size: what of one comes into another shows.
    bench.tensors["x"] *= 0.1 ** torch.arange(rows).fmod(3).view(-1, 1).to(DTYPES[dtype])
    floats = plan.scratch_floats(len(bench.tensors["weight"]))
    guarded(bench, rows, features, floats, 1024)
    launch = wide_gemm(
        bench.operand("out", "tokens"),
        bench.operand("x", "tokens"),
        bench.operand("weight"),
        StreamScratch(bench.operand("partial"), bench.operand("counters")),
        plan,
        rows,
        bias=bench.operand("bias") if bias else None,
        residual=bench.operand("residual", "tokens") if residual else None,
        activation=activation,
    )
    want = meaning(bench.tensors, False, bias, residual, activation).float()
    check_twice(bench, launch, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [33, 64])
@pytest.mark.parametrize(
    "fused",
    [
        {},
        {"bias": True, "residual": True},
        {"activation": "silu"},
        {"activation": "gelu_tanh", "bias": True},
    ],
    ids=str,
)
def test_what_is_fused(dtype: str, rows: int, fused: dict[str, object]) -> None:
    check(rows, 40, 256, WidePlan(64, 32), dtype, **fused)


@pytest.mark.parametrize("rows", [20, 65, 100, 128, 192])
def test_warpgroups_have_64_rows_each(rows: int) -> None:
    check(rows, 48, 192, WidePlan(-(-rows // 8) * 8, 48), residual=True)


@pytest.mark.parametrize("features", [4, 32, 36, 32 * 9 + 4])
def test_blocks_compute_several_tiles(features: int) -> None:
    for seed in range(2):
        check(33, features, 512, WidePlan(64, 32, blocks=4), bias=True, residual=True, seed=seed)
        check(33, features, 128, WidePlan(64, 32, blocks=4), activation="silu", seed=seed)


@pytest.mark.parametrize("split", [2, 3, 8])
def test_blocks_share_k(split: int) -> None:
    for seed in range(2):  # the blocks run in either order
        check(40, 52, 64 * 24, WidePlan(64, 32, split), bias=True, residual=True, seed=seed)
        check(40, 52, 64 * 24, WidePlan(64, 32, split), activation="silu", seed=seed)
        check(40, 52, 64 * 24, WidePlan(64, 32, split, blocks=2), "float16", seed=seed)


@pytest.mark.parametrize("columns", [16, 80, 160, 256])
def test_tiles(columns: int) -> None:
    check(64, 3 * columns, 1280, WidePlan(64, columns))
    if columns % 32 == 0:
        check(37, 2 * columns, 1280, WidePlan(64, columns), activation="silu")


def test_plans_of_a_real_model() -> None:
    def plan(rows: int, features: int, k: int, **options: bool) -> tuple[int, int]:
        found = wide_plan("bfloat16", rows, features, k, **options)
        assert found is not None and found.stages >= 4
        return found.columns, found.split

    assert plan(128, 28672, 4096, gated=True) == (224, 1)
    assert plan(64, 4096, 14336) == (64, 2)
    assert plan(128, 128256, 4096) == (256, 1)
    assert wide_plan("float32", 64, 64, 64) is None
    assert wide_plan("bfloat16", 64, 66, 64) is None
    assert wide_plan("bfloat16", 64, 64, 96) is None
    assert wide_plan("bfloat16", 129, 64, 64) is None


@pytest.mark.parametrize("name", ["wide", pytest.param("wide-biases", marks=pytest.mark.slow)])
def test_every_instruction_of_a_step_of_many_tokens(name: str) -> None:
    config = dataclasses.replace(
        of_dtype(MODELS[name], "bfloat16"), num_layers=1, sliding_window=(None,)
    )
    limits = dataclasses.replace(LIMITS, max_batch_size=40, max_num_tokens=64, num_blocks=400)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    weights = RandomWeights(config, seed=5)
    with emulated_gpu():
        cuda = emulated(graph, weights, limits, choice=KernelChoice(many_rows="wide_gemm"))
        batch = Driver(limits, config.vocab_size, 3, (1,) * 36).batch([1] * 36)
        kernels = [i.call.kernel for i in cuda.instructions(batch) if isinstance(i.call, Launch)]
        assert [kernel.entry for kernel in kernels].count("wide_gemm") == 5
        check_instructions(cuda, batch)


def test_every_instruction_of_a_short_prompt_where_long_ones_fit() -> None:
    config = dataclasses.replace(
        of_dtype(MODELS["wide"], "bfloat16"), num_layers=1, sliding_window=(None,)
    )
    limits = dataclasses.replace(LIMITS, max_num_tokens=200)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    weights = RandomWeights(config, seed=5)
    with emulated_gpu():
        cuda = emulated(graph, weights, limits, choice=KernelChoice(many_rows="wide_gemm"))
        batch = Driver(limits, config.vocab_size, 3, (70, 30)).batch([41, 30])
        kernels = [i.call.kernel for i in cuda.instructions(batch) if isinstance(i.call, Launch)]
        assert [kernel.entry for kernel in kernels].count("wide_gemm") == 4
        check_instructions(cuda, batch)
