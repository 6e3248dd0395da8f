"""Parallax: a decoder that no family of llmforge has. docs/model_definition.md explains this file.

A block is parallel: one linear gives q, k, v and the hidden layer of an MLP, whose activation is
the squared ReLU. What attention and MLP give together is scaled by a factor of the layer's own
before it is added to the residual.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import Family, rename
from llmforge.checkpoint.hf_config import Fields, parse_rope, read_dtype
from llmforge.checkpoint.mapping import Ignore, Rule
from llmforge.checkpoint.params import ParamSpec
from llmforge.model.definition import Definition
from llmforge.model.graph import Graph, Tensor
from llmforge.model.rank import RankBuilder
from llmforge.parallel import Segment, Shard, Topology, cut


def read_config(family: Family, fields: Fields) -> ModelConfig:
    """config.json → ModelConfig; what it has no field for goes into `settings`."""
    hidden, heads = fields.integer("width"), fields.integer("heads")
    layers = fields.integer("depth")
    max_position = fields.integer("context")
    head_dim = hidden // heads
    return ModelConfig(
        family=family.name,
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocabulary"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("kv_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("mlp_width"),
        max_position=max_position,
        norm_eps=fields.number("eps", 1e-5),
        rope=parse_rope(fields, fields, head_dim, max_position, 10000.0),
        activation="relu2",
        sliding_window=(None,) * layers,
        eos_token_ids=fields.token_ids("eos_token_id", ()),
        settings={"block_scales": list(fields.numbers("block_scales", layers))},
    )


def parameters(config: ModelConfig) -> Iterator[ParamSpec]:
    """Every parameter with its whole shape, and how tensor-parallel ranks share it."""
    hidden, head_dim, mlp = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    vocabulary = cut(0, config.vocab_size, pad=True)
    # A rank holds its heads' rows of q, k and v, then its rows of the hidden layer.
    heads = (Segment(q, head_dim), Segment(kv, head_dim), Segment(kv, head_dim))
    fused = Shard(0, (*heads, Segment(mlp)))
    yield ParamSpec("tokens.weight", (config.vocab_size, hidden), vocabulary, init_std=1.0)
    for i in range(config.num_layers):
        yield ParamSpec(f"blocks.{i}.norm.weight", (hidden,), init_mean=1.0, init_std=0.02)
        yield ParamSpec(
            f"blocks.{i}.fused.weight", (q + 2 * kv + mlp, hidden), fused, init_std=hidden**-0.5
        )
        yield ParamSpec(
            f"blocks.{i}.mix.weight", (hidden, q), cut(1, q, head_dim), init_std=q**-0.5
        )
        yield ParamSpec(f"blocks.{i}.down.weight", (hidden, mlp), cut(1, mlp), init_std=mlp**-0.5)
    yield ParamSpec("norm.weight", (hidden,), init_mean=1.0, init_std=0.02)
    yield ParamSpec("logits.weight", (config.vocab_size, hidden), vocabulary, init_std=hidden**-0.5)


RULES = (
    rename("wte", "tokens.weight"),
    rename("h{i}.gain", "blocks.{i}.norm.weight"),
    # Stored as [in_features, out_features].
    Rule(("h{i}.w_in",), ("blocks.{i}.fused.weight",), lambda arrays, config: [arrays[0].T]),
    rename("h{i}.w_mix", "blocks.{i}.mix.weight"),
    rename("h{i}.w_down", "blocks.{i}.down.weight"),
    rename("gain", "norm.weight"),
    rename("unembed", "logits.weight"),
)


def trace(config: ModelConfig, topology: Topology, rank: int) -> Graph:
    """What `rank` computes."""
    specs = {spec.name: spec for spec in parameters(config)}
    g = RankBuilder(config, topology, rank, specs)
    x = g.embed_tokens("tokens.weight") if g.is_first_stage else g.receive_hidden()
    assert config.rope is not None
    table = g.rope_table(config.rope)
    for layer in g.layers:
        x = _block(g, x, table, layer)
    if not g.is_last_stage:
        return g.send_hidden(x)
    x = g.select_rows(x, g.inputs["logit_rows"])
    x = g.rms_norm(x, g.weight("norm.weight"), eps=config.norm_eps)
    return g.finish(g.linear(x, g.weight("logits.weight")))


def _block(g: RankBuilder, x: Tensor, table: Tensor, layer: int) -> Tensor:
    config, head_dim, name = g.config, g.config.head_dim, f"blocks.{layer}"
    q_heads, kv_heads = g.heads(config.num_heads), g.heads(config.num_kv_heads)
    normed = g.rms_norm(x, g.weight(f"{name}.norm.weight"), eps=config.norm_eps)
    fused = g.column_linear(normed, f"{name}.fused")
    q_size, kv_size = q_heads * head_dim, kv_heads * head_dim
    mlp_size = int(fused.shape[-1]) - q_size - 2 * kv_size
    q, k, v, up = g.split(fused, (q_size, kv_size, kv_size, mlp_size))
    q, k = (g.rope(t, table, head_dim=head_dim) for t in (q, k))
    caches = g.kv_cache(layer, kv_heads, head_dim, config.dtype)
    attended = g.attention(q, k, v, caches, head_dim=head_dim, scale=head_dim**-0.5)
    activated = g.activation(up, activation="relu2")
    # Ranks have shares of both sums, and meet once for the two of them.
    both = g.total(g.row_linear(attended, f"{name}.mix"), g.row_linear(activated, f"{name}.down"))
    return g.add(x, g.scale(both, factor=config.settings["block_scales"][layer]))


DEFINITION = Definition(
    family=Family(
        name="parallax",
        architectures=("ParallaxForCausalLM",),
        model_types=("parallax",),
        read_config=read_config,
        rules=RULES,
        base_prefix="",
        ignored=(Ignore(r"training_step", "it is not a weight"),),
    ),
    parameters=parameters,
    trace=trace,
)
