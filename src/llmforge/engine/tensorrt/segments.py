"""A rank's prepared graph cut into what engines compute and what ranks exchange between them.

An exchange (a collective that no engine does itself, send, recv) has a level: how many rounds of
exchanges lie before it. A node runs in the earliest round in which its inputs are there, so ranks
meet as seldom as possible, and exchanges keep the graph's order, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmforge.model.graph import Graph, Node

# Computed anew in each segment that reads them: they depend on the step's inputs alone.
_REPEATED = ("rope_table",)


@dataclass(frozen=True)
class Segment:
    """What one engine computes. inputs, outputs: hidden states that it takes and gives, by the
    graph's names."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(graph: Graph, is_exchange: Callable[[Node], bool]) -> list[Segment | Node]:
    """Segments and exchanges in the order in which they run."""
    rounds = _levels(graph, is_exchange)
    plan: list[Segment | Node] = []
    last = max(rounds.values(), default=0)
    for level in range(-1, last + 1):
        nodes = tuple(n for n in graph.nodes if rounds.get(id(n)) == level and not is_exchange(n))
        if nodes:
            plan.append(_segment(graph, nodes))
        plan += [n for n in graph.nodes if rounds.get(id(n)) == level and is_exchange(n)]
    return plan


def _levels(graph: Graph, is_exchange: Callable[[Node], bool]) -> dict[int, int]:
    """The round of each node by its id, but for those that are repeated. Round -1 has only
    exchanges that need nothing computed."""
    ready: dict[str, int] = {}  # tensor -> the round in which it is there
    rounds: dict[int, int] = {}
    reached = -1  # exchanges keep their order
    for node in graph.nodes:
        if node.op in _REPEATED:
            continue
        after = max((ready[name] for name in node.inputs if name in ready), default=-1)
        if is_exchange(node):
            reached = max(reached, after)
            rounds[id(node)] = reached
            after = reached + 1
        else:
            after = max(after, 0)
            rounds[id(node)] = after
        ready.update(dict.fromkeys(node.outputs, after))
    return rounds


def _segment(graph: Graph, nodes: tuple[Node, ...]) -> Segment:
    """The segment of these nodes, with the repeated ones that they read."""
    made_by = {name: n for n in graph.nodes for name in n.outputs}
    repeated = dict.fromkeys(
        name for n in nodes for name in n.inputs if name in made_by and _repeats(made_by[name])
    )
    nodes = (*(made_by[name] for name in repeated), *nodes)
    computed = {name for n in nodes for name in n.outputs}
    read = dict.fromkeys(name for n in nodes for name in n.inputs if name in made_by)
    inside = set(map(id, nodes))
    wanted = {name for n in graph.nodes if id(n) not in inside for name in n.inputs}
    wanted.update(graph.outputs)
    outputs = tuple(name for n in nodes for name in n.outputs if name in wanted and not _repeats(n))
    return Segment(nodes, tuple(name for name in read if name not in computed), outputs)


def _repeats(node: Node) -> bool:
    return node.op in _REPEATED
