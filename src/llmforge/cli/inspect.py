"""`llmforge inspect`: what a checkpoint or an engine holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmforge import checksum
from llmforge.cli.options import PATH, definition_option, json_option, own_definition
from llmforge.errors import SettingsError
from llmforge.settings import ProjectSettings

if TYPE_CHECKING:
    from llmforge.checkpoint.store import Checkpoint
    from llmforge.engine.store import Engine
    from llmforge.model.graph import Graph, Node, Parameter


@click.command("inspect")
@click.argument("path", type=PATH, metavar="CKPT|ENGINE")
@click.option("--graph", "show_graph", is_flag=True, help="Show a rank's graph instead.")
@click.option(
    "--rank", type=click.IntRange(min=0), metavar="N", help="The graph's rank. Default: 0."
)
@definition_option
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="FILE.py:FUNCTION",
    help="Rewrite a checkpoint's graph by a function of your own first. The file is executed.",
)
@json_option
def command(
    path: Path,
    show_graph: bool,
    rank: int | None,
    definition_file: Path | None,
    passes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what a checkpoint or an engine holds.

    With --graph: what a rank computes, node by node, and where it communicates; for a checkpoint,
    what the model computes on one rank before any target's rewriting.
    """
    from llmforge.checkpoint.store import Checkpoint
    from llmforge.cli.console import print_json
    from llmforge.cli.stages import kind_of
    from llmforge.engine.store import Engine

    if rank is not None and not show_graph:
        raise SettingsError("--rank says whose graph to show: give --graph with it")
    if (definition_file or passes) and (not show_graph or kind_of(path) != "checkpoint"):
        raise SettingsError(
            "--definition and --pass are for the graph of a checkpoint: give --graph with them (an "
            "engine holds its graphs)"
        )
    opened: Checkpoint | Engine
    opened = Checkpoint.open(path) if kind_of(path) == "checkpoint" else Engine.open(path)
    if show_graph:
        graph = _graph(opened, rank or 0, definition_file, passes)
        if as_json:
            print(graph.to_json(), end="", flush=True)
        else:
            _print_graph(graph, f"Graph of rank {rank or 0} of {path}")
    elif as_json:
        print_json({"path": str(path), "digest": opened.digest, **_manifest_data(opened)})
    else:
        _print_summary(opened)


def _manifest_data(opened: Checkpoint | Engine) -> dict[str, Any]:
    from llmforge.engine.store import Engine

    return opened.manifest.data if isinstance(opened, Engine) else opened.manifest


def _print_summary(opened: Checkpoint | Engine) -> None:
    from llmforge.artifact import size_text
    from llmforge.checkpoint.store import num_parameters
    from llmforge.cli.console import print_table
    from llmforge.cli.stages import MEMORY_COLUMNS, memory_rows
    from llmforge.engine.store import Engine

    data = _manifest_data(opened)
    files = data["files"]
    total = sum(entry["size"] for entry in files.values())
    rows = [
        ("digest", opened.digest),
        ("format version", data["format_version"]),
        ("made by", f"llmforge {data.get('llmforge', '(unknown)')}"),
        *((f"made from: {name}", value) for name, value in _flat(data.get("created_from", {}))),
        ("parameters", f"{num_parameters(opened.config):,}"),
        ("size", f"{size_text(total)} in {len(files)} files"),
    ]
    if isinstance(opened, Engine):
        rows += [("target", opened.target), *dataclasses.asdict(opened.topology).items()]
        rows += dataclasses.asdict(opened.limits).items()
        rows += _flat(data.get("target_details", {}), f"{opened.target}: ")
    print_table(f"{data['kind'].capitalize()} {opened.directory}", ("", ""), rows)
    print_table("Model", ("", ""), _flat(_config_rows(opened.config.to_dict())))
    if isinstance(opened, Engine):
        print_table(
            "Memory of each rank", MEMORY_COLUMNS, memory_rows(data["memory"]), right=(1, 2, 3, 4)
        )
    print_table(
        "Files",
        ("file", "size", checksum.NAME),
        [(name, size_text(e["size"]), e[checksum.NAME]) for name, e in files.items()],
        right=(1,),
    )


def _config_rows(config: dict[str, Any]) -> dict[str, Any]:
    """The config, with layers of the same window told in one word, and parameters counted."""
    if config["own"]:
        config["own"]["parameters"] = f"{len(config['own']['parameters'])} parameters"
    windows = config["sliding_window"]
    if len(set(windows)) == 1:
        config["sliding_window"] = "none" if windows[0] is None else f"{windows[0]} in all layers"
    return config


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as rows with dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            rows.append((f"{prefix}{name}", "none" if shown in (None, "") else shown))
    return rows


def _graph(
    opened: Checkpoint | Engine, rank: int, definition_file: Path | None, passes: Sequence[str]
) -> Graph:
    from llmforge.cli.errors import warn
    from llmforge.engine.graphs import rank_graphs
    from llmforge.engine.store import Engine, read_graph
    from llmforge.model.definition import load_pass
    from llmforge.parallel import Topology

    topology = opened.topology if isinstance(opened, Engine) else Topology()
    if rank >= topology.world_size:
        raise SettingsError(
            f"--rank must be from 0 to {topology.world_size - 1} for {opened.directory}, not {rank}"
        )
    if isinstance(opened, Engine):
        return read_graph(opened.rank_directory(rank))
    definition = own_definition(definition_file, ProjectSettings())
    own = [load_pass(named) for named in passes]
    return rank_graphs(opened.config, topology, definition, own, warn)[rank]


def _print_graph(graph: Graph, title: str) -> None:
    from llmforge.cli.console import print_table

    tensors = [*((t, "input") for t in graph.inputs), *((t, "state") for t in graph.states)]
    print_table(
        title,
        ("tensor", "kind", "shape", "dtype"),
        [
            *((t.name, kind, _shape(t.shape), t.dtype) for t, kind in tensors),
            *((p.name, _origin(p), _shape(p.shape), p.dtype) for p in graph.parameters),
        ],
    )
    print_table(
        "Nodes, in order",
        ("", "op", "inputs", "outputs", "attributes"),
        [(number, *_node_row(graph, node)) for number, node in enumerate(graph.nodes)],
        right=(0,),
    )
    print(f"outputs: {', '.join(_typed(graph, name) for name in graph.outputs)}", flush=True)


def _origin(parameter: Parameter) -> str:
    if parameter.parts == (parameter.name,):
        return "parameter"
    return f"parameter of {', '.join(parameter.parts)}"


def _node_row(graph: Graph, node: Node) -> tuple[str, ...]:
    attributes = (
        f"{name}={json.dumps(value) if isinstance(value, dict | list) else value}"
        for name, value in node.attrs.items()
        if value is not None
    )
    return (
        node.op,
        ", ".join(_typed(graph, name) for name in node.inputs if name),
        ", ".join(_typed(graph, name) for name in node.outputs),
        " ".join(attributes),
    )


def _typed(graph: Graph, name: str) -> str:
    return f"{name}{_shape(graph.tensors[name].shape)}"


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
