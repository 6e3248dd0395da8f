"""Every instruction of the programs beside the ops' plain-torch meaning: the first op that differs
is the one named."""

from __future__ import annotations

import dataclasses

import pytest
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, compile_into, of_dtype
from op_meanings import check_instructions

from llmforge.comm import LocalComm
from llmforge.engine.cuda.target import CudaTarget
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = pytest.mark.gpu

NAMES = (
    "llama", "all-biases", "wide", "scaled-and-capped", "alibi-parallel", "layer-norm",
    "experts", "experts-odd", "experts-shared", "sinks-and-limited-experts", "latents",
    "latents-wide",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_every_instruction(name, dtype, kind, tmp_path):
    config = of_dtype(MODELS[name], dtype)
    weights = RandomWeights(config, seed=7)
    target = CudaTarget()
    graph = target.prepare(trace(config, Topology(), 0))
    out = compile_into(target, graph, weights, LIMITS, tmp_path / "engine")
    cuda = target.load(out, Topology(), LIMITS, LocalComm())
    prompts = (1, 1, 1) if kind == "decode" else (19, 1, 40)
    batch = Driver(LIMITS, config.vocab_size, 3, prompts).batch(list(prompts))
    check_instructions(cuda, batch)


@pytest.mark.parametrize("name", ["wide", "wide-biases"])
@pytest.mark.parametrize("sequences", [12, 40, 120, 180, 250])
def test_every_instruction_of_steps_of_many_sequences(name, sequences, tmp_path):
    """By one to four warpgroups, and with norms that two products share."""
    config = of_dtype(MODELS[name], "bfloat16")
    weights, count = RandomWeights(config, seed=7), sequences
    limits = dataclasses.replace(
        LIMITS, max_batch_size=count, max_num_tokens=count, num_blocks=8 * count
    )
    target = CudaTarget()
    graph = target.prepare(trace(config, Topology(), 0))
    out = compile_into(target, graph, weights, limits, tmp_path / "engine")
    cuda = target.load(out, Topology(), limits, LocalComm())
    check_instructions(cuda, Driver(limits, config.vocab_size, 3, (1,) * count).batch([1] * count))
