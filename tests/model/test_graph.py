"""The graph: what tracing gives, what passes keep, what JSON preserves, what is refused."""

import dataclasses

import pytest

from llmforge.checkpoint.config import ModelConfig, RopeConfig
from llmforge.checkpoint.params import parameters
from llmforge.engine.cpu.kernels import KERNELS
from llmforge.engine.cpu.target import PASSES
from llmforge.engine.memory import plan_memory
from llmforge.engine.step import Limits
from llmforge.model.builder import GraphBuilder
from llmforge.model.decoder import trace
from llmforge.model.graph import Graph, Node
from llmforge.model.ops import OPS
from llmforge.model.passes import apply, fuse_add_norm, merge_linears
from llmforge.model.reference import REFERENCE
from llmforge.parallel import Topology

CONFIG = ModelConfig(
    family="test",
    dtype="float32",
    vocab_size=99,
    hidden_size=48,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=64,
    max_position=128,
    norm_eps=1e-5,
    rope=RopeConfig(1e4, 12),
    qkv_bias=True,
    attention_output_bias=True,
    qk_norm=True,
    sliding_window=(None, 8, None, None, 8),
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
TOPOLOGIES = [Topology(), Topology(2), Topology(4), Topology(1, 3), Topology(2, 2), Topology(1, 5)]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_every_op_has_a_meaning_a_cpu_kernel_and_a_builder_method() -> None:
    assert set(OPS) == set(REFERENCE) == set(KERNELS)
    for op in OPS:
        assert callable(getattr(GraphBuilder, op))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_every_parameter_is_in_the_graphs_of_its_ranks(
    config: ModelConfig, topology: Topology
) -> None:
    for passes in ((), PASSES):
        held: list[str] = []
        for stage in range(topology.pipeline_parallel):
            rank = topology.rank(stage, topology.tensor_parallel - 1)
            graph = apply(trace(config, topology, rank), passes)
            held += [part for p in graph.parameters for part in p.parts]
        expected = list(parameters(config))
        if config.tied_embeddings and topology.pipeline_parallel > 1:
            expected.append("embed.weight")  # the last stage has its own copy for the head
        assert sorted(held) == sorted(expected)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_what_one_stage_sends_the_next_receives(topology: Topology) -> None:
    graphs = [trace(CONFIG, topology, rank) for rank in range(topology.world_size)]
    sent = sorted(
        (rank, n.attrs["to"]) for rank, g in enumerate(graphs) for n in g.nodes if n.op == "send"
    )
    received = sorted(
        (n.attrs["source"], rank)
        for rank, g in enumerate(graphs)
        for n in g.nodes
        if n.op == "recv"
    )
    assert sent == received
    collectives = {tuple(op for op in ops(g) if op.startswith("all_")) for g in graphs}
    assert len(collectives) <= topology.pipeline_parallel, "ranks of a stage communicate alike"


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_json_round_trip(topology: Topology) -> None:
    for rank in range(topology.world_size):
        graph = apply(trace(CONFIG, topology, rank), PASSES)
        assert Graph.from_json(graph.to_json()) == graph


def test_merge_linears_joins_qkv_and_gate_up_and_nothing_else() -> None:
    graph = merge_linears(trace(CONFIG, Topology(), 0))
    merged = [p.parts for p in graph.parameters if len(p.parts) > 1]
    prefix = "layers.0."
    assert tuple(f"{prefix}attention.{n}.weight" for n in "qkv") in merged
    assert tuple(f"{prefix}attention.{n}.bias" for n in "qkv") in merged
    assert (f"{prefix}mlp.gate.weight", f"{prefix}mlp.up.weight") in merged
    assert len(merged) == 3 * CONFIG.num_layers
    names = [p.name for p in graph.parameters]
    assert f"{prefix}attention.q+k+v.weight" in names


def test_fuse_add_norm_fuses_every_residual_norm_within_a_stage() -> None:
    graph = fuse_add_norm(trace(CONFIG, Topology(), 0))
    # All but the first norm follow an add; the last one stands behind select_rows.
    assert ops(graph).count("add_rms_norm") == 2 * CONFIG.num_layers - 1
    assert ops(graph).count("add") == 1


def test_parameters_stand_in_the_order_of_their_use() -> None:
    graph = apply(trace(CONFIG, Topology(), 0), PASSES)
    layers = [int(p.name.split(".")[1]) for p in graph.parameters if p.name.startswith("layers")]
    assert layers == sorted(layers)
    assert graph.parameters[0].name == "embed.weight"


def test_a_graph_that_reads_ahead_is_refused() -> None:
    graph = trace(CONFIG, Topology(), 0)
    with pytest.raises(ValueError, match="before it is computed"):
        dataclasses.replace(graph, nodes=graph.nodes[::-1]).validate()
    with pytest.raises(ValueError, match="a second time"):
        dataclasses.replace(graph, nodes=(graph.nodes[0], *graph.nodes)).validate()
    with pytest.raises(ValueError, match="never computed"):
        dataclasses.replace(graph, nodes=graph.nodes[:-1]).validate()


def test_an_op_called_wrongly_is_refused() -> None:
    g = GraphBuilder()
    x = g.embed(g.inputs["token_ids"], g.parameter("embed", (10, 4), "float32"))
    with pytest.raises(ValueError, match="in_features: 4 and 5 differ"):
        g.linear(x, g.parameter("w", (3, 5), "float32"))
    with pytest.raises(ValueError, match="not whole runs of 3"):
        g.rms_norm(x, g.parameter("n", (3,), "float32"), eps=1e-5)
    with pytest.raises(ValueError, match="takes the attributes"):
        OPS["linear"].check((x, x, None), {"eps": 1})
    with pytest.raises(ValueError, match="needs its input weight"):
        OPS["linear"].check((x, None, None), {})


def test_the_memory_plan_counts_bytes() -> None:
    limits = Limits(
        max_batch_size=2, max_seq_len=32, max_num_tokens=16, block_size=8, num_blocks=10
    )
    plan = plan_memory(trace(CONFIG, Topology(), 0), limits)
    elements = sum(
        spec.shape[0] * (spec.shape[1] if len(spec.shape) > 1 else 1)
        for spec in parameters(CONFIG).values()
    )
    assert plan.weights == 4 * elements
    assert plan.kv_cache == 5 * 2 * 10 * 8 * 2 * 12 * 4
    # At its widest an MLP holds gate, up, their product and the residual for 16 tokens.
    assert plan.activations >= 16 * (3 * 64 + 48) * 4


def test_nodes_compare_by_value() -> None:
    assert Node("add", ("a", "b"), ("c",)) == Node("add", ("a", "b"), ("c",))
