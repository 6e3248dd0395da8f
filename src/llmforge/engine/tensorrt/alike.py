"""Segments under names of their own, by which those that compute the same are the same.

Where weights are inputs of engines, the layers of a model differ in nothing but what is bound to
them: one engine does for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from llmforge.engine.tensorrt.segments import Segment
from llmforge.model.graph import Graph, Node, Parameter, Tensor


@dataclass(frozen=True)
class Anonymous:
    """A segment, and as much of its graph as concerns it, with tensors, parameters and states
    numbered in the order of their use. The step's inputs keep their names. names: what each is
    in the rank's graph."""

    graph: Graph
    segment: Segment
    names: Mapping[str, str]

    @property
    def key(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """The same for two segments exactly where one network computes both."""
        return self.graph.to_json(), self.segment.inputs, self.segment.outputs


def anonymous(graph: Graph, segment: Segment) -> Anonymous:
    """The segment with names that tell nothing of where in the graph it stands."""
    names = _Names(graph)
    nodes = tuple(names.of_node(node) for node in segment.nodes)
    inside = set(map(id, segment.nodes))
    # Of what reads its outputs elsewhere a row of the lowering may ask what it is.
    readers = [
        Node(node.op, tuple(name for name in map(names.known, node.inputs) if name), ())
        for node in graph.nodes
        if id(node) not in inside and any(name in segment.outputs for name in node.inputs)
    ]
    parameters, states, others = names.tensors()
    tensors = {t.name: t for t in (*graph.inputs, *states, *parameters, *others)}
    part = Graph(graph.inputs, states, parameters, (*nodes, *readers), (), tensors)
    inputs, outputs = (tuple(map(names.of, n)) for n in (segment.inputs, segment.outputs))
    return Anonymous(part, Segment(nodes, inputs, outputs), names.back())


class _Names:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._kept = {"", *(t.name for t in graph.inputs)}
        self._states = {t.name for t in graph.states}
        self._new: dict[str, str] = {}
        self._layers: dict[str, int] = {}

    def of_node(self, node: Node) -> Node:
        inputs, outputs = (tuple(map(self.of, names)) for names in (node.inputs, node.outputs))
        return Node(node.op, inputs, outputs, node.attrs)

    def of(self, name: str) -> str:
        if name in self._kept:
            return name
        if name not in self._new:
            self._new[name] = self._numbered(name)
        return self._new[name]

    def known(self, name: str) -> str | None:
        return self._new.get(name)

    def back(self) -> dict[str, str]:
        return {new: old for old, new in self._new.items()}

    def tensors(self) -> tuple[tuple[Parameter, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What has been named: parameters, states, and the rest."""
        parameters: list[Parameter] = []
        states: list[Tensor] = []
        others: list[Tensor] = []
        for old, new in self._new.items():
            tensor = self._graph.tensors[old]
            if isinstance(tensor, Parameter):
                parameters.append(dataclasses.replace(tensor, name=new, parts=()))
            else:
                kind = states if old in self._states else others
                kind.append(dataclasses.replace(tensor, name=new))
        return tuple(parameters), tuple(states), tuple(others)

    def _numbered(self, name: str) -> str:
        if name in self._states:
            _, layer, kind = name.split(".")
            return f"layers.{self._layers.setdefault(layer, len(self._layers))}.{kind}"
        is_parameter = isinstance(self._graph.tensors[name], Parameter)
        return f"{'parameter' if is_parameter else 'hidden'}.{len(self._new)}"
