"""Families whose code is not in transformers but beside their weights: InternLM2, Baichuan 1 and
2, ChatGLM 2 and 3, GLM-4, Exaone 3. That code is never executed: the rows say what it defines."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig, RopeConfig
from llmforge.checkpoint.families.base import (
    RMS_EPS,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    gate_up,
    grouped_qkv,
    halved,
    merged_qkv,
    read_common,
    refuse,
    rename,
    stacked_qkv,
)
from llmforge.checkpoint.families.llama import MLP, OUTPUT, PRE_NORMS
from llmforge.checkpoint.families.positions import alibi_slopes
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.mapping import Rule
from llmforge.errors import UnsupportedModelError
from llmforge.safetensors_io import Array

# -- InternLM2 -------------------------------------------------------------------------------------


def _read_internlm2(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("bias", True)
    return read_common(family, fields, qkv_bias=bias, attention_output_bias=bias)


_INTERNLM2_RULES: Rules = (
    rename("model.tok_embeddings.weight", "embed.weight"),
    rename("model.layers.{i}.attention_norm.weight", "layers.{i}.attention_norm.weight"),
    *merged_qkv("model.layers.{i}.attention.wqkv", grouped_qkv),
    *both("model.layers.{i}.attention.wo", "layers.{i}.attention.o"),
    rename("model.layers.{i}.ffn_norm.weight", "layers.{i}.mlp_norm.weight"),
    rename("model.layers.{i}.feed_forward.w1.weight", "layers.{i}.mlp.gate.weight"),
    rename("model.layers.{i}.feed_forward.w3.weight", "layers.{i}.mlp.up.weight"),
    rename("model.layers.{i}.feed_forward.w2.weight", "layers.{i}.mlp.down.weight"),
    rename("model.norm.weight", "final_norm.weight"),
    rename("output.weight", "head.weight"),
)


# -- Baichuan --------------------------------------------------------------------------------------

# Baichuan 2 divides each row of its head by its length. No field of its config says so; the size of
# its vocabulary, to which all its models are trained, tells it from Baichuan 1.
_BAICHUAN2_VOCABULARY = 125696


def _read_baichuan(family: Family, fields: Fields) -> ModelConfig:
    """7B has rope; 13B has ALiBi, and a config that gives no number of position embeddings."""
    heads = fields.integer("num_attention_heads")
    if fields.has("max_position_embeddings"):
        return read_common(family, fields, num_kv_heads=heads)
    length = {"max_position_embeddings": fields.integer("model_max_length", 4096)}
    fields = Fields(fields.path, {**fields.data, **length}, aliases=fields.aliases)
    slopes = alibi_slopes(heads)
    return read_common(family, fields, num_kv_heads=heads, rope=None, alibi_slopes=slopes)


def _unit_rows(arrays: list[Array], config: ModelConfig) -> list[Array]:
    if config.vocab_size != _BAICHUAN2_VOCABULARY:
        return arrays
    rows = arrays[0].astype(np.float32)
    return [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-7)]


_BAICHUAN_RULES: Rules = (
    rename("model.embed_tokens.weight", "embed.weight"),
    *PRE_NORMS,
    *merged_qkv("model.layers.{i}.self_attn.W_pack", stacked_qkv),
    *OUTPUT,
    *MLP,
    rename("model.norm.weight", "final_norm.weight"),
    Rule(("lm_head.weight",), ("head.weight",), _unit_rows),
)


# -- ChatGLM 2 and 3, GLM-4 ------------------------------------------------------------------------


def _read_chatglm(family: Family, fields: Fields) -> ModelConfig:
    """Half of each head is rotated, neighbouring elements."""
    if fields.has("inner_hidden_size") or fields.has("position_encoding_2d"):
        raise UnsupportedModelError(
            f"{fields.path} is the first ChatGLM, which is not supported; ChatGLM2 and 3 are"
        )
    for name, only in (
        ("rmsnorm", True),
        ("apply_residual_connection_post_layernorm", False),
        ("post_layer_norm", True),
        ("add_bias_linear", False),
        ("original_rope", True),
        ("quantization_bit", 0),
        ("pre_seq_len", None),
    ):
        refuse(fields, name, only)
    heads = fields.integer("num_attention_heads")
    grouped = fields.flag("multi_query_attention", False)
    head_dim = fields.integer("kv_channels", 128)
    return read_common(
        family,
        Fields(fields.path, {**fields.data, "head_dim": head_dim}, aliases=fields.aliases),
        num_kv_heads=fields.integer("multi_query_group_num", 1) if grouped else heads,
        qkv_bias=fields.flag("add_qkv_bias", False),
        rope=_chatglm_rope(fields, head_dim // 2),
        activation="silu",
    )


def _chatglm_rope(fields: Fields, dim: int) -> RopeConfig:
    """ChatGLM2 divides positions by `rope_ratio`; ChatGLM3 and GLM-4 multiply the base by it. Of
    the first two, only the name in the config says whose it is."""
    ratio = fields.number("rope_ratio", 1.0)
    name = fields.text("_name_or_path", "").lower()
    if ratio == 1:
        return RopeConfig(10000.0, dim)
    if "chatglm2" in name:
        return RopeConfig(10000.0, dim, scaling="linear", factor=ratio)
    if fields.integer("vocab_size") == _CHATGLM_VOCABULARY and "chatglm3" not in name:
        raise UnsupportedModelError(
            f"{fields.path} has rope_ratio {ratio:g}, by which ChatGLM2 divides positions and "
            'ChatGLM3 multiplies the base; say whose it is: set "_name_or_path" in it to '
            '"chatglm2" or "chatglm3"'
        )
    return RopeConfig(10000.0 * ratio, dim)


_CHATGLM_VOCABULARY = 65024  # of ChatGLM2 and 3; GLM-4's is larger


def _halved_qkv(arrays: list[Array], config: ModelConfig) -> list[Array]:
    q, k, v = stacked_qkv(arrays, config)
    return [*halved([q, k], config), v]


_CHATGLM_LAYER = "transformer.encoder.layers.{i}."
_CHATGLM_RULES: Rules = (
    rename("transformer.embedding.word_embeddings.weight", "embed.weight"),
    rename(f"{_CHATGLM_LAYER}input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    *merged_qkv(f"{_CHATGLM_LAYER}self_attention.query_key_value", _halved_qkv),
    rename(f"{_CHATGLM_LAYER}self_attention.dense.weight", "layers.{i}.attention.o.weight"),
    rename(f"{_CHATGLM_LAYER}post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    gate_up(f"{_CHATGLM_LAYER}mlp.dense_h_to_4h.weight"),
    rename(f"{_CHATGLM_LAYER}mlp.dense_4h_to_h.weight", "layers.{i}.mlp.down.weight"),
    rename("transformer.encoder.final_layernorm.weight", "final_norm.weight"),
    rename("transformer.output_layer.weight", "head.weight"),
)


# -- Exaone 3 --------------------------------------------------------------------------------------


_LAYER = "transformer.h.{i}."
_EXAONE_RULES: Rules = (
    rename("transformer.wte.weight", "embed.weight"),
    rename(f"{_LAYER}ln_1.weight", "layers.{i}.attention_norm.weight"),
    rename(f"{_LAYER}attn.attention.q_proj.weight", "layers.{i}.attention.q.weight"),
    rename(f"{_LAYER}attn.attention.k_proj.weight", "layers.{i}.attention.k.weight"),
    rename(f"{_LAYER}attn.attention.v_proj.weight", "layers.{i}.attention.v.weight"),
    rename(f"{_LAYER}attn.attention.out_proj.weight", "layers.{i}.attention.o.weight"),
    rename(f"{_LAYER}ln_2.weight", "layers.{i}.mlp_norm.weight"),
    rename(f"{_LAYER}mlp.c_fc_0.weight", "layers.{i}.mlp.gate.weight"),
    rename(f"{_LAYER}mlp.c_fc_1.weight", "layers.{i}.mlp.up.weight"),
    rename(f"{_LAYER}mlp.c_proj.weight", "layers.{i}.mlp.down.weight"),
    rename("transformer.ln_f.weight", "final_norm.weight"),
    rename("lm_head.weight", "head.weight"),
)


_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": (2,)}

REMOTE_FAMILIES = (
    Family(
        "internlm2",
        ("InternLM2ForCausalLM", "InternLM2Model"),
        ("internlm2",),
        _read_internlm2,
        _INTERNLM2_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {**_TOKENS, "max_position_embeddings": 2048},
        RMS_EPS,
        "InternLM 2 and 2.5: merged qkv by kv head, linear and dynamic rope scaling",
    ),
    Family(
        "baichuan",
        ("BaichuanForCausalLM", "BaiChuanForCausalLM", "BaichuanModel"),
        ("baichuan",),
        _read_baichuan,
        _BAICHUAN_RULES,
        "model.",
        ROTARY_AND_MASKS,
        _TOKENS,
        RMS_EPS,
        "Baichuan 1 and 2: merged qkv; 7B with rope, 13B with ALiBi; normalised head in 2",
    ),
    Family(
        "chatglm",
        ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        ("chatglm",),
        _read_chatglm,
        _CHATGLM_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {"norm_eps": 1e-5, "eos_token_id": (2,), "max_position_embeddings": 2048},
        {
            "vocab_size": "padded_vocab_size",
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "max_position_embeddings": "seq_length",
            "norm_eps": "layernorm_epsilon",
        },
        "ChatGLM 2, 3, GLM-4: neighbouring elements rotated, half a head; merged qkv and gate-up",
    ),
    Family(
        "exaone",
        ("ExaoneForCausalLM", "ExaoneModel"),
        ("exaone",),
        read_common,
        _EXAONE_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            "norm_eps": 1e-5,
            "intermediate_size": "4x",
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": (2,),
        },
        {
            "num_hidden_layers": "num_layers",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
        },
        "Exaone 3 and 3.5: a Llama with names of its own",
    ),
)
