"""Families without rope: learned positions (GPT-2, GPT-BigCode, OPT) and ALiBi (BLOOM, MPT)."""

from __future__ import annotations

import math
from typing import Any

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    GPT_ALIASES,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    grouped_qkv,
    merged_qkv,
    plain_mlp,
    read_common,
    refuse,
    rename,
    stacked_qkv,
    transposed,
)
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.mapping import Rule
from llmforge.safetensors_io import Array


def _read(family: Family, fields: Fields, *, bias: bool = True, **own: Any) -> ModelConfig:
    return read_common(
        family,
        fields,
        rope=None,
        norm="layer",
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        **{"norm_bias": True, "num_kv_heads": fields.integer("num_attention_heads"), **own},
    )


# -- GPT-2 and GPT-BigCode -------------------------------------------------------------------------


def _read_gpt2(family: Family, fields: Fields) -> ModelConfig:
    refuse(fields, "add_cross_attention", False)
    refuse(fields, "scale_attn_by_inverse_layer_idx", False)
    return _read(
        family,
        fields,
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        learned_positions=fields.integer("max_position_embeddings", 1024),
    )


def _read_bigcode(family: Family, fields: Fields) -> ModelConfig:
    heads = fields.integer("num_attention_heads")
    refuse(fields, "add_cross_attention", False)
    return _read(
        family,
        fields,
        num_kv_heads=1 if fields.flag("multi_query", True) else heads,
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        learned_positions=fields.integer("max_position_embeddings", 1024),
    )


def _stacked_transposed_qkv(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return stacked_qkv(transposed(arrays, config), config)


def _transposed_linear(theirs: str, ours: str) -> Rules:
    weight = Rule((f"{theirs}.weight",), (f"{ours}.weight",), transposed)
    return weight, rename(f"{theirs}.bias", f"{ours}.bias")


_GPT_ENDS_AND_NORMS: Rules = (
    rename("transformer.wte.weight", "embed.weight"),
    rename("transformer.wpe.weight", "positions.weight"),
    *both("transformer.h.{i}.ln_1", "layers.{i}.attention_norm"),
    *both("transformer.h.{i}.ln_2", "layers.{i}.mlp_norm"),
    *both("transformer.ln_f", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)
_GPT2_RULES: Rules = (
    *_GPT_ENDS_AND_NORMS,
    # A vector's transpose is itself.
    *merged_qkv("transformer.h.{i}.attn.c_attn", _stacked_transposed_qkv),
    *_transposed_linear("transformer.h.{i}.attn.c_proj", "layers.{i}.attention.o"),
    *_transposed_linear("transformer.h.{i}.mlp.c_fc", "layers.{i}.mlp.up"),
    *_transposed_linear("transformer.h.{i}.mlp.c_proj", "layers.{i}.mlp.down"),
)
_BIGCODE_RULES: Rules = (
    *_GPT_ENDS_AND_NORMS,
    *merged_qkv("transformer.h.{i}.attn.c_attn", grouped_qkv),
    *both("transformer.h.{i}.attn.c_proj", "layers.{i}.attention.o"),
    *plain_mlp("transformer.h.{i}.mlp.c_fc", "transformer.h.{i}.mlp.c_proj"),
)


# -- OPT -------------------------------------------------------------------------------------------


def _read_opt(family: Family, fields: Fields) -> ModelConfig:
    refuse(fields, "layer_norm_elementwise_affine", True)
    hidden = fields.integer("hidden_size")
    size = fields.integer("word_embed_proj_dim", hidden)
    before = fields.flag("do_layer_norm_before", True)
    return _read(
        family,
        fields,
        pre_norm=before,
        sum_norm=not before,
        final_norm=before and not fields.flag("_remove_final_layer_norm", False),
        embedding_size=0 if size == hidden else size,
        bias=fields.flag("enable_bias", True),
        learned_positions=fields.integer("max_position_embeddings", 2048),
    )


def _without_first_two(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """The table's first rows stand for padding: position p is row p + 2."""
    return [array[2:] for array in arrays]


_OPT_LAYER = "model.decoder.layers.{i}."
_OPT_RULES: Rules = (
    rename("model.decoder.embed_tokens.weight", "embed.weight"),
    Rule(("model.decoder.embed_positions.weight",), ("positions.weight",), _without_first_two),
    *both(f"{_OPT_LAYER}self_attn_layer_norm", "layers.{i}.attention_norm"),
    *both(f"{_OPT_LAYER}self_attn.q_proj", "layers.{i}.attention.q"),
    *both(f"{_OPT_LAYER}self_attn.k_proj", "layers.{i}.attention.k"),
    *both(f"{_OPT_LAYER}self_attn.v_proj", "layers.{i}.attention.v"),
    *both(f"{_OPT_LAYER}self_attn.out_proj", "layers.{i}.attention.o"),
    *both(f"{_OPT_LAYER}final_layer_norm", "layers.{i}.mlp_norm"),
    *plain_mlp(f"{_OPT_LAYER}fc1", f"{_OPT_LAYER}fc2"),
    *both("model.decoder.final_layer_norm", "final_norm"),
    rename("model.decoder.project_in.weight", "embed_projection.weight"),
    rename("model.decoder.project_out.weight", "head_projection.weight"),
    rename("lm_head.weight", "head.weight"),
)


# -- BLOOM and MPT ---------------------------------------------------------------------------------


def _read_bloom(family: Family, fields: Fields) -> ModelConfig:
    refuse(fields, "apply_residual_connection_post_layernorm", False)
    return _read(
        family,
        fields,
        embedding_norm=True,
        intermediate_size=4 * fields.integer("hidden_size"),
        alibi_slopes=alibi_slopes(fields.integer("num_attention_heads")),
    )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Evenly spread powers of two down to 2**-8; where there is no whole power of two of heads,
    those of the next lower one, then every other one of the next higher
    (https://arxiv.org/abs/2108.12409 and its code)."""
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    between = [2 ** (-4 * i / lower) for i in range(1, 2 * lower, 2)]
    return (*slopes, *between[: heads - lower])


_BLOOM_RULES: Rules = (
    rename("transformer.word_embeddings.weight", "embed.weight"),
    *both("transformer.word_embeddings_layernorm", "embed_norm"),
    *both("transformer.h.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *both("transformer.h.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
    *merged_qkv("transformer.h.{i}.self_attention.query_key_value", grouped_qkv),
    *both("transformer.h.{i}.self_attention.dense", "layers.{i}.attention.o"),
    *plain_mlp("transformer.h.{i}.mlp.dense_h_to_4h", "transformer.h.{i}.mlp.dense_4h_to_h"),
    *both("transformer.ln_f", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)


def _read_mpt(family: Family, fields: Fields) -> ModelConfig:
    attention = fields.table("attn_config") or Fields(fields.path, {}, "attn_config")
    refuse(fields, "no_bias", True)
    refuse(fields, "logit_scale")
    refuse(fields, "expansion_ratio", 4)
    refuse(attention, "attn_type", "multihead_attention")
    refuse(attention, "alibi", True)
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        refuse(attention, name, False)
    heads = fields.integer("num_attention_heads")
    scale = attention.number("softmax_scale") if attention.has("softmax_scale") else None
    return _read(
        family,
        fields,
        bias=False,
        norm_bias=False,
        attention_scale=scale,
        qkv_clamp=attention.number("clip_qkv") if attention.has("clip_qkv") else None,
        intermediate_size=4 * fields.integer("hidden_size"),
        alibi_slopes=_mpt_slopes(heads, attention.number("alibi_bias_max", 8)),
    )


def _mpt_slopes(heads: int, bias_max: float) -> tuple[float, ...]:
    """Those of the next higher power of two of heads, every other one first."""
    higher = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-bias_max * i / higher) for i in range(1, higher + 1)]
    return tuple(slopes if higher == heads else (slopes[1::2] + slopes[::2])[:heads])


_MPT_RULES: Rules = (
    rename("transformer.wte.weight", "embed.weight"),
    rename("transformer.blocks.{i}.norm_1.weight", "layers.{i}.attention_norm.weight"),
    *merged_qkv("transformer.blocks.{i}.attn.Wqkv", stacked_qkv),
    rename("transformer.blocks.{i}.attn.out_proj.weight", "layers.{i}.attention.o.weight"),
    rename("transformer.blocks.{i}.norm_2.weight", "layers.{i}.mlp_norm.weight"),
    rename("transformer.blocks.{i}.ffn.up_proj.weight", "layers.{i}.mlp.up.weight"),
    rename("transformer.blocks.{i}.ffn.down_proj.weight", "layers.{i}.mlp.down.weight"),
    rename("transformer.norm_f.weight", "final_norm.weight"),
    rename("lm_head.weight", "head.weight"),
)


_GPT_DEFAULTS = {
    "norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "intermediate_size": "4x",
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": (50256,),
}

POSITION_FAMILIES = (
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        ("gpt2",),
        _read_gpt2,
        _GPT2_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        _GPT_DEFAULTS,
        GPT_ALIASES,
        "learned positions, weights stored transposed",
    ),
    Family(
        "gpt_bigcode",
        ("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
        ("gpt_bigcode",),
        _read_bigcode,
        _BIGCODE_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {**_GPT_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
        GPT_ALIASES,
        "StarCoder and SantaCoder: learned positions, one kv head",
    ),
    Family(
        "opt",
        ("OPTForCausalLM", "OPTModel"),
        ("opt",),
        _read_opt,
        _OPT_RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            "norm_eps": 1e-5,
            "hidden_act": "relu",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": (2,),
        },
        {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        "learned positions, ReLU; in 350M norms of the sums, and projections at both ends",
    ),
    Family(
        "bloom",
        ("BloomForCausalLM", "BloomModel"),
        ("bloom",),
        _read_bloom,
        _BLOOM_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            "norm_eps": 1e-5,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        {
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "norm_eps": "layer_norm_epsilon",
        },
        "ALiBi, norm of the embedding, merged qkv",
    ),
    Family(
        "mpt",
        ("MptForCausalLM", "MptModel", "MPTForCausalLM"),
        ("mpt",),
        _read_mpt,
        _MPT_RULES,
        "transformer.",
        ROTARY_AND_MASKS,
        {
            "norm_eps": 1e-5,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "norm_eps": "layer_norm_epsilon",
        },
        "ALiBi, no biases, merged qkv, clipped if the config says so",
    ),
)
