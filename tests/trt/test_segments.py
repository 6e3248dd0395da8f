"""A graph cut between layers: small parts, few features across, every node once."""

from __future__ import annotations

import pytest
from tiny_models import config_of

from llmforge.engine.tensorrt.segments import Segment, cut
from llmforge.model.decoder import trace
from llmforge.model.graph import Node
from llmforge.parallel import Topology

ATTENTION = ("attention", "scored_attention", "latent_attention")


def never(node: Node) -> bool:
    return False


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere", "gemma2"])
def test_parts_have_so_many_layers_or_one_more_and_all_nodes(name: str, layers: int) -> None:
    graph = trace(config_of(name), Topology(1, 1), 0)
    parts = cut(graph, never, layers)
    assert all(isinstance(part, Segment) for part in parts)
    counts = [sum(n.op in ATTENTION for n in part.nodes) for part in parts]
    assert len(parts) == max(1, sum(counts) // layers)
    assert min(counts) >= min(layers, sum(counts)) and max(counts) - min(counts) <= 1
    nodes = [n for part in parts for n in part.nodes if n.op != "rope_table"]
    assert nodes == [n for n in graph.nodes if n.op != "rope_table"]
    known = {t.name for t in (*graph.inputs, *graph.states, *graph.parameters)}
    for part in parts:
        assert set(part.inputs) <= known
        known.update(part.outputs)


def test_only_the_residual_crosses_between_layers() -> None:
    graph = trace(config_of("llama"), Topology(1, 1), 0)
    first, *rest = cut(graph, never, 1)
    assert isinstance(first, Segment) and first.inputs == () and len(first.outputs) == 1
    for part in rest:
        assert isinstance(part, Segment) and len(part.inputs) == len(part.outputs) == 1


def test_rounds_between_exchanges_are_cut_no_further_than_layers() -> None:
    graph = trace(config_of("llama"), Topology(2, 1), 0)

    def meets(node: Node) -> bool:
        return node.op in ("all_reduce", "all_gather")

    assert cut(graph, meets, 1) == cut(graph, meets)
