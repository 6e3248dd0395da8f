"""Mixtures of experts with ordinary attention: Mixtral, Qwen, OLMoE, Granite, GLM-4.5, DBRX."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig, MoeConfig
from llmforge.checkpoint.families.base import (
    RMS_EPS,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    merged_qkv,
    read_common,
    read_window,
    refuse,
    rename,
    stacked_qkv,
)
from llmforge.checkpoint.families.experts import (
    CORRECTED_MIXTURE,
    DOWN,
    EXPERT_ALIASES,
    GATE_UP,
    MIXTURE,
    experts,
    next_token_layers,
    read_groups,
    read_mixture,
    read_top_k,
    router,
    shared_expert,
)
from llmforge.checkpoint.hf_config import Fields, read_activation, read_rope, read_windows_by_type
from llmforge.checkpoint.mapping import Rule
from llmforge.safetensors_io import Array

# -- Mixtral ---------------------------------------------------------------------------------------


def _read_mixtral(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    moe = read_mixture(fields, count=8, top_k=2, normalize=True)
    windows = (read_window(family, fields),) * layers
    return read_common(family, fields, moe=moe, sliding_window=windows)


_MIXTRAL_RULES: Rules = (
    *MIXTURE,
    router("model.layers.{i}.block_sparse_moe.gate"),
    router("model.layers.{i}.mlp.gate"),
    *experts("model.layers.{i}.block_sparse_moe.experts", "w1", "w3", "w2"),
    *experts("model.layers.{i}.mlp.experts"),
)


# -- Qwen2-MoE and Qwen3-MoE -----------------------------------------------------------------------


def _read_qwen_moe(family: Family, fields: Fields, **own: Any) -> MoeConfig:
    layers = fields.integer("num_hidden_layers")
    count = fields.integer("num_experts", family.default("num_experts"))
    step = fields.integer("decoder_sparse_step", 1)
    only = fields.data.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise fields.bad("mlp_only_layers", "a list of layer numbers")
    return MoeConfig(
        num_experts=count,
        top_k=read_top_k(fields, "num_experts_per_tok", family.default("top_k"), count),
        expert_size=fields.integer("moe_intermediate_size", family.default("expert_size")),
        dense_layers=tuple(i for i in range(layers) if i in only or (i + 1) % step),
        normalize=fields.flag("norm_topk_prob", False),
        **own,
    )


def _read_qwen2_moe(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096)
    most = fields.integer("max_window_layers", 28, minimum=0)
    # transformers places the windows so where the file does not say.
    sliding = [window and i % 2 == 0 and i < most for i in range(layers)]
    types = ["sliding_attention" if x else "full_attention" for x in sliding]
    moe = _read_qwen_moe(
        family,
        fields,
        shared_size=fields.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return read_common(
        family,
        fields,
        qkv_bias=fields.flag("qkv_bias", True),
        sliding_window=read_windows_by_type(fields, types, window),
        moe=moe,
    )


def _read_qwen3_moe(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias", family.default("attention_bias"))
    window = None
    if fields.flag("use_sliding_window", False):
        window = read_window(family, fields)
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        sliding_window=(window,) * layers,
        moe=_read_qwen_moe(family, fields),
    )


_QWEN_MOE: Rules = (
    *MIXTURE,
    router("model.layers.{i}.mlp.gate"),
    *experts("model.layers.{i}.mlp.experts"),
)
_QWEN2_MOE: Rules = (
    *_QWEN_MOE,
    *shared_expert("model.layers.{i}.mlp.shared_expert"),
    rename("model.layers.{i}.mlp.shared_expert_gate.weight", "layers.{i}.moe.shared_gate.weight"),
)


# -- OLMoE and Granite-MoE -------------------------------------------------------------------------


def _read_olmoe(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", family.default("attention_bias"))
    normalize = fields.flag("norm_topk_prob", False)
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        qk_norm_span="all",
        qkv_clamp=fields.number("clip_qkv") if fields.has("clip_qkv") else None,
        moe=read_mixture(fields, count=64, top_k=8, normalize=normalize),
    )


def _read_granite_moe(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", family.default("attention_bias"))
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
        moe=read_mixture(fields, count=8, top_k=2, normalize=True),
    )


_GRANITE_BLOCK = "model.layers.{i}.block_sparse_moe."
_GRANITE_MOE: Rules = (
    *MIXTURE,
    router(f"{_GRANITE_BLOCK}router.layer"),
    router(f"{_GRANITE_BLOCK}router"),
    rename(f"{_GRANITE_BLOCK}input_linear.weight", GATE_UP),
    rename(f"{_GRANITE_BLOCK}output_linear.weight", DOWN),
    *experts(f"{_GRANITE_BLOCK}experts"),
)


# -- GLM-4.5 ---------------------------------------------------------------------------------------


def _read_glm4_moe(family: Family, fields: Fields) -> ModelConfig:
    count = fields.integer("num_experts", 128)
    top_k = read_top_k(fields, "num_experts_per_tok", 8, count)
    size = fields.integer("moe_intermediate_size", 1408)
    groups, kept = read_groups(fields, count, top_k, (1, 1))
    moe = MoeConfig(
        num_experts=count,
        top_k=top_k,
        expert_size=size,
        dense_layers=tuple(range(fields.integer("first_k_dense_replace", 1, minimum=0))),
        score="sigmoid",
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept_groups=kept,
        group_top=2,
        correction=True,
        shared_size=size * fields.integer("n_shared_experts", 1),
    )
    return read_common(
        family,
        fields,
        qkv_bias=fields.flag("attention_bias", family.default("attention_bias")),
        qk_norm=fields.flag("use_qk_norm", False),
        moe=moe,
    )


# -- DBRX ------------------------------------------------------------------------------------------


def _read_dbrx(family: Family, fields: Fields) -> ModelConfig:
    empty = Fields(fields.path, {})
    attention = fields.table("attn_config") or dataclasses.replace(empty, inside="attn_config")
    mlp = fields.table("ffn_config") or dataclasses.replace(empty, inside="ffn_config")
    if "moe_normalize_expert_weights" in mlp.data:
        refuse(mlp, "moe_normalize_expert_weights", 1)
    refuse(fields, "tie_word_embeddings", False)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise fields.bad("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    count = mlp.integer("moe_num_experts", 4)
    size = mlp.integer("ffn_hidden_size", 3584)
    moe = MoeConfig(
        num_experts=count,
        top_k=read_top_k(mlp, "moe_top_k", 1, count),
        expert_size=size,
        # A null turns the normalisation off; an absent field does not.
        normalize=mlp.data.get("moe_normalize_expert_weights", 1) is not None,
    )
    name = mlp.table("ffn_act_fn") or dataclasses.replace(empty, data={"name": "silu"})
    activation = dataclasses.replace(name, data={"hidden_act": name.text("name")})
    length = fields.integer("max_position_embeddings", 2048)
    theta = attention.number("rope_theta", family.default("rope_theta"))
    return read_common(
        family,
        fields,
        num_kv_heads=attention.integer("kv_n_heads", 1),
        rope=read_rope(fields, hidden // heads, length, theta),
        norm="layer",
        intermediate_size=size,
        activation=read_activation(activation, "silu"),
        qkv_clamp=attention.number("clip_qkv") if attention.has("clip_qkv") else None,
        moe=moe,
    )


def _gate_and_up(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [np.concatenate(arrays)]


def _transposed(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [np.ascontiguousarray(arrays[0].T)]


_DBRX_BLOCK = "transformer.blocks.{i}."
_DBRX_EXPERTS = f"{_DBRX_BLOCK}ffn.experts.mlp."
_DBRX: Rules = (
    rename("transformer.wte.weight", "embed.weight"),
    *both(f"{_DBRX_BLOCK}norm_attn_norm.norm_1", "layers.{i}.attention_norm"),
    *merged_qkv(f"{_DBRX_BLOCK}norm_attn_norm.attn.Wqkv", stacked_qkv),
    *both(f"{_DBRX_BLOCK}norm_attn_norm.attn.out_proj", "layers.{i}.attention.o"),
    *both(f"{_DBRX_BLOCK}norm_attn_norm.norm_2", "layers.{i}.mlp_norm"),
    router(f"{_DBRX_BLOCK}ffn.router.layer"),
    Rule((f"{_DBRX_EXPERTS}w1", f"{_DBRX_EXPERTS}v1"), (GATE_UP,), _gate_and_up, by_expert=True),
    Rule((f"{_DBRX_EXPERTS}w2",), (DOWN,), _transposed, by_expert=True),
    *both("transformer.norm_f", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)


# -- the rows --------------------------------------------------------------------------------------

MOE_FAMILIES = (
    Family(
        "mixtral",
        ("MixtralForCausalLM", "MixtralModel"),
        ("mixtral",),
        _read_mixtral,
        _MIXTRAL_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        EXPERT_ALIASES,
        "mixture of experts",
    ),
    Family(
        "qwen2_moe",
        ("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
        ("qwen2_moe",),
        _read_qwen2_moe,
        _QWEN2_MOE,
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "num_experts": 60,
            "top_k": 4,
            "expert_size": 1408,
        },
        EXPERT_ALIASES,
        "mixture of experts with a gated shared expert; plain MLPs on some layers",
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        ("qwen3_moe",),
        _read_qwen3_moe,
        _QWEN_MOE,
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "top_k": 8,
            "expert_size": 768,
        },
        EXPERT_ALIASES,
        "mixture of experts; norms of q and k; plain MLPs on some layers",
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM", "OlmoeModel"),
        ("olmoe",),
        _read_olmoe,
        _QWEN_MOE,
        "model.",
        ROTARY_AND_MASKS,
        {"max_position_embeddings": 4096, "norm_eps": 1e-5, "eos_token_id": (50279,)},
        EXPERT_ALIASES,
        "mixture of experts; norms of q and k over all heads; clipped qkv",
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM", "GraniteMoeModel"),
        ("granitemoe",),
        _read_granite_moe,
        _GRANITE_MOE,
        "model.",
        ROTARY_AND_MASKS,
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": (2,)},
        EXPERT_ALIASES,
        "mixture of experts; scales of embedding, attention, residual and logits",
    ),
    Family(
        "glm4_moe",
        ("Glm4MoeForCausalLM", "Glm4MoeModel"),
        ("glm4_moe",),
        _read_glm4_moe,
        (*MIXTURE, *CORRECTED_MIXTURE),
        "model.",
        next_token_layers,
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
        {**RMS_EPS, "num_experts": "n_routed_experts"},
        "GLM-4.5: mixture of experts by corrected sigmoids, shared experts, half of each head "
        "rotated",
    ),
    Family(
        "dbrx",
        ("DbrxForCausalLM", "DbrxModel"),
        ("dbrx",),
        _read_dbrx,
        _DBRX,
        "transformer.",
        ROTARY_AND_MASKS,
        {"norm_eps": 1e-5, "max_position_embeddings": 2048},
        {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
        "mixture of experts; LayerNorm, clipped qkv, merged qkv and experts",
    ),
)
