"""Graph → Graph rewrites. A target applies a tuple of them, in order, before it lowers a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llmforge.model.graph import Graph, Node, Parameter, Tensor

Pass = Callable[[Graph], Graph]


def apply(
    graph: Graph, passes: Iterable[Pass], dump: Callable[[str, Graph], None] | None = None
) -> Graph:
    """The graph after all passes. `dump` sees the graph after each, with the pass's name."""
    for rewrite in passes:
        graph = rewrite(graph)
        graph.validate()
        if dump:
            dump(rewrite.__name__, graph)
    return graph


def merge_linears(graph: Graph) -> Graph:
    """Linears that read the same tensor (q, k and v; gate and up; in a parallel block all of them)
    become one product of the joined weights, and a split: one large product is faster than several
    small ones. Those with a bias are joined apart from those without."""
    shared = _shared_parameters(graph)
    groups: dict[tuple[str, bool], list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear" and node.inputs[1] not in shared:
            groups.setdefault((node.inputs[0], bool(node.inputs[2])), []).append(node)
    merged: dict[int, list[Node]] = {}  # id of a group's first node -> its replacement
    dropped: set[int] = set()
    tensors: list[Tensor] = []
    parameters: list[Parameter] = []
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        names = [n.inputs[1] for n in nodes]
        weight = _joined(graph, names)
        bias = _joined(graph, [n.inputs[2] for n in nodes]) if nodes[0].inputs[2] else None
        x = graph.tensors[nodes[0].inputs[0]]
        output = Tensor(
            "+".join(n.outputs[0] for n in nodes), (*x.shape[:-1], weight.shape[0]), x.dtype
        )
        sizes = [graph.tensors[n.outputs[0]].shape[-1] for n in nodes]
        linear = Node("linear", (x.name, weight.name, bias.name if bias else ""), (output.name,))
        split = Node("split", (output.name,), tuple(n.outputs[0] for n in nodes), {"sizes": sizes})
        merged[id(nodes[0])] = [linear, split]
        dropped.update(id(n) for n in nodes)
        tensors.append(output)
        parameters.extend(p for p in (weight, bias) if p)
    rewritten: list[Node] = []
    for node in graph.nodes:
        rewritten.extend(merged.get(id(node), [] if id(node) in dropped else [node]))
    return graph.with_nodes(rewritten, tuple(tensors), tuple(parameters))


def _shared_parameters(graph: Graph) -> set[str]:
    """Parameters that several nodes read: joining them with others would store them twice."""
    names = {p.name for p in graph.parameters}
    readers = graph.consumers()
    return {name for name in names if len(readers.get(name, ())) > 1}


def _joined(graph: Graph, names: list[str]) -> Parameter:
    """One parameter of several, joined along the first dimension. Its name keeps what the names
    have in common: layers.0.attention.{q,k,v}.weight → layers.0.attention.q+k+v.weight (if they
    are of as many parts)."""
    parts = [p for name in names for p in graph.parameters if p.name == name]
    split_names = [name.split(".") for name in names]
    if len({len(fields) for fields in split_names}) == 1:
        joined = ".".join("+".join(dict.fromkeys(f)) for f in zip(*split_names, strict=True))
    else:
        joined = "+".join(names)
    rows = sum(int(p.shape[0]) for p in parts)
    sources = tuple(source for p in parts for source in p.parts)
    return Parameter(joined, (rows, *parts[0].shape[1:]), parts[0].dtype, sources)


def fuse_add_norm(graph: Graph) -> Graph:
    """add followed by rms_norm of the sum becomes add_rms_norm: one pass over the residual."""
    readers = graph.consumers()
    fused: dict[int, Node] = {}  # id of the add -> its replacement
    dropped: set[int] = set()
    for node in graph.nodes:
        if node.op != "add" or len(graph.tensors[node.inputs[1]].shape) == 1:
            continue
        norms = [n for n in readers.get(node.outputs[0], []) if n.op == "rms_norm"]
        width = graph.tensors[node.outputs[0]].shape[-1]
        if len(norms) != 1 or graph.tensors[norms[0].inputs[1]].shape[0] != width:
            continue
        norm = norms[0]
        fused[id(node)] = Node(
            "add_rms_norm",
            (*node.inputs, norm.inputs[1]),
            (node.outputs[0], norm.outputs[0]),
            norm.attrs,
        )
        dropped.add(id(norm))
    nodes = [fused.get(id(n), n) for n in graph.nodes if id(n) not in dropped]
    return graph.with_nodes(nodes)
