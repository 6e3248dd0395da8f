"""A pass of one's own: llmforge build … --pass examples/own_model/passes.py:cap_logits"""

from __future__ import annotations

import dataclasses

from llmforge.model.graph import Graph, Node

CAP = 4.0
HEAD = "logits.weight"


def cap_logits(graph: Graph) -> Graph:
    """c tanh(logits / c) for the logits, behind the product that makes them. Ranks that only pass
    logits on have no such product, and stay as they are."""
    nodes: list[Node] = []
    tensors = []
    for node in graph.nodes:
        if node.op != "linear" or node.inputs[1] != HEAD:
            nodes.append(node)
            continue
        [logits] = node.outputs
        uncapped = dataclasses.replace(graph.tensors[logits], name=f"{logits}.uncapped")
        nodes.append(dataclasses.replace(node, outputs=(uncapped.name,)))
        nodes.append(Node("soft_cap", (uncapped.name,), (logits,), {"cap": CAP}))
        tensors.append(uncapped)
    return graph.with_nodes(nodes, tuple(tensors))
