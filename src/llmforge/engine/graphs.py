"""The graphs of a model's ranks, before a target rewrites them: traced, rewritten by the user's own
passes, and checked where the user's own code had a part in them."""

from __future__ import annotations

from collections.abc import Sequence

from llmforge.artifact import Warn, listed, no_warning
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.errors import DefinitionError
from llmforge.model import decoder
from llmforge.model.definition import Definition, OwnPass
from llmforge.model.graph import Graph, Parameter
from llmforge.parallel import Topology

COLLECTIVES = ("all_reduce", "all_gather")


def rank_graphs(
    config: ModelConfig,
    topology: Topology,
    definition: Definition | None = None,
    passes: Sequence[OwnPass] = (),
    warn: Warn = no_warning,
) -> list[Graph]:
    """The graph of every rank. Raises DefinitionError where the model has a definition that is not
    given, and for graphs of the user's own that cannot be those of this model."""
    _check_definition(config, definition, warn)
    trace = decoder.trace if definition is None else definition.trace
    graphs = [trace(config, topology, rank) for rank in range(topology.world_size)]
    if definition is not None:
        graphs = _checked(graphs, config, topology, definition.file)
        for rewrite in definition.passes:
            graphs = _checked([rewrite(g) for g in graphs], config, topology, definition.file)
    for own in passes:
        graphs = _checked([own.rewrite(g) for g in graphs], config, topology, own.name)
    return graphs


def _check_definition(config: ModelConfig, definition: Definition | None, warn: Warn) -> None:
    if config.own is None:
        return
    if definition is None:
        raise DefinitionError(
            f"this model was converted with the definition {config.own.file} "
            f"({config.own.digest}): give that file with --definition"
        )
    if definition.digest != config.own.digest:
        warn(
            f"{definition.file} has changed since the model was converted with it: "
            f"{config.own.digest} then, {definition.digest} now"
        )
    if (now := definition.recorded(config).own) and now.parameters != config.own.parameters:
        raise DefinitionError(
            f"{definition.file} lists other parameters than when the model was converted with it: "
            "convert the model again"
        )


def _checked(
    graphs: list[Graph], config: ModelConfig, topology: Topology, where: str
) -> list[Graph]:
    """The graphs, if they can be those of the ranks. Raises DefinitionError."""
    specs = parameters(config)
    for rank, graph in enumerate(graphs):
        if not isinstance(graph, Graph):
            raise DefinitionError(f"{where} gives {type(graph).__name__} for a Graph")
        try:
            graph.validate()
            _check_parameters(graph, specs, topology, rank)
            _check_outputs(graph, config, topology, rank)
        except ValueError as error:
            raise DefinitionError(f"{where}: the graph of rank {rank}: {error}") from error
    for rank, graph in enumerate(graphs):
        first = topology.rank(topology.stage(rank), 0)
        if _collectives(graph) != _collectives(graphs[first]):
            raise DefinitionError(
                f"{where}: the ranks {first} and {rank} share their layers, but do not meet at the "
                "same all_reduce and all_gather ops: they would wait for each other forever"
            )
    if (sent := _messages(graphs, "send")) != (received := _messages(graphs, "recv")):
        pairs = ", ".join(f"{a} to {b}" for a, b in sorted({*sent} ^ {*received}) or sorted(sent))
        raise DefinitionError(f"{where}: what ranks send and receive does not agree: {pairs}")
    return graphs


def _check_parameters(
    graph: Graph, specs: dict[str, ParamSpec], topology: Topology, rank: int
) -> None:
    if unknown := [part for p in graph.parameters for part in p.parts if part not in specs]:
        raise ValueError(f"it reads what the model has no parameters for: {listed(unknown)}")

    def expected(parameter: Parameter) -> tuple[int, ...]:
        shapes = [
            spec.shard.local_shape(
                spec.shape,
                topology.tensor_rank(rank),
                topology.tensor_parallel,
                topology.expert_parallel,
            )
            for spec in (specs[part] for part in parameter.parts)
        ]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    for parameter in graph.parameters:
        if parameter.shape != (shape := expected(parameter)):
            raise ValueError(
                f"{parameter.name} has the shape {list(parameter.shape)}; this rank's share of it "
                f"is {list(shape)}"
            )


def _check_outputs(graph: Graph, config: ModelConfig, topology: Topology, rank: int) -> None:
    if rank != 0 and not topology.is_last_stage(rank):
        return
    shapes = [graph.tensors[name].shape for name in graph.outputs]
    if shapes != [("rows", config.vocab_size)]:
        raise ValueError(
            f"its output must be the logits [rows, {config.vocab_size}], not "
            f"{', '.join(str(list(shape)) for shape in shapes) or 'nothing'}"
        )


def _collectives(graph: Graph) -> list[tuple[str, object]]:
    """What the ranks of a stage must do alike, in order."""
    return [
        (node.op, graph.tensors[node.outputs[0]].shape)
        for node in graph.nodes
        if node.op in COLLECTIVES
    ]


def _messages(graphs: Sequence[Graph], op: str) -> list[tuple[int, int]]:
    """(from, to) of every send or recv."""
    pairs = [
        (rank, node.attrs["to"]) if op == "send" else (node.attrs["source"], rank)
        for rank, graph in enumerate(graphs)
        for node in graph.nodes
        if node.op == op
    ]
    return sorted(pairs)
