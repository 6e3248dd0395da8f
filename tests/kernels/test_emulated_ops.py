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
from llmforge.model.reference import LOCAL
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
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_instruction(name, dtype):
    config = of_dtype(MODELS[name], dtype)
    weights = RandomWeights(config, seed=7)
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    with emulated_gpu():
        cuda = emulated(graph, weights, LIMITS)
        for prompts in ((1, 1, 1), (19, 1, 40)):
            batch = Driver(LIMITS, config.vocab_size, 3, prompts).batch(list(prompts))
            check_instructions(cuda, graph, weights, batch, LOCAL, dtype)
