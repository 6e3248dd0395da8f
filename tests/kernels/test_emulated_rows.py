"""rows_gemm.cu on an emulated GPU beside the ops' plain-torch meaning."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import PROCESSORS
from emulation.executable import emulated, emulated_gpu
from op_meanings import check_instructions
from product_meanings import (
    EPS,
    TOLERANCE,
    check_twice,
    guarded,
    meaning,
    random_operands,
)

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.launch import Launch
from llmforge.kernels.rows import RowsTuning, rows_gemm, rows_plan, rows_scratch_floats
from llmforge.kernels.stream import StreamScratch
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

LONG = dataclasses.replace(
    MODELS["wide"], num_layers=1, sliding_window=(None,), intermediate_size=8192
)
SMALL = RowsTuning(piece=512, stages=2)


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy behind which nothing can be read."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)


def check(
    rows: int,
    features: int,
    k: int,
    dtype: str = "bfloat16",
    tuning: RowsTuning = SMALL,
    *,
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    alone: bool = False,
    seed: int = 0,
) -> None:
    """Compare a product of `rows` rows that gives `features` features of k elements, twice."""
    torch.manual_seed(features + k + rows + seed)
    bench = Bench(seed)
    gated = activation is not None
    bench.tensors.update(random_operands(rows, features, k, dtype, gated=gated))
    # Rows of very different size: what of one comes into another shows.
    bench.tensors["x"] *= 10.0 ** torch.arange(rows).fmod(3).view(-1, 1).to(DTYPES[dtype])
    for name in ("x", "weight"):
        bench.tensors[name] = at_the_end_of_memory(bench.tensors[name])
    plan = rows_plan(dtype, k, tuning, alone=alone)
    assert plan is not None
    floats = rows_scratch_floats(len(bench.tensors["weight"]), plan.split)
    guarded(bench, rows, features, floats, PROCESSORS)
    launch = rows_gemm(
        bench.operand("out", "tokens"),
        bench.operand("x", "tokens"),
        bench.operand("weight"),
        StreamScratch(bench.operand("partial"), bench.operand("counters")),
        tuning,
        bias=bench.operand("bias") if bias else None,
        residual=bench.operand("residual", "tokens") if residual else None,
        norm_weight=bench.operand("norm") if norm else None,
        eps=EPS,
        activation=activation,
        alone=alone,
    )
    want = meaning(bench.tensors, norm, bias, residual, activation, divides_sums=True).float()
    if norm and features > 100:
        exact = meaning(bench.tensors, norm, bias, residual, activation).float()
        assert ((want - exact).norm(dim=1) <= 2 * TOLERANCE[dtype] * exact.norm(dim=1)).all()
    check_twice(bench, launch, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "fused",
    [
        {},
        {"residual": True},
        {"bias": True, "residual": True, "norm": True},
        {"activation": "silu", "norm": True},
        {"activation": "gelu_tanh", "bias": True},
    ],
    ids=str,
)
def test_what_is_fused(fused: dict[str, bool], rows: int, dtype: str) -> None:
    if dtype == "float16":
        fused = fused | {"norm": False}
    check(rows, 37, 768, dtype, **fused)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        1,
        PROCESSORS - 1,  # blocks that compute nothing
        PROCESSORS * 8,
        PROCESSORS * 8 - 1,
        PROCESSORS * 16 + 1,  # whole rounds, and one feature more
        PROCESSORS * 24 + 5 * PROCESSORS,
    ],
)
def test_features_are_dealt_to_blocks(features: int, gated: bool) -> None:
    activation = "silu" if gated else None
    for seed in range(2):
        check(5, features, 256, norm=True, activation=activation, seed=seed)
        check(8, features, 256, bias=True, activation=activation, residual=not gated, seed=seed)


@pytest.mark.parametrize("k", [256, 512, 1280, 1792, 4096])
def test_warps_share_k(k: int) -> None:
    check(3, 20, k, norm=True)
    check(8, 20, k, tuning=RowsTuning(piece=1536), residual=True)


@pytest.mark.parametrize("k", [6912, 8192, 14336])
@pytest.mark.parametrize("features", [3, 33, PROCESSORS * 8 + 5])
def test_blocks_share_k(features: int, k: int) -> None:
    check(3, features, k, tuning=RowsTuning(), residual=True, bias=True, norm=True)
    check(8, features, k, "float16", tuning=RowsTuning(), activation="silu", bias=True, seed=1)
    check(5, features, k, tuning=RowsTuning(), activation="silu", norm=True, seed=2)


@pytest.mark.parametrize(
    "tuning",
    [
        RowsTuning(),
        RowsTuning(piece=512, stages=1),
        RowsTuning(piece=1024, stages=6),
        RowsTuning(piece=4096),
    ],
    ids=str,
)
def test_tunings(tuning: RowsTuning) -> None:
    check(8, 50, 2560, tuning=tuning, norm=True, activation="silu")
    check(2, 50, 2560, tuning=tuning, bias=True, residual=True, alone=True)


@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        ("wide-biases", "bfloat16", 3),
        pytest.param("wide-biases", "float16", 2, marks=pytest.mark.slow),
        pytest.param("wide", "bfloat16", 4, marks=pytest.mark.slow),
        # Its last product is over so many elements that two blocks share each row.
        ("long", "bfloat16", 2),
    ],
)
def test_every_instruction_of_a_step_of_few_tokens(name: str, dtype: str, rows: int) -> None:
    config = of_dtype(LONG if name == "long" else MODELS[name], dtype)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    weights = RandomWeights(config, seed=5)
    with emulated_gpu():
        choice = KernelChoice(few_rows="rows_gemm")
        cuda = emulated(graph, weights, LIMITS, choice=choice)
        batch = Driver(LIMITS, config.vocab_size, 3, (1,) * rows).batch([1] * rows)
        calls = [i.call for i in cuda.instructions(batch)]
        kernels = [c.kernel for c in calls if isinstance(c, Launch)]
        splits = [dict(k.defines)["SPLIT"] for k in kernels if k.entry == "rows_gemm"]
        assert splits and max(splits) == (2 if name == "long" else 1)
        check_instructions(cuda, batch)
