"""Families with LayerNorm and rope: Cohere, Nemotron, StableLM, StarCoder2, Phi 1 and 2, GPT-J,
GPT-NeoX, Falcon."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    converted,
    grouped_qkv,
    halved,
    merged_qkv,
    plus_one,
    read_common,
    read_head_dim,
    read_window,
    refuse,
    rename,
)
from llmforge.checkpoint.families.llama import (
    ATTENTION,
    ENDS,
    INTERLEAVED_ATTENTION,
    MLP,
    PRE_NORMS,
)
from llmforge.checkpoint.hf_config import Fields, read_rope
from llmforge.checkpoint.mapping import Rule
from llmforge.safetensors_io import Array


def _plain_mlp(up: str, down: str) -> Rules:
    return (*both(up, "layers.{i}.mlp.up"), *both(down, "layers.{i}.mlp.down"))


# -- Cohere ----------------------------------------------------------------------------------------


def _read_cohere(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return read_common(
        family,
        fields,
        norm="layer",
        parallel_block=True,
        shared_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm=fields.flag("use_qk_norm", False),
        qk_norm_span="heads",
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def _flat_halved(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """A norm's weight [heads, head_dim], flat."""
    return halved([array.reshape(-1) for array in arrays], config)


_COHERE_RULES: Rules = (
    *ENDS,
    rename("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    *INTERLEAVED_ATTENTION,
    *(
        Rule(
            (f"model.layers.{{i}}.self_attn.{x}_norm.weight",),
            (f"layers.{{i}}.attention.{x}_norm.weight",),
            _flat_halved,
        )
        for x in "qk"
    ),
    *MLP,
)


# -- Nemotron --------------------------------------------------------------------------------------


def _read_nemotron(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _norm_plus_one(theirs: str, ours: str) -> Rules:
    weight = Rule((f"{theirs}.weight",), (f"{ours}.weight",), plus_one)
    return weight, rename(f"{theirs}.bias", f"{ours}.bias")


_NEMOTRON_RULES: Rules = (
    rename("model.embed_tokens.weight", "embed.weight"),
    *_norm_plus_one("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *_norm_plus_one("model.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
    *ATTENTION,
    *_plain_mlp("model.layers.{i}.mlp.up_proj", "model.layers.{i}.mlp.down_proj"),
    *_norm_plus_one("model.norm", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)


# -- StableLM --------------------------------------------------------------------------------------


def _read_stablelm(family: Family, fields: Fields) -> ModelConfig:
    parallel = fields.flag("use_parallel_residual", False)
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        qkv_bias=fields.flag("use_qkv_bias", False),
        qk_norm=fields.flag("qk_layernorm", False),
        qk_norm_span="heads",
        parallel_block=parallel,
        shared_norm=parallel,
    )


def _stablelm_rules(config: ModelConfig) -> Rules:
    """Each head's norm is a tensor of its own."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    norms = tuple(
        Rule(
            tuple(
                f"model.layers.{{i}}.self_attn.{x}_layernorm.norms.{head}.weight"
                for head in range(count)
            ),
            (f"layers.{{i}}.attention.{x}_norm.weight",),
            lambda arrays, config: [np.concatenate(arrays)],
        )
        for x, count in heads.items()
    )
    attention = (rule for rule in ATTENTION if "_norm" not in rule.theirs[0])
    return (*ENDS, *PRE_NORMS, *attention, *norms, *MLP)


# -- StarCoder2 and Phi ----------------------------------------------------------------------------


def _read_starcoder2(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("use_bias", True)
    layers = fields.integer("num_hidden_layers")
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        sliding_window=(read_window(family, fields),) * layers,
    )


def _read_phi(family: Family, fields: Fields) -> ModelConfig:
    return read_common(
        family,
        fields,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        parallel_block=True,
        shared_norm=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=fields.flag("qk_layernorm", False),
        qk_norm_bias=True,
    )


_PHI_RULES: Rules = (
    rename("model.embed_tokens.weight", "embed.weight"),
    *both("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *(rule for rule in ATTENTION if "_norm" not in rule.theirs[0]),
    *both("model.layers.{i}.self_attn.dense", "layers.{i}.attention.o"),
    *both("model.layers.{i}.self_attn.q_layernorm", "layers.{i}.attention.q_norm"),
    *both("model.layers.{i}.self_attn.k_layernorm", "layers.{i}.attention.k_norm"),
    *_plain_mlp("model.layers.{i}.mlp.fc1", "model.layers.{i}.mlp.fc2"),
    *both("model.final_layernorm", "final_norm"),
    *both("lm_head", "head"),
)


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
    *_plain_mlp("transformer.h.{i}.mlp.fc_in", "transformer.h.{i}.mlp.fc_out"),
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
    *_plain_mlp(
        "gpt_neox.layers.{i}.mlp.dense_h_to_4h", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"
    ),
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
        *_plain_mlp(
            "transformer.h.{i}.mlp.dense_h_to_4h", "transformer.h.{i}.mlp.dense_4h_to_h"
        ),
        *both("transformer.ln_f", "final_norm"),
        rename("lm_head.weight", "head.weight"),
    )


_LAYER_NORM_EPS = {"norm_eps": "layer_norm_eps"}
_GPT_EPS: dict[str, Any] = {"norm_eps": 1e-5}

LAYER_NORM_FAMILIES = (
    Family(
        "cohere",
        ("CohereForCausalLM", "CohereModel"),
        ("cohere",),
        _read_cohere,
        _COHERE_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 5,
            "eos_token_id": (255001,),
        },
        _LAYER_NORM_EPS,
        "Command R: parallel block, neighbouring elements rotated, scaled logits",
    ),
    Family(
        "nemotron",
        ("NemotronForCausalLM", "NemotronModel"),
        ("nemotron",),
        _read_nemotron,
        _NEMOTRON_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 2,
            "eos_token_id": (3,),
        },
        {},
        "plain MLP with squared ReLU; norm weights stored less one; partial rotary",
    ),
    Family(
        "stablelm",
        ("StableLmForCausalLM", "StableLmModel"),
        ("stablelm",),
        _read_stablelm,
        _stablelm_rules,
        "model.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": (0,),
        },
        _LAYER_NORM_EPS,
        "partial rotary; parallel block and a norm for each head of q and k, both optional",
    ),
    Family(
        "starcoder2",
        ("Starcoder2ForCausalLM", "Starcoder2Model"),
        ("starcoder2",),
        _read_starcoder2,
        (
            *ENDS,
            *PRE_NORMS,
            *ATTENTION,
            *_plain_mlp("model.layers.{i}.mlp.c_fc", "model.layers.{i}.mlp.c_proj"),
        ),
        "model.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": (50256,),
        },
        {"norm_eps": "norm_epsilon"},
        "biases, plain MLP, sliding window",
    ),
    Family(
        "phi",
        ("PhiForCausalLM", "PhiModel"),
        ("phi",),
        _read_phi,
        _PHI_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        _LAYER_NORM_EPS,
        "Phi-1, Phi-1.5 and Phi-2: parallel block, plain MLP, partial rotary",
    ),
    Family(
        "gptj",
        ("GPTJForCausalLM", "GPTJModel"),
        ("gptj",),
        _read_gptj,
        _GPTJ_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            **_GPT_EPS,
            "hidden_act": "gelu_new",
            "intermediate_size": "4x",
            "max_position_embeddings": 2048,
            "bos_token_id": 50256,
            "eos_token_id": (50256,),
        },
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
        },
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
            **_GPT_EPS,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": (2,),
        },
        {
            **_LAYER_NORM_EPS,
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
            **_GPT_EPS,
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
