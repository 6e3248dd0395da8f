"""The one list of a decoder's parameters: names, whole shapes, and how ranks share them.

Linear weights are [out_features, in_features]. Column-parallel layers (q, k, v, gate, up) are
cut along out_features by head or by row; row-parallel ones (o, down) along in_features, and their
biases are whole on every rank, added after the all-reduce; embedding and head are cut along the
vocabulary, padded where it does not divide. What a config does not have is not listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig
from llmforge.parallel import REPLICATED, Segment, Shard, cut


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of the whole model, and its shard.

    Random weights (sources/random.py) are drawn with mean `init_mean` and standard deviation
    `init_std`, which keep activations of order one. `dtype`: where it is not the model's.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard = REPLICATED
    init_std: float = 0.0
    init_mean: float = 0.0
    dtype: str | None = None

    def stored_as(self, config: ModelConfig) -> str:
        """The dtype in the checkpoint and in a rank's weights."""
        return self.dtype or config.dtype

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest, defaults left out."""
        values: dict[str, Any] = {"name": self.name, "shape": list(self.shape)}
        if self.shard != REPLICATED:
            segments = [dataclasses.asdict(segment) for segment in self.shard.segments]
            values["shard"] = {**dataclasses.asdict(self.shard), "segments": segments}
        values |= {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name not in ("name", "shape", "shard")
            and (value := getattr(self, field.name)) != field.default
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParamSpec:
        """The inverse of `to_dict`. Raises TypeError, ValueError or KeyError on anything else."""
        fields = {**values, "shape": tuple(values["shape"])}
        if shard := fields.get("shard"):
            segments = tuple(Segment(**segment) for segment in shard["segments"])
            fields["shard"] = Shard(**{**shard, "segments": segments})
        return cls(**fields)


EMBEDDING = "embed.weight"
EMBEDDING_NORM = "embed_norm"
EMBEDDING_PROJECTION = "embed_projection.weight"
HEAD_PROJECTION = "head_projection.weight"
POSITIONS = "positions.weight"
FINAL_NORM = "final_norm"
HEAD = "head"


def layer_prefix(layer: int) -> str:
    return f"layers.{layer}."


def parameters(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model by name, in the order of the forward pass; of a definition of
    the user's own, in the order in which that lists them."""
    if config.own is not None:
        return {spec.name: spec for spec in map(ParamSpec.from_dict, config.own.parameters)}
    return {spec.name: spec for spec in _parameters(config)}


def _parameters(config: ModelConfig) -> Iterator[ParamSpec]:
    vocabulary = cut(0, config.vocab_size, pad=True)
    hidden = config.hidden_size
    size = config.embedding_size or hidden
    yield ParamSpec(EMBEDDING, (config.vocab_size, size), vocabulary, init_std=1.0)
    if config.embedding_size:
        yield ParamSpec(EMBEDDING_PROJECTION, (hidden, size), init_std=size**-0.5)
    if config.learned_positions:
        yield ParamSpec(POSITIONS, (config.learned_positions, hidden), init_std=0.1)
    if config.embedding_norm:
        yield from _norm(config, EMBEDDING_NORM)
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        if config.pre_norm or config.sum_norm:
            yield from _norm(config, f"{prefix}attention_norm")
        if config.latent is None:
            yield from _attention(config, f"{prefix}attention.")
        else:
            yield from _latent_attention(config, config.latent, f"{prefix}attention.")
        if config.post_norm:
            yield from _norm(config, f"{prefix}attention_post_norm")
        if (config.pre_norm and not config.shared_norm) or config.sum_norm:
            yield from _norm(config, f"{prefix}mlp_norm")
        if (moe := config.layer_moe(layer)) is None:
            yield from _mlp(config, f"{prefix}mlp.", config.intermediate_size)
        else:
            yield from _moe(config, moe, f"{prefix}moe.")
        if config.post_norm:
            yield from _norm(config, f"{prefix}mlp_post_norm")
    if config.final_norm:
        yield from _norm(config, FINAL_NORM)
    if config.embedding_size:
        yield ParamSpec(HEAD_PROJECTION, (size, hidden), init_std=hidden**-0.5)
    if not config.tied_embeddings:
        shape = (config.vocab_size, size)
        yield ParamSpec(f"{HEAD}.weight", shape, vocabulary, init_std=size**-0.5)
    if config.head_bias:
        yield ParamSpec(f"{HEAD}.bias", (config.vocab_size,), vocabulary, init_std=0.02)


def _attention(config: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    for name, count in heads.items():
        size = count * head_dim
        yield from _linear(f"{prefix}{name}", size, hidden, cut(0, size, head_dim), config.qkv_bias)
    if config.attention_sinks:
        yield ParamSpec(f"{prefix}sinks", (config.num_heads,), cut(0, config.num_heads), 1.0)
    if config.qk_norm:
        for name in ("q", "k"):
            yield from _qk_norm(config, f"{prefix}{name}_norm", heads[name] * head_dim)
    size = config.num_heads * head_dim
    yield from _row_linear(
        f"{prefix}o", hidden, cut(1, size, head_dim), config.attention_output_bias, config
    )


def _latent_attention(
    config: ModelConfig, latent: LatentConfig, prefix: str
) -> Iterator[ParamSpec]:
    """Without biases. What a head shares with none is cut by head; the latents, which all heads
    read, are on every rank."""
    hidden, heads, q_in = config.hidden_size, config.num_heads, config.hidden_size
    if latent.q_rank is not None:
        q_in = latent.q_rank
        yield from _linear(f"{prefix}q_a", q_in, hidden, REPLICATED, False)
        yield ParamSpec(f"{prefix}q_a_norm.weight", (q_in,), init_std=0.02, init_mean=1.0)
    for name, size in (("q", latent.nope_dim), ("q_rope", latent.rope_dim)):
        shard = cut(0, heads * size, size)
        yield from _linear(f"{prefix}{name}", heads * size, q_in, shard, False)
    yield from _linear(f"{prefix}latent", latent.kv_rank, hidden, REPLICATED, False)
    yield ParamSpec(f"{prefix}latent_norm.weight", (latent.kv_rank,), init_std=0.02, init_mean=1.0)
    yield from _linear(f"{prefix}k_rope", latent.rope_dim, hidden, REPLICATED, False)
    by_head = cut(0, heads)
    # A key's elements are sums over the latent, whichever side of the product they stand on.
    std = latent.kv_rank**-0.5
    yield ParamSpec(f"{prefix}k_up", (heads, latent.kv_rank, latent.nope_dim), by_head, std)
    yield ParamSpec(f"{prefix}v_up", (heads, latent.value_dim, latent.kv_rank), by_head, std)
    size = heads * latent.value_dim
    yield from _row_linear(f"{prefix}o", hidden, cut(1, size, latent.value_dim), False, config)


def _moe(config: ModelConfig, moe: MoeConfig, prefix: str) -> Iterator[ParamSpec]:
    """Routers are on every rank. Expert weights are stacks: see MoeConfig."""
    hidden, count, size = config.hidden_size, moe.num_experts, moe.expert_size
    yield from _linear(f"{prefix}router", count, hidden, REPLICATED, moe.router_bias)
    if moe.correction:
        # The choice among experts hangs on small differences.
        yield ParamSpec(f"{prefix}router.correction", (count,), init_std=0.02, dtype="float32")
    gate_up = Shard(1, (Segment(size), Segment(size)), count)
    std = hidden**-0.5
    yield ParamSpec(f"{prefix}experts.gate_up.weight", (count, 2 * size, hidden), gate_up, std)
    if moe.expert_bias:
        yield ParamSpec(f"{prefix}experts.gate_up.bias", (count, 2 * size), gate_up, 0.02)
    std = (size * 2 * config.num_layers) ** -0.5
    down = Shard(2, (Segment(size),), count)
    yield ParamSpec(f"{prefix}experts.down.weight", (count, hidden, size), down, std)
    if moe.expert_bias:
        whole = Shard(experts=count)
        yield ParamSpec(f"{prefix}experts.down.bias", (count, hidden), whole, 0.02)
    if moe.shared_size:
        yield from _mlp(config, f"{prefix}shared.", moe.shared_size)
    if moe.shared_gate:
        yield from _linear(f"{prefix}shared_gate", 1, hidden, REPLICATED, False)


def _mlp(config: ModelConfig, prefix: str, size: int) -> Iterator[ParamSpec]:
    hidden = config.hidden_size
    for name in ("gate", "up") if config.gated_mlp else ("up",):
        yield from _linear(f"{prefix}{name}", size, hidden, cut(0, size), config.mlp_bias)
    yield from _row_linear(f"{prefix}down", hidden, cut(1, size), config.mlp_bias, config)


def _norm(config: ModelConfig, name: str) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (config.hidden_size,), init_std=0.02, init_mean=1.0)
    if config.norm_bias:
        yield ParamSpec(f"{name}.bias", (config.hidden_size,), init_std=0.02)


def _qk_norm(config: ModelConfig, name: str, size: int) -> Iterator[ParamSpec]:
    """`size`: the elements of q or k. A norm for all heads alike is on every rank; one that has
    a weight for each of them is cut with them."""
    shared = config.qk_norm_span == "head"
    shape = (config.head_dim if shared else size,)
    shard = REPLICATED if shared else cut(0, size, config.head_dim)
    yield ParamSpec(f"{name}.weight", shape, shard, init_std=0.02, init_mean=1.0)
    if config.qk_norm_bias:
        yield ParamSpec(f"{name}.bias", shape, shard, init_std=0.02)


def _linear(
    name: str, out_features: int, in_features: int, shard: Shard, bias: bool
) -> Iterator[ParamSpec]:
    std = in_features**-0.5
    yield ParamSpec(f"{name}.weight", (out_features, in_features), shard, init_std=std)
    if bias:
        yield ParamSpec(f"{name}.bias", (out_features,), shard, init_std=0.02)


def _row_linear(
    name: str, out_features: int, shard: Shard, bias: bool, config: ModelConfig
) -> Iterator[ParamSpec]:
    in_features = sum(segment.size for segment in shard.segments)
    # Two residual branches a layer: their sum over the depth stays of order one.
    std = (in_features * 2 * config.num_layers) ** -0.5
    yield ParamSpec(f"{name}.weight", (out_features, in_features), shard, init_std=std)
    if bias:
        yield ParamSpec(f"{name}.bias", (out_features,), init_std=0.02)
