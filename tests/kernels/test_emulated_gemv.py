"""gemv.cu on an emulated GPU beside the ops' plain-torch meaning."""

from __future__ import annotations

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import PROCESSORS
from emulation.executable import emulated, emulated_gpu
from op_meanings import check_instructions
from product_meanings import EPS, GUARD, TOLERANCE, meaning, random_operands

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.gemv import GemvTuning, gemv
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = GemvTuning(warps=2, piece=512, stages=2, narrow=0)


def check(
    features: int,
    k: int,
    dtype: str = "bfloat16",
    tuning: GemvTuning = SMALL,
    *,
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    alone: bool = False,
    seed: int = 0,
) -> None:
    """Compare a product that gives `features` features of k elements."""
    torch.manual_seed(features + k + seed)
    bench = Bench(seed)
    gated = activation is not None
    bench.tensors.update(random_operands(1, features, k, dtype, gated=gated))
    memory = torch.full((features + GUARD,), float("nan"), dtype=DTYPES[dtype])
    bench.tensors["out"] = memory[:features].view(1, features)
    launch = gemv(
        bench.operand("out", "tokens"),
        bench.operand("x", "tokens"),
        bench.operand("weight"),
        tuning,
        bias=bench.operand("bias") if bias else None,
        residual=bench.operand("residual", "tokens") if residual else None,
        norm_weight=bench.operand("norm") if norm else None,
        eps=EPS,
        activation=activation,
        alone=alone,
    )
    bench.run(launch, tokens=1)
    got = bench.tensors["out"].float()
    want = meaning(bench.tensors, norm, bias, residual, activation).float()
    error = float((got - want).norm() / want.norm())
    assert error <= TOLERANCE[dtype], error
    assert memory[features:].isnan().all(), "wrote behind its output"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "fused",
    [
        {},
        {"norm": True},
        {"bias": True},
        {"residual": True},
        {"bias": True, "residual": True, "norm": True},
        {"activation": "silu", "norm": True},
        {"activation": "gelu_tanh", "bias": True},
    ],
    ids=str,
)
def test_what_is_fused(fused: dict[str, bool], dtype: str) -> None:
    check(37, 640, dtype, **fused)


@pytest.mark.parametrize(
    ("features", "k"),
    [
        (1, 256),  # fewer rows than warps
        (PROCESSORS * 2, 256),  # one row a warp
        (PROCESSORS * 2 + 1, 256),
        (50, 8),  # less than one load of a warp
        (50, 264),  # a last piece of 16 bytes
        (29, 1000),  # a last piece that some lanes have no part of
        (13, 2048),
        (PROCESSORS * 2 * 33 + 5, 64),  # more than 32 rows a warp
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes(features: int, k: int, gated: bool) -> None:
    for seed in range(2):
        check(features, k, norm=True, activation="silu" if gated else None, seed=seed)
        check(features, k, residual=not gated, activation="silu" if gated else None, seed=seed)


@pytest.mark.parametrize(
    "tuning",
    [
        GemvTuning(warps=1, piece=512, stages=1, narrow=0),
        GemvTuning(warps=3, piece=512, stages=5, narrow=0),
        GemvTuning(warps=2, piece=1024, stages=3, narrow=0),
        GemvTuning(),
        GemvTuning(warps=4, piece=8192),
    ],
    ids=str,
)
def test_tunings(tuning: GemvTuning) -> None:
    check(45, 1280, tuning=tuning, norm=True, activation="silu")
    check(45, 1280, tuning=tuning, bias=True, residual=True, alone=True)


def test_rows_of_real_models() -> None:
    check(20, 14336, tuning=GemvTuning(), residual=True, alone=True)
    check(20, 4096, tuning=GemvTuning(), norm=True, activation="silu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("wide-biases", "bfloat16"),
        pytest.param("wide-biases", "float16", marks=pytest.mark.slow),
        pytest.param("latents", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_instruction_of_a_step_of_one_token(name: str, dtype: str) -> None:
    config = of_dtype(MODELS[name], dtype)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    weights = RandomWeights(config, seed=5)
    with emulated_gpu():
        cuda = emulated(graph, weights, LIMITS, choice=KernelChoice("gemv"))
        batch = Driver(LIMITS, config.vocab_size, 3, (1,)).batch([1])
        calls = [i.call for i in cuda.instructions(batch)]
        assert any(isinstance(c, Launch) and c.kernel.entry == "gemv" for c in calls)
        check_instructions(cuda, batch)
