"""Families with LayerNorm and rope, named after their first code: GPT-J, GPT-NeoX, Falcon."""

from __future__ import annotations

from typing import Any

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    GPT_ALIASES,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    converted,
    grouped_qkv,
    halved,
    merged_qkv,
    plain_mlp,
    read_common,
    read_head_dim,
    refuse,
    rename,
)
from llmforge.checkpoint.hf_config import Fields, read_rope

# -- GPT-J and GPT-NeoX ----------------------------------------------------------------------------


def _read_gptj(family: Family, fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = read_head_dim(family, fields, hidden, heads)
    share = fields.integer("rotary_dim", 64) / head_dim
    max_position = fields.integer("max_position_embeddings", 2048)
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        mlp_bias=True,
        parallel_block=True,
        shared_norm=True,
        head_bias=True,
        num_kv_heads=heads,
        rope=read_rope(fields, head_dim, max_position, 10000.0, share),
    )


_GPTJ_RULES: Rules = (
    rename("transformer.wte.weight", "embed.weight"),
    *both("transformer.h.{i}.ln_1", "layers.{i}.attention_norm"),
    *converted("transformer.h.{i}.attn.q_proj", "layers.{i}.attention.q", halved),
    *converted("transformer.h.{i}.attn.k_proj", "layers.{i}.attention.k", halved),
    *both("transformer.h.{i}.attn.v_proj", "layers.{i}.attention.v"),
    *both("transformer.h.{i}.attn.out_proj", "layers.{i}.attention.o"),
    *plain_mlp("transformer.h.{i}.mlp.fc_in", "transformer.h.{i}.mlp.fc_out"),
    *both("transformer.ln_f", "final_norm"),
    *both("lm_head", "head"),
)


def _read_neox(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", True)
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        num_kv_heads=fields.integer("num_attention_heads"),
        parallel_block=fields.flag("use_parallel_residual", True),
    )


_NEOX_RULES: Rules = (
    rename("gpt_neox.embed_in.weight", "embed.weight"),
    *both("gpt_neox.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *both("gpt_neox.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
    *merged_qkv("gpt_neox.layers.{i}.attention.query_key_value", grouped_qkv),
    *both("gpt_neox.layers.{i}.attention.dense", "layers.{i}.attention.o"),
    *plain_mlp("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    *both("gpt_neox.final_layer_norm", "final_norm"),
    rename("embed_out.weight", "head.weight"),
)


# -- Falcon ----------------------------------------------------------------------------------------


def _read_falcon(family: Family, fields: Fields) -> ModelConfig:
    """Of the new architecture (40B, 180B; 11B with one norm) or of the old (7B)."""
    # Its slopes are applied in bfloat16 whatever the model's dtype, which no other family does.
    refuse(fields, "alibi", False)
    heads = fields.integer("num_attention_heads")
    bias = fields.flag("bias", False)
    kv_heads = fields.integer("num_kv_heads", heads)
    new = fields.flag("new_decoder_architecture", False)
    parallel = fields.flag("parallel_attn", True)
    norms = 1
    if new:
        refuse(fields, "parallel_attn", True)
        norms = fields.integer("num_ln_in_parallel_attn", 2)
    elif fields.flag("multi_query", True):
        kv_heads = 1
    return read_common(
        family,
        fields,
        num_kv_heads=kv_heads,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        parallel_block=parallel,
        shared_norm=parallel and norms == 1,
    )


def _falcon_rules(config: ModelConfig) -> Rules:
    two = config.parallel_block and not config.shared_norm
    names = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    return (
        rename("transformer.word_embeddings.weight", "embed.weight"),
        *both(f"transformer.h.{{i}}.{names[0]}", "layers.{i}.attention_norm"),
        *both(f"transformer.h.{{i}}.{names[1]}", "layers.{i}.mlp_norm"),
        *merged_qkv("transformer.h.{i}.self_attention.query_key_value", grouped_qkv),
        *both("transformer.h.{i}.self_attention.dense", "layers.{i}.attention.o"),
        *plain_mlp("transformer.h.{i}.mlp.dense_h_to_4h", "transformer.h.{i}.mlp.dense_4h_to_h"),
        *both("transformer.ln_f", "final_norm"),
        rename("lm_head.weight", "head.weight"),
    )


_EPS: dict[str, Any] = {"norm_eps": 1e-5}

GPT_FAMILIES = (
    Family(
        "gptj",
        ("GPTJForCausalLM", "GPTJModel"),
        ("gptj",),
        _read_gptj,
        _GPTJ_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            **_EPS,
            "hidden_act": "gelu_new",
            "intermediate_size": "4x",
            "max_position_embeddings": 2048,
            "bos_token_id": 50256,
            "eos_token_id": (50256,),
        },
        GPT_ALIASES,
        "parallel block, neighbouring elements rotated, bias of the head",
    ),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        ("gpt_neox",),
        _read_neox,
        _NEOX_RULES,
        "gpt_neox.",
        ROTARY_AND_MASKS,
        {
            **_EPS,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": (2,),
        },
        {
            "norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        "parallel block (optional) with two norms, merged qkv, partial rotary",
    ),
    Family(
        "falcon",
        ("FalconForCausalLM", "FalconModel"),
        ("falcon",),
        _read_falcon,
        _falcon_rules,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            **_EPS,
            "hidden_act": "gelu",
            "intermediate_size": "4x",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": 11,
            "eos_token_id": (11,),
        },
        {
            "hidden_act": "activation",
            "intermediate_size": "ffn_hidden_size",
            "norm_eps": "layer_norm_epsilon",
        },
        "the layouts of 7B, 11B, 40B and 180B; those with ALiBi are refused",
    ),
)
