"""Families with LayerNorm and rope, named as Llama's: Cohere, Nemotron, StableLM, StarCoder2, and
Phi 1 and 2."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    halved,
    plain_mlp,
    plus_one,
    read_common,
    read_window,
    rename,
)
from llmforge.checkpoint.families.llama import (
    ATTENTION,
    ENDS,
    INTERLEAVED_ATTENTION,
    MLP,
    OUTPUT,
    PRE_NORMS,
    QKV,
)
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.mapping import Rule
from llmforge.safetensors_io import Array

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
    *plain_mlp("model.layers.{i}.mlp.up_proj", "model.layers.{i}.mlp.down_proj"),
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
    return (*ENDS, *PRE_NORMS, *QKV, *norms, *OUTPUT, *MLP)


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
    *QKV,
    *both("model.layers.{i}.self_attn.dense", "layers.{i}.attention.o"),
    *both("model.layers.{i}.self_attn.q_layernorm", "layers.{i}.attention.q_norm"),
    *both("model.layers.{i}.self_attn.k_layernorm", "layers.{i}.attention.k_norm"),
    *plain_mlp("model.layers.{i}.mlp.fc1", "model.layers.{i}.mlp.fc2"),
    *both("model.final_layernorm", "final_norm"),
    *both("lm_head", "head"),
)


_LAYER_NORM_EPS = {"norm_eps": "layer_norm_eps"}
_EPS: dict[str, Any] = {"norm_eps": 1e-5}

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
            **_EPS,
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
            **_EPS,
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
            **_EPS,
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
            *plain_mlp("model.layers.{i}.mlp.c_fc", "model.layers.{i}.mlp.c_proj"),
        ),
        "model.",
        ROTARY_AND_MASKS,
        {
            **_EPS,
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
            **_EPS,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        _LAYER_NORM_EPS,
        "Phi-1, Phi-1.5 and Phi-2: parallel block, plain MLP, partial rotary",
    ),
)
