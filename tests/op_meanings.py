"""A step by the ops' plain-torch meanings, to compare a GPU's instructions with one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cuda_models import LIMITS, poison

from llmforge.engine.step import Limits, StepBatch
from llmforge.model.graph import Graph
from llmforge.model.reference import DTYPES, REFERENCE, Context

# Relative to the norm of a tensor: what rounding to the dtype at each of some 20 ops explains.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def meanings(
    graph: Graph,
    weights: Any,
    batch: StepBatch,
    context: Context,
    given: dict[str, Any],
    limits: Limits = LIMITS,
) -> dict[str, Any]:
    """Every tensor of the graph; those that are `given` stand in for what is computed."""
    sizes = {"blocks": limits.num_blocks, "block_size": limits.block_size}
    values: dict[str, Any] = {"": None}
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
        results = REFERENCE[node.op](inputs, node.attrs, context)
        values.update(zip(node.outputs, results, strict=True))
        values.update({name: given[name] for name in node.outputs if name in given})
    return values


def check_instructions(
    cuda: Any, graph: Graph, weights: Any, batch: StepBatch, context: Context, dtype: str
) -> None:
    """Compare what each instruction computes. Experts are chosen anew after every rounding, so
    what follows a choice is compared with the meaning of the GPU's own choice."""
    routed = {node.outputs[0]: node.outputs[1] for node in graph.nodes if node.op == "route"}
    given: dict[str, Any] = {}
    expected = meanings(graph, weights, batch, context, given, cuda.limits)
    for index in range(len(cuda.instructions(batch))):
        poison(cuda)
        computed = cuda.run(batch, stop_after=index)
        values = {n: got[: len(expected[n])].cpu() for n, got in computed.items()}
        for name, got in values.items():
            want = expected[name]
            if name in routed and dtype != "float32":
                continue  # its weights tell whether it is as good
            error = float((got.float() - want.float()).norm() / want.float().norm())
            assert error <= TOLERANCE[dtype], (index, name, error)
        if any(name in routed for name in values):
            given |= values
            expected = meanings(graph, weights, batch, context, given, cuda.limits)
