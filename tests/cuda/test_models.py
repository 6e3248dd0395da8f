"""Whole tiny models on the GPU beside the cpu target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_models import (
    LIMITS,
    MODELS,
    SAMPLINGS,
    Driver,
    RandomWeights,
    check_running_ahead,
    check_sampling,
    check_ties,
    compile_into,
    of_dtype,
    poison,
    steps,
    tolerance,
    with_equal_logits,
)

from llmforge.comm import LocalComm
from llmforge.engine.cpu.target import CpuTarget
from llmforge.engine.cuda import executable
from llmforge.engine.cuda.buffers import Memory
from llmforge.engine.cuda.target import CudaTarget
from llmforge.engine.step import SamplingParams
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.runtime.sampling import sample

pytestmark = pytest.mark.gpu


def both(config, tmp_path, seed=0):
    """The model's executables for cpu and cuda."""
    weights = RandomWeights(config, seed)
    loaded = []
    for target in (CpuTarget(), CudaTarget()):
        graph = target.prepare(trace(config, Topology(), 0))
        out = compile_into(target, graph, weights, LIMITS, tmp_path / target.name)
        loaded.append(target.load(out, Topology(), LIMITS, LocalComm()))
    return loaded


# Experts are chosen anew after every rounding, so in two-byte types logits may differ by more than
# rounding explains: test_ops.py compares these op by op.
CASES = [
    (name, dtype)
    for name, config in MODELS.items()
    for dtype in ("float32", "bfloat16", "float16")
    if dtype == "float32" or config.moe is None
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits(name, dtype, tmp_path):
    config = of_dtype(MODELS[name], dtype)
    cpu, cuda = both(config, tmp_path)
    driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
    for batch in steps(driver, decode_steps=6):
        poison(cuda)
        expected, got = cpu.step(batch).logits, cuda.step(batch).logits
        bound = tolerance(config, expected)
        worst = np.abs(got - expected).max()
        assert np.isfinite(got).all() and worst <= bound, (worst, bound)
        if dtype == "float32":
            assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_in_float32(name, tmp_path):
    config = MODELS[name]
    cpu, cuda = both(config, tmp_path, seed=3)
    drivers = [Driver(LIMITS, config.vocab_size, seed=2, prompts=(40, 7, 21)) for _ in range(2)]
    chunks = [40, 7, 21]
    for _ in range(20):
        greedy = SamplingParams()
        cpu_batch, cuda_batch = (d.batch(chunks, greedy) for d in drivers)
        expected = sample(cpu.step(cpu_batch).logits, cpu_batch.sampling).tolist()
        got = cuda.step(cuda_batch).tokens.tolist()
        assert got == expected
        for driver in drivers:
            driver.append(expected, [0, 1, 2])
        chunks = [1, 1, 1]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_draws_as_the_runtime_does(sampling, tmp_path):
    config = of_dtype(MODELS["wide"], "bfloat16")
    _, cuda = both(config, tmp_path, seed=4)
    check_sampling(cuda, config.vocab_size, SAMPLINGS[sampling], 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_running_ahead_gives_the_same_tokens(dtype, tmp_path):
    config = of_dtype(MODELS["wide"], dtype)
    _, cuda = both(config, tmp_path, seed=4)
    count, ends_early = 3 * LIMITS.max_batch_size, dtype == "float32"
    check_running_ahead(cuda, config.vocab_size, count, ends_early=ends_early)


def test_kernels_wait_for_what_fills_their_memory(tmp_path, monkeypatch):
    """Counters and caches are zeroed before the first kernel, however long that takes."""

    def late(*arguments):
        torch.cuda._sleep(10**9)  # half a second, before the fills in the stream
        return Memory(*arguments)

    monkeypatch.setattr(executable, "Memory", late)
    config = of_dtype(MODELS["wide"], "bfloat16")
    cpu, cuda = both(config, tmp_path)
    driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
    for batch in steps(driver, decode_steps=2):
        expected, got = cpu.step(batch).logits, cuda.step(batch).logits
        assert np.abs(got - expected).max() <= tolerance(config, expected)


def test_ties_and_equal_logits(tmp_path):
    config = of_dtype(MODELS["llama"], "bfloat16")
    target = CudaTarget()
    graph = target.prepare(trace(config, Topology(), 0))
    out = compile_into(target, graph, with_equal_logits(config), LIMITS, tmp_path / "engine")
    check_ties(target.load(out, Topology(), LIMITS, LocalComm()), config.vocab_size)
