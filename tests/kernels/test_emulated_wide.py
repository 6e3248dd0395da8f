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
from product_meanings import EPS, check_twice, guarded, meaning, random_operands

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.launch import Launch
from llmforge.kernels.stream import StreamScratch
from llmforge.kernels.wide import (
    InputNorm,
    NextNorm,
    WidePlan,
    squares_shape,
    wide_gemm,
    wide_plan,
)
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
    norm_tiles: int = 0,
    weighs: bool = False,
    seed: int = 0,
) -> None:
    """Compare a product of `rows` rows that gives `features` features of k elements, twice.
    norm_tiles: of x there is what a product of so many tiles leaves."""
    torch.manual_seed(features + k + rows + seed)
    bench = Bench(seed)
    gated = activation is not None
    bench.tensors.update(random_operands(rows, features, k, dtype, gated=gated))
    # Rows of very different size: what of one comes into another shows.
    bench.tensors["x"] *= 0.1 ** torch.arange(rows).fmod(3).view(-1, 1).to(DTYPES[dtype])
    if norm_tiles:
        weigh_x(bench, plan, norm_tiles)
    if weighs:
        tensors = bench.tensors
        tensors["next"] = torch.randn(features).to(torch.bfloat16)
        tensors["weighed"] = torch.full((rows, features), torch.nan, dtype=torch.bfloat16)
        tensors["squares"] = torch.full(squares_shape(plan, features), torch.nan)
    floats = plan.scratch_floats(len(bench.tensors["weight"]))
    guarded(bench, rows, features, floats, 1024)
    launch = wide_gemm(
        bench.operand("out", "tokens"),
        bench.operand("weighed x" if norm_tiles else "x", "tokens"),
        bench.operand("weight"),
        StreamScratch(bench.operand("partial"), bench.operand("counters")),
        plan,
        rows,
        bias=bench.operand("bias") if bias else None,
        residual=bench.operand("residual", "tokens") if residual else None,
        activation=activation,
        norm=InputNorm(bench.operand("squares of x"), EPS) if norm_tiles else None,
        next_norm=NextNorm(
            bench.operand("next"), bench.operand("weighed", "tokens"), bench.operand("squares")
        )
        if weighs
        else None,
    )
    norm = norm_tiles > 0
    want = meaning(bench.tensors, norm, bias, residual, activation, divides_sums=norm).float()
    check_twice(bench, launch, want)
    if weighs:
        check_left(bench, plan)


def weigh_x(bench: Bench, plan: WidePlan, tiles: int) -> None:
    """What the product before leaves of its norm; in rows behind those of x anything."""
    x = bench.tensors["x"]
    bench.tensors["weighed x"] = x * bench.tensors["norm"]
    squares = torch.full((tiles, plan.groups * 64), torch.nan)
    for tile, part in enumerate(x.float().square().tensor_split(tiles, dim=1)):
        squares[tile, : len(x)] = part.sum(1)
    bench.tensors["squares of x"] = squares


def check_left(bench: Bench, plan: WidePlan) -> None:
    """What the product leaves of the norm behind it is that of the output which it has stored."""
    out = bench.tensors["out"]
    assert torch.equal(bench.tensors["weighed"], out * bench.tensors["next"])
    parts = out.float().square().split(plan.columns, dim=1)
    squares = bench.tensors["squares"][:, : len(out)]
    torch.testing.assert_close(squares, torch.stack([part.sum(1) for part in parts]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [33, 64])
@pytest.mark.parametrize(
    "fused",
    [
        {},
        {"bias": True, "residual": True},
        {"activation": "silu"},
        {"activation": "gelu_tanh", "bias": True},
        {"weighs": True, "residual": True},
        {"norm_tiles": 3, "activation": "silu", "bias": True},
        {"norm_tiles": 33, "weighs": True, "bias": True, "residual": True},
    ],
    ids=str,
)
def test_what_is_fused(dtype: str, rows: int, fused: dict[str, object]) -> None:
    if dtype == "float16":
        fused = {name: value for name, value in fused.items() if "norm" not in name}
        fused.pop("weighs", None)
    check(rows, 40, 256, WidePlan(64, 32), dtype, **fused)


@pytest.mark.parametrize("rows", [9, 20, 65, 100, 128, 192, 256])
def test_warpgroups_have_64_rows_each(rows: int) -> None:
    plan = WidePlan(-(-rows // 8) * 8, 48)
    check(rows, 80, 192, plan, residual=True, weighs=True)
    check(rows, 24, 192, plan, activation="silu", norm_tiles=5)


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
        check(40, 52, 64 * 24, WidePlan(64, 32, split), residual=True, weighs=True, norm_tiles=4)


@pytest.mark.parametrize("columns", [16, 80, 160, 256])
def test_tiles(columns: int) -> None:
    check(64, 3 * columns, 1280, WidePlan(64, columns))
    check(33, 2 * columns + 20, 320, WidePlan(64, columns), residual=True, weighs=True)
    check(37, 2 * columns, 1280, WidePlan(64, columns), activation="silu", bias=True)
    check(37, columns + 8, 1280, WidePlan(64, columns), activation="silu", norm_tiles=2)


def test_sums_wait_for_what_scales_them() -> None:
    for seed in range(8):  # whichever warp is first
        check(9, 32, 64, WidePlan(16, 32), norm_tiles=2, seed=seed)


@pytest.mark.parametrize("rows", [16, 64, 104, 192, 256])
def test_whole_warpgroups_read_memory_of_their_block(rows: int) -> None:
    plan = WidePlan(rows, 32)
    last_x = 1024 + (plan.stages - 1) * (32 + rows) * 128 + 32 * 128
    assert last_x + plan.groups * 64 * 128 <= plan.shared_bytes <= 225 << 10


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
    assert wide_plan("bfloat16", 257, 64, 64) is None
    assert plan(256, 28672, 4096, gated=True) == (112, 1)
    # Slots of few features take as long as larger ones: K is divided, not the features further.
    assert plan(16, 4096, 14336) == (64, 2)


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
