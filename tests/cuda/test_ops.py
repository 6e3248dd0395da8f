"""Every instruction of the programs beside the ops' plain-torch meaning, on the GPU's own inputs'
graph: the first op that differs is the one named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, compile_into, of_dtype, poison

from llmforge.comm import LocalComm
from llmforge.engine.cuda.target import CudaTarget
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE
from llmforge.parallel import Topology

pytestmark = pytest.mark.gpu

# Relative to the norm of a tensor: what rounding to the dtype at each of some 20 ops explains.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def reference_tensors(graph, weights, batch):
    """Every tensor of the graph, by REFERENCE."""
    sizes = {"blocks": LIMITS.num_blocks, "block_size": LIMITS.block_size}
    values = {"": None}
    for tensor in graph.inputs:
        values[tensor.name] = torch.from_numpy(getattr(batch, tensor.name))
    for state in graph.states:
        shape = [sizes.get(d, d) for d in state.shape]
        values[state.name] = torch.zeros(shape, dtype=DTYPES[state.dtype])
    for parameter in graph.parameters:
        array = weights.read(parameter).astype(np.float32)
        values[parameter.name] = torch.from_numpy(array).to(DTYPES[parameter.dtype])
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        results = REFERENCE[node.op](inputs, node.attrs, LOCAL)
        values.update(zip(node.outputs, results, strict=True))
    return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama", "all-biases", "wide", "scaled-and-capped", "alibi-parallel", "layer-norm"]
)
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
    expected = reference_tensors(graph, weights, batch)
    for index in range(len(cuda.instructions(batch))):
        poison(cuda)
        for tensor, got in cuda.run(batch, stop_after=index).items():
            want = expected[tensor].float()
            got = got[: len(want)].cpu().float()
            error = float((got - want).norm() / want.norm())
            assert error <= TOLERANCE[dtype], (index, tensor, error)
