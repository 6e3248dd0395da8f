"""Families of the Llama kind: RMSNorm, rope, a gated MLP, and what each changes in it."""

from __future__ import annotations

import dataclasses

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    RMS_EPS,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    converted,
    gate_up,
    halved,
    merged_qkv,
    read_common,
    read_window,
    refuse,
    rename,
    stacked_qkv,
)
from llmforge.checkpoint.hf_config import Fields, read_layer_windows, read_windows_by_type

ENDS = (
    rename("model.embed_tokens.weight", "embed.weight"),
    *both("model.norm", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)
QKV = (
    *both("model.layers.{i}.self_attn.q_proj", "layers.{i}.attention.q"),
    *both("model.layers.{i}.self_attn.k_proj", "layers.{i}.attention.k"),
    *both("model.layers.{i}.self_attn.v_proj", "layers.{i}.attention.v"),
)
OUTPUT = both("model.layers.{i}.self_attn.o_proj", "layers.{i}.attention.o")
ATTENTION = (
    *QKV,
    rename("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    rename("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *OUTPUT,
)
# Neighbouring elements rotated.
INTERLEAVED_ATTENTION = (
    *converted("model.layers.{i}.self_attn.q_proj", "layers.{i}.attention.q", halved),
    *converted("model.layers.{i}.self_attn.k_proj", "layers.{i}.attention.k", halved),
    *both("model.layers.{i}.self_attn.v_proj", "layers.{i}.attention.v"),
    *OUTPUT,
)
MLP = (
    *both("model.layers.{i}.mlp.gate_proj", "layers.{i}.mlp.gate"),
    *both("model.layers.{i}.mlp.up_proj", "layers.{i}.mlp.up"),
    *both("model.layers.{i}.mlp.down_proj", "layers.{i}.mlp.down"),
)
MERGED_MLP = (
    gate_up("model.layers.{i}.mlp.gate_up_proj.weight"),
    rename("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight"),
)
PRE_NORMS = (
    *both("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *both("model.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
)
POST_NORMS = (
    *both("model.layers.{i}.post_attention_layernorm", "layers.{i}.attention_post_norm"),
    *both("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.mlp_post_norm"),
)
LLAMA_RULES = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)


def _read_llama(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", family.default("attention_bias"))
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", family.default("mlp_bias")),
    )


def _read_mistral(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    return read_common(family, fields, sliding_window=(read_window(family, fields),) * layers)


def _read_qwen2(family: Family, fields: Fields) -> ModelConfig:
    return read_common(
        family, fields, qkv_bias=True, sliding_window=_read_qwen_windows(family, fields)
    )


def _read_qwen3(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", family.default("attention_bias"))
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        sliding_window=_read_qwen_windows(family, fields),
    )


def _read_qwen_windows(family: Family, fields: Fields) -> tuple[int | None, ...]:
    return read_layer_windows(
        fields,
        fields.integer("num_hidden_layers"),
        family.default("sliding_window"),
        family.default("max_window_layers"),
    )


def _read_granite(family: Family, fields: Fields) -> ModelConfig:
    return dataclasses.replace(
        _read_llama(family, fields),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


def _read_olmo2(family: Family, fields: Fields) -> ModelConfig:
    return dataclasses.replace(
        _read_llama(family, fields),
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
        qk_norm_span="all",
    )


def _read_exaone4(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    window = read_window(family, fields)
    pattern = 0
    # Files that name each layer's type spell the pattern in letters besides.
    if window is not None and not fields.has("layer_types"):
        pattern = fields.integer("sliding_window_pattern", 4)
    default = [("sliding" if pattern and i % pattern else "full") for i in range(1, layers + 1)]
    windows = read_windows_by_type(fields, [f"{x}_attention" for x in default], window)
    # Where some layers have windows, the others have no positions at all.
    unrotated = tuple(i for i in range(layers) if window is not None and windows[i] is None)
    return read_common(
        family,
        fields,
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
        sliding_window=windows,
        unrotated_layers=unrotated,
    )


def _read_phi3(family: Family, fields: Fields) -> ModelConfig:
    # transformers takes this default wherever the field is absent.
    data = {"original_max_position_embeddings": 4096, **fields.data}
    fields = dataclasses.replace(fields, data=data)
    if rope := fields.table("rope_scaling") or fields.table("rope_parameters"):
        refuse(rope, "type", "default", "longrope", "su")
        refuse(rope, "rope_type", "default", "longrope", "su")
    return _read_mistral(family, fields)


def _read_glm(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", True)
    return read_common(family, fields, qkv_bias=bias)


def _read_glm4(family: Family, fields: Fields) -> ModelConfig:
    return dataclasses.replace(_read_glm(family, fields), post_norm=True)


_GLM_RULES: Rules = (*ENDS, *PRE_NORMS, *INTERLEAVED_ATTENTION, *MERGED_MLP)
_GLM4_RULES: Rules = (
    *_GLM_RULES,
    *both("model.layers.{i}.post_self_attn_layernorm", "layers.{i}.attention_post_norm"),
    *both("model.layers.{i}.post_mlp_layernorm", "layers.{i}.mlp_post_norm"),
)
_GLM_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "eos_token_id": (151329, 151336, 151338),
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

LLAMA_FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LlamaModel"),
        ("llama",),
        _read_llama,
        LLAMA_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": (2,)},
        RMS_EPS,
        "rope scalings of Llama 3, linear, dynamic, YaRN",
    ),
    Family(
        "mistral",
        ("MistralForCausalLM", "MistralModel"),
        ("mistral",),
        _read_mistral,
        LLAMA_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        RMS_EPS,
        "sliding window",
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        ("qwen2",),
        _read_qwen2,
        LLAMA_RULES,
        "model.",
        ROTARY_AND_MASKS,
        _QWEN_DEFAULTS,
        RMS_EPS,
        "biases of q, k and v; sliding window on some layers",
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        ("qwen3",),
        _read_qwen3,
        LLAMA_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {**_QWEN_DEFAULTS, "head_dim": 128},
        RMS_EPS,
        "norms of q and k; sliding window on some layers",
    ),
    Family(
        "granite",
        ("GraniteForCausalLM", "GraniteModel"),
        ("granite",),
        _read_granite,
        LLAMA_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": (2,)},
        RMS_EPS,
        "scales of embedding, attention, residual and logits",
    ),
    Family(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo2Model"),
        ("olmo2",),
        _read_olmo2,
        (*ENDS, *POST_NORMS, *ATTENTION, *MLP),
        "model.",
        ROTARY_AND_MASKS,
        {"max_position_embeddings": 2048, "norm_eps": 1e-5, "eos_token_id": (50279,)},
        RMS_EPS,
        "norms behind attention and MLP; norms of q and k over all heads",
    ),
    Family(
        "exaone4",
        ("Exaone4ForCausalLM", "Exaone4Model"),
        ("exaone4",),
        _read_exaone4,
        (*ENDS, *POST_NORMS, *ATTENTION, *MLP),
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "norm_eps": 1e-5,
            "sliding_window": 4096,
            "bos_token_id": 0,
            "eos_token_id": (2,),
        },
        RMS_EPS,
        "norms behind attention and MLP; windows on some layers, no positions on the others",
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM", "Phi3Model"),
        ("phi3",),
        _read_phi3,
        (
            *ENDS,
            *PRE_NORMS,
            *merged_qkv("model.layers.{i}.self_attn.qkv_proj", stacked_qkv),
            *OUTPUT,
            *MERGED_MLP,
        ),
        "model.",
        ROTARY_AND_MASKS,
        {
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": (32000,),
        },
        RMS_EPS,
        "Phi-3, Phi-3.5 and Phi-4: merged qkv and gate-up, LongRoPE, partial rotary",
    ),
    Family(
        "glm",
        ("GlmForCausalLM", "GlmModel"),
        ("glm",),
        _read_glm,
        _GLM_RULES,
        "model.",
        ROTARY_AND_MASKS,
        _GLM_DEFAULTS,
        RMS_EPS,
        "neighbouring elements rotated, half of each head",
    ),
    Family(
        "glm4",
        ("Glm4ForCausalLM", "Glm4Model"),
        ("glm4",),
        _read_glm4,
        _GLM4_RULES,
        "model.",
        ROTARY_AND_MASKS,
        _GLM_DEFAULTS,
        RMS_EPS,
        "neighbouring elements rotated, half of each head; norms before and behind",
    ),
)
