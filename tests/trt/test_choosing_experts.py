"""Both ways in which a router's best are found: by TopK, and by comparing each score with each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tensorrt_rtx
import torch
from interpreter import Interpreter
from network_reader import read

from llmforge.engine.tensorrt.lowering import experts
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.engine.tensorrt.package import Package
from llmforge.model.graph import Graph

WAYS = {"top k": experts._largest, "by rank": experts._largest_by_rank}
SCORES = torch.tensor(
    [
        [[0.1, 0.5, 0.2, 0.4, 0.3], [0.0, -1.0, 2.0, -3.0, 1.0]],
        [[0.5, 0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 1.0, 0.0, 1.0]],  # of equal ones the first
    ]
)
BEST_TWO = torch.tensor([[[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]], [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("grouped", [False, True], ids=["of all", "of each group"])
def test_the_best_of_the_last_axis(
    way: Callable[[Lowering, Value, int], Value], grouped: bool
) -> None:
    net = Network(Package("tensorrt-rtx", tensorrt_rtx))
    g = Lowering(net, Graph((), (), (), (), (), {}), None, None, False)  # type: ignore[arg-type]
    scores = SCORES.reshape(2, 1, 2, 5) if grouped else SCORES
    x = net.input("x", "float32", ("B", "S", *scores.shape[2:]))
    net.output("best", way(g, x, 2))
    got = Interpreter(read(net.network, tensorrt_rtx)).run({"x": scores})["best"]
    assert got.reshape(BEST_TWO.shape).equal(BEST_TWO.float())
