"""A rank's prepared graph cut into what engines compute and what ranks exchange between them.

An exchange (a collective that no engine does itself, send, recv) has a level: how many rounds of
exchanges lie before it. A node runs in the earliest round in which its inputs are there, so ranks
meet as seldom as possible, and exchanges keep the graph's order, which is the same on all ranks.

Where an engine should have so many layers, what lies in one round is cut further, between layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmforge.model.graph import Graph, Node

# Computed anew in each segment that reads them: they depend on the step's inputs alone.
_REPEATED = ("rope_table",)
ATTENTION = ("attention", "scored_attention", "latent_attention")  # one a layer


@dataclass(frozen=True)
class Segment:
    """What one engine computes. inputs, outputs: hidden states that it takes and gives, by the
    graph's names."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(
    graph: Graph, is_exchange: Callable[[Node], bool], layers: int | None = None
) -> list[Segment | Node]:
    """Segments and exchanges in the order in which they run. `layers`: of a segment, where it can
    be cut so; where that leaves some over, segments have more, never fewer. None: any number."""
    rounds = _levels(graph, is_exchange)
    plan: list[Segment | Node] = []
    last = max(rounds.values(), default=0)
    for level in range(-1, last + 1):
        nodes = [n for n in graph.nodes if rounds.get(id(n)) == level and not is_exchange(n)]
        plan += [_segment(graph, tuple(part)) for part in _between_layers(graph, nodes, layers)]
        plan += [n for n in graph.nodes if rounds.get(id(n)) == level and is_exchange(n)]
    return plan


def _between_layers(graph: Graph, nodes: list[Node], layers: int | None) -> list[list[Node]]:
    """The nodes cut where fewest features cross, into parts of `layers` or some more."""
    if not nodes:
        return []
    attention = [i for i, node in enumerate(nodes) if node.op in ATTENTION]
    if layers is None or len(attention) <= layers:
        return [nodes]
    made = {name: i for i, n in enumerate(nodes) if not _repeats(n) for name in n.outputs}
    last = {name: i for i, n in enumerate(nodes) for name in n.inputs}

    def crossing(at: int) -> int:
        """The features that a cut before node `at` has to hand on."""
        names = (name for name, i in made.items() if i < at <= last.get(name, -1))
        return sum(int(graph.tensors[name].shape[-1]) for name in names)

    count = max(1, len(attention) // layers)
    ends = [len(attention) * part // count for part in range(1, count)]
    starts = [0]
    for last_of_part, next_layer in ((attention[end - 1], attention[end]) for end in ends):
        starts.append(min(range(last_of_part + 1, next_layer + 1), key=crossing))
    return [nodes[a:b] for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]


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
