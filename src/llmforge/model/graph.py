"""The graph of one rank: what it computes and where it communicates.

A `Graph` is a list of `Node`s in execution order over named tensors. Dimensions are numbers or
names ("tokens"): the names are those of `SYMBOLS`. Parameters are named, and say which of the
checkpoint's parameters they are made of, so a pass can merge them without touching a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Dim = int | str
Shape = tuple[Dim, ...]

SYMBOLS = {
    "tokens": "new tokens of the step (T)",
    "sequences": "sequences of the step (B)",
    "sequences + 1": "B + 1",
    "table_width": "blocks of the longest sequence",
    "rows": "rows whose next token is wanted (R)",
    "blocks": "blocks of the KV cache",
    "block_size": "tokens of a KV-cache block",
}


@dataclass(frozen=True)
class Tensor:
    """A value: its name, shape and dtype ("bfloat16", "int32", ...)."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Parameter(Tensor):
    """A weight with this rank's shape. `parts` are the checkpoint's parameters it is made of:
    this rank's shards of them, joined along the first dimension."""

    parts: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, which has no symbolic dimension."""
        return tuple(int(size) for size in self.shape)


@dataclass(frozen=True)
class Node:
    """One operation. `inputs` are tensor names, "" where an optional input is absent."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """`inputs` are filled from the StepBatch; `states` live from step to step (the KV cache)."""

    inputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    parameters: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    def with_nodes(
        self,
        nodes: list[Node],
        new_tensors: tuple[Tensor, ...] = (),
        new_parameters: tuple[Parameter, ...] = (),
    ) -> Graph:
        """This graph with other nodes. Tensors that nothing uses are dropped; parameters stand
        in the order of their first use, which is the order they are stored and read in."""
        used = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.outputs))
        used.update(dict.fromkeys(self.outputs))
        known = {**self.tensors, **{t.name: t for t in (*new_tensors, *new_parameters)}}
        fixed = {t.name for t in (*self.inputs, *self.states)}
        by_name = {p.name: p for p in (*self.parameters, *new_parameters)}
        parameters = tuple(by_name[name] for name in used if name in by_name)
        return replace(
            self,
            nodes=tuple(nodes),
            parameters=parameters,
            tensors={name: t for name, t in known.items() if name in used or name in fixed},
        )

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each tensor."""
        result: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    result.setdefault(name, []).append(node)
        return result

    def validate(self) -> None:
        """Every tensor is defined once and before it is used, and dimensions have the names of
        `SYMBOLS`. Raises ValueError."""
        for t in self.tensors.values():
            if unknown := [d for d in t.shape if isinstance(d, str) and d not in SYMBOLS]:
                raise ValueError(
                    f"{t.name} has the dimension {unknown[0]!r}; known: {', '.join(SYMBOLS)}"
                )
        defined = {t.name for t in (*self.inputs, *self.states, *self.parameters)}
        for node in self.nodes:
            for name in node.inputs:
                if name and name not in defined:
                    raise ValueError(f"{node.op} reads {name!r} before it is computed")
            for name in node.outputs:
                if name in defined:
                    raise ValueError(f"{node.op} computes {name!r} a second time")
                defined.add(name)
        missing = [name for name in (*self.outputs, *defined) if name not in self.tensors]
        if missing:
            raise ValueError(f"no shape is known of {missing}")
        if undefined := [name for name in self.outputs if name not in defined]:
            raise ValueError(f"the outputs {undefined} are never computed")

    def to_json(self) -> str:
        """The graph as JSON, one node a line."""

        def line(value: Any) -> str:
            return json.dumps(value, separators=(", ", ": "))

        def tensor(t: Tensor) -> dict[str, Any]:
            entry: dict[str, Any] = {"name": t.name, "shape": list(t.shape), "dtype": t.dtype}
            if isinstance(t, Parameter):
                entry["parts"] = list(t.parts)
            return entry

        special = {t.name for t in (*self.inputs, *self.states, *self.parameters)}
        sections = {
            "inputs": [tensor(t) for t in self.inputs],
            "states": [tensor(t) for t in self.states],
            "parameters": [tensor(t) for t in self.parameters],
            "tensors": [tensor(t) for name, t in self.tensors.items() if name not in special],
            "nodes": [
                {
                    "op": n.op,
                    "inputs": list(n.inputs),
                    "outputs": list(n.outputs),
                    "attrs": dict(n.attrs),
                }
                for n in self.nodes
            ],
        }
        body = [
            f'  "{key}": [\n' + ",\n".join("    " + line(item) for item in items) + "\n  ]"
            for key, items in sections.items()
        ]
        body.append(f'  "outputs": {line(list(self.outputs))}')
        return "{\n" + ",\n".join(body) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """The inverse of `to_json`. Raises ValueError or KeyError on anything else."""
        data = json.loads(text)

        def tensor(entry: dict[str, Any]) -> Tensor:
            return Tensor(entry["name"], tuple(entry["shape"]), entry["dtype"])

        inputs = tuple(tensor(e) for e in data["inputs"])
        states = tuple(tensor(e) for e in data["states"])
        parameters = tuple(
            Parameter(e["name"], tuple(e["shape"]), e["dtype"], tuple(e["parts"]))
            for e in data["parameters"]
        )
        every = (*inputs, *states, *parameters, *(tensor(e) for e in data["tensors"]))
        nodes = tuple(
            Node(e["op"], tuple(e["inputs"]), tuple(e["outputs"]), e["attrs"])
            for e in data["nodes"]
        )
        graph = cls(
            inputs, states, parameters, nodes, tuple(data["outputs"]), {t.name: t for t in every}
        )
        graph.validate()
        return graph
