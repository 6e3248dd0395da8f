"""Every instruction of the cuda target's programs beside the ops' plain-torch meaning, on an
emulated GPU: the first op that differs is the one named."""

from __future__ import annotations

import pytest
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu
from op_meanings import check_instructions

from llmforge.engine.cuda.target import CudaTarget
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


# What `make test` runs; all others take minutes.
QUICK = (
    ("llama", "float32"),
    ("wide", "bfloat16"),
    ("norms-over-heads", "float32"),
    ("latents", "float32"),
    ("sinks-and-limited-experts", "bfloat16"),
)
CASES = [
    pytest.param(name, dtype, "sm_90", marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
]
# GPUs without bulk copies leave more products to torch.
CASES += [
    pytest.param("wide", "bfloat16", "sm_80"),
    pytest.param("experts", "bfloat16", "sm_80", marks=pytest.mark.slow),
    pytest.param("wide-biases", "float16", "sm_80", marks=pytest.mark.slow),
    pytest.param("wide-biases", "float16", "sm_90", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dtype", "arch"), CASES)
def test_every_instruction(name, dtype, arch):
    config = of_dtype(MODELS[name], dtype)
    weights = RandomWeights(config, seed=7)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    with emulated_gpu(arch):
        cuda = emulated(graph, weights, LIMITS, arch)
        for prompts in ((1, 1, 1), (19, 1, 40)):
            batch = Driver(LIMITS, config.vocab_size, 3, prompts).batch(list(prompts))
            check_instructions(cuda, batch)
