"""The one list of a decoder's parameters: names, whole shapes, and how ranks share them.

Linear weights are [out_features, in_features]. Column-parallel layers (q, k, v, gate, up) are
cut along out_features by head or by row; row-parallel ones (o, down) along in_features, and their
biases are whole on every rank, added after the all-reduce; embedding and head are cut along the
vocabulary, padded where it does not divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmforge.checkpoint.config import ModelConfig
from llmforge.parallel import REPLICATED, Shard, cut


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of the whole model, and its shard.

    Random weights (sources/random.py) are drawn with mean `init_mean` and standard deviation
    `init_std`, which keep activations of order one.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard = REPLICATED
    init_std: float = 0.0
    init_mean: float = 0.0


EMBEDDING = "embed.weight"
HEAD = "head.weight"


def layer_prefix(layer: int) -> str:
    return f"layers.{layer}."


def parameters(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model by name, in the order of the forward pass."""
    return {spec.name: spec for spec in _parameters(config)}


def _parameters(config: ModelConfig) -> Iterator[ParamSpec]:
    vocabulary = cut(0, config.vocab_size, pad=True)
    hidden = config.hidden_size
    yield ParamSpec(EMBEDDING, (config.vocab_size, hidden), vocabulary, init_std=1.0)
    for layer in range(config.num_layers):
        yield from _attention(config, layer_prefix(layer))
        yield from _mlp(config, layer_prefix(layer))
    yield _norm("final_norm.weight", hidden)
    if not config.tied_embeddings:
        shape = (config.vocab_size, hidden)
        yield ParamSpec(HEAD, shape, vocabulary, init_std=hidden**-0.5)


def _attention(config: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    hidden, head_dim = config.hidden_size, config.head_dim
    yield _norm(f"{prefix}attention_norm.weight", hidden)
    for name, heads in (
        ("q", config.num_heads),
        ("k", config.num_kv_heads),
        ("v", config.num_kv_heads),
    ):
        size = heads * head_dim
        yield from _linear(
            f"{prefix}attention.{name}", size, hidden, cut(0, size, head_dim), config.qkv_bias
        )
    if config.qk_norm:
        yield _norm(f"{prefix}attention.q_norm.weight", head_dim)
        yield _norm(f"{prefix}attention.k_norm.weight", head_dim)
    size = config.num_heads * head_dim
    yield from _row_linear(
        f"{prefix}attention.o", hidden, cut(1, size, head_dim), config.attention_output_bias, config
    )


def _mlp(config: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    hidden, size = config.hidden_size, config.intermediate_size
    yield _norm(f"{prefix}mlp_norm.weight", hidden)
    for name in ("gate", "up"):
        yield from _linear(f"{prefix}mlp.{name}", size, hidden, cut(0, size), config.mlp_bias)
    yield from _row_linear(f"{prefix}mlp.down", hidden, cut(1, size), config.mlp_bias, config)


def _norm(name: str, size: int) -> ParamSpec:
    return ParamSpec(name, (size,), init_std=0.02, init_mean=1.0)


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
