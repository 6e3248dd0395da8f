"""The graph: what tracing gives, what passes keep, what JSON preserves, what is refused."""

import dataclasses

import pytest

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
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
# Everything that CONFIG is not.
OTHER = dataclasses.replace(
    CONFIG,
    rope=RopeConfig(1e4, 6),
    window_rope=RopeConfig(
        1e4,
        12,
        "longrope",
        original_max_position=16,
        short_factor=(1.0,) * 6,
        long_factor=(2.0,) * 6,
    ),
    unrotated_layers=(3,),
    learned_positions=128,
    alibi_slopes=(0.5, 0.25, 0.125, 0.0625),
    norm="layer",
    norm_bias=True,
    embedding_norm=True,
    post_norm=True,
    qk_norm_span="heads",
    parallel_block=True,
    shared_norm=True,
    gated_mlp=False,
    head_bias=True,
    attention_scale=0.2,
    attention_softcap=5.0,
    logit_softcap=6.0,
    embedding_scale=3.0,
    residual_scale=0.5,
    logit_scale=0.25,
)
WHOLE_QK_NORM = dataclasses.replace(CONFIG, qk_norm_span="all", pre_norm=False, post_norm=True)
MOE = dataclasses.replace(
    CONFIG,
    qk_norm=False,
    attention_sinks=True,
    qkv_clamp=8.0,
    moe=MoeConfig(
        num_experts=8,
        top_k=3,
        expert_size=20,
        dense_layers=(1,),
        router_bias=True,
        correction=True,
        expert_bias=True,
        shared_size=12,
        shared_gate=True,
    ),
)
LATENT = dataclasses.replace(
    CONFIG,
    num_kv_heads=1,
    qkv_bias=False,
    attention_output_bias=False,
    qk_norm=False,
    sliding_window=(None,) * 5,
    rope=RopeConfig(1e4, 4),
    latent=LatentConfig(q_rank=20, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6),
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
TOPOLOGIES = [Topology(), Topology(2), Topology(4), Topology(1, 3), Topology(2, 2), Topology(1, 5)]
TOPOLOGIES += [Topology(2, 1, 2), Topology(4, 1, 2), Topology(2, 2, 2)]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_every_op_has_a_meaning_a_cpu_kernel_and_a_builder_method() -> None:
    assert set(OPS) == set(REFERENCE) == set(KERNELS)
    for op in OPS:
        assert callable(getattr(GraphBuilder, op))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(
    "config",
    [CONFIG, TIED, OTHER, WHOLE_QK_NORM, MOE, LATENT],
    ids=["plain", "tied", "other", "whole-qk-norm", "moe", "latent"],
)
def test_every_parameter_is_in_the_graphs_of_its_ranks(
    config: ModelConfig, topology: Topology
) -> None:
    for passes in ((), PASSES):
        held: list[str] = []
        for stage in range(topology.pipeline_parallel):
            # The first rank of a stage has what the others have; some biases only it adds.
            first = apply(trace(config, topology, topology.rank(stage, 0)), passes)
            last = topology.rank(stage, topology.tensor_parallel - 1)
            parts, others = (
                [part for p in graph.parameters for part in p.parts]
                for graph in (first, apply(trace(config, topology, last), passes))
            )
            held += parts
            assert all(name.endswith("down.bias") for name in set(parts) ^ set(others))
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
@pytest.mark.parametrize(
    "config", [CONFIG, OTHER, MOE, LATENT], ids=["plain", "other", "moe", "latent"]
)
def test_json_round_trip(config: ModelConfig, topology: Topology) -> None:
    for rank in range(topology.world_size):
        graph = apply(trace(config, topology, rank), PASSES)
        assert Graph.from_json(graph.to_json()) == graph


def test_a_config_without_the_newer_fields_means_what_it_meant() -> None:
    """Manifests are read that were written when a config ended with these."""
    last = [field.name for field in dataclasses.fields(ModelConfig)].index("eos_token_ids")
    names = [field.name for field in dataclasses.fields(ModelConfig)][: last + 1]
    values = {name: value for name, value in CONFIG.to_dict().items() if name in names}
    values["rope"] = {"theta": 1e4, "dim": 12}
    assert ModelConfig.from_dict(values) == CONFIG
    graph = apply(trace(CONFIG, Topology(2), 0), PASSES)
    assert set(ops(graph)) == {
        *("embed", "all_reduce", "rope_table", "rms_norm", "linear", "split", "rope", "attention"),
        *("add", "add_rms_norm", "gated_activation", "select_rows", "all_gather"),
    }


def test_merge_linears_joins_a_parallel_block_by_biases() -> None:
    merged = [p.parts for p in merge_linears(trace(OTHER, Topology(), 0)).parameters]
    names = [f"layers.0.attention.{n}.weight" for n in "qkv"]
    assert tuple(names) in merged, "q, k and v have biases here, up has none"
    alike = dataclasses.replace(OTHER, mlp_bias=True)
    merged = [p.parts for p in merge_linears(trace(alike, Topology(), 0)).parameters]
    assert (*names, "layers.0.mlp.up.weight") in merged


def test_ranks_meet_once_in_a_parallel_block() -> None:
    parallel = dataclasses.replace(CONFIG, parallel_block=True, mlp_bias=True)
    for shared, ranks in ((False, 2), (True, 4)):
        graph = trace(dataclasses.replace(parallel, shared_norm=shared), Topology(ranks), 0)
        # One for the embedding, one a layer; the biases of o and down are added behind it.
        assert ops(graph).count("all_reduce") == 1 + CONFIG.num_layers
        for name in ("attention.o.bias", "mlp.down.bias"):
            [reader] = graph.consumers()[f"layers.0.{name}"]
            assert reader.op == "add", "once, to the sum of all ranks"
    graph = trace(CONFIG, Topology(2), 0)
    assert ops(graph).count("all_reduce") == 1 + 2 * CONFIG.num_layers


def test_each_rank_has_the_slopes_of_its_heads() -> None:
    for ranks in (1, 2, 4):
        slopes: list[float] = []
        for rank in range(ranks):
            nodes = trace(OTHER, Topology(ranks), rank).nodes
            slopes += next(n for n in nodes if n.op == "scored_attention").attrs["slopes"]
        assert tuple(slopes) == OTHER.alibi_slopes


@pytest.mark.parametrize("topology", [Topology(4, 1, 1), Topology(4, 1, 2), Topology(4, 1, 4)])
def test_each_expert_and_each_bias_is_counted_once(topology: Topology) -> None:
    assert MOE.moe is not None
    nodes = [
        next(n for n in trace(MOE, topology, rank).nodes if n.op == "experts") for rank in range(4)
    ]
    each = MOE.moe.num_experts // topology.expert_parallel
    ranks = 4 // topology.expert_parallel
    assert [n.attrs["first"] for n in nodes] == [rank // ranks * each for rank in range(4)]
    assert [bool(n.inputs[6]) for n in nodes] == [rank % ranks == 0 for rank in range(4)]


def test_a_mixture_is_summed_over_ranks_once() -> None:
    graph = trace(MOE, Topology(2), 0)
    assert ops(graph).count("all_reduce") == 1 + 2 * MOE.num_layers  # and the embedding's
    after = [n for n in graph.nodes if n.op == "experts"]
    assert len(after) == MOE.num_layers - 1, "one layer has a plain MLP"
    shared = next(n for n in graph.nodes if n.op == "token_gate")
    [total] = graph.consumers()[shared.outputs[0]]
    [reduce] = graph.consumers()[total.outputs[0]]
    assert (total.op, reduce.op) == ("add", "all_reduce")


def test_latents_have_one_cache_and_merge_into_one_product() -> None:
    graph = merge_linears(trace(LATENT, Topology(2), 0))
    assert [t.shape for t in graph.states] == [("blocks", "block_size", 1, 20)] * 5
    merged = [p.parts for p in graph.parameters if len(p.parts) > 1]
    prefix = "layers.0.attention."
    assert tuple(f"{prefix}{n}.weight" for n in ("q_a", "latent", "k_rope")) in merged
    assert tuple(f"{prefix}{n}.weight" for n in ("q", "q_rope")) in merged


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


def test_dimensions_have_known_names() -> None:
    graph = trace(CONFIG, Topology(), 0)
    for name in ("token_ids", graph.outputs[0]):
        odd = dataclasses.replace(graph.tensors[name], shape=("words", 3))
        with pytest.raises(ValueError, match="has the dimension 'words'; known: tokens, "):
            dataclasses.replace(graph, tensors={**graph.tensors, name: odd}).validate()


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


def test_a_graph_can_be_seen_after_each_pass() -> None:
    seen: dict[str, Graph] = {}
    final = apply(trace(CONFIG, Topology(), 0), PASSES, seen.__setitem__)
    assert list(seen) == ["merge_linears", "fuse_add_norm"]
    assert "add_rms_norm" not in ops(seen["merge_linears"]) and seen["fuse_add_norm"] == final
