"""Gemma 1, 2 and 3, text only: norm weights stored less one, scaled embeddings, soft caps."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    RMS_EPS,
    ROTARY_AND_MASKS,
    Family,
    Rules,
    plus_one,
    read_common,
    read_window,
    refuse,
    rename,
)
from llmforge.checkpoint.families.llama import ATTENTION, MLP, OUTPUT, QKV
from llmforge.checkpoint.hf_config import (
    Fields,
    parse_rope,
    read_activation,
    read_windows_by_type,
)
from llmforge.checkpoint.mapping import Ignore, Rule


def _norm(theirs: str, ours: str) -> Rule:
    return Rule((f"{theirs}.weight",), (f"{ours}.weight",), plus_one)


def _read(family: Family, fields: Fields, **own: Any) -> ModelConfig:
    refuse(fields, "use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    config = read_common(family, fields, qkv_bias=bias, attention_output_bias=bias, **own)
    return dataclasses.replace(config, embedding_scale=config.hidden_size**0.5)


def _read_gemma(family: Family, fields: Fields) -> ModelConfig:
    activation = read_activation(fields, family.default("hidden_act"))
    # The first files say "gelu" and mean the approximation, which the models were trained with.
    return _read(family, fields, activation="gelu_tanh" if activation == "gelu" else activation)


def _read_gemma2(family: Family, fields: Fields, period: int = 2, **own: Any) -> ModelConfig:
    """Every `period`-th layer attends to everything, the others to a window."""
    layers = fields.integer("num_hidden_layers")
    full = ["full" if i % period == 0 else "sliding" for i in range(1, layers + 1)]
    windows = read_windows_by_type(
        fields, [f"{x}_attention" for x in full], read_window(family, fields)
    )
    return _read(
        family,
        fields,
        post_norm=True,
        sliding_window=windows,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_cap(family, fields, "attn_logit_softcapping"),
        logit_softcap=_cap(family, fields, "final_logit_softcapping"),
        **own,
    )


def _cap(family: Family, fields: Fields, name: str) -> float | None:
    """Null is "none", absent is the family's default."""
    default = None if name in fields.data else family.default(name)
    return fields.number(name) if fields.has(name) else default


def _read_gemma3(family: Family, fields: Fields) -> ModelConfig:
    """Two ropes: transformers 5 nests them by layer type; before, `rope_theta` and `rope_scaling`
    were those of full attention, and `rope_local_base_freq` that of windows."""
    fields = _text_part(fields)
    max_position = fields.integer(
        "max_position_embeddings", family.default("max_position_embeddings")
    )
    head_dim = fields.integer("head_dim", family.default("head_dim"))
    nested = fields.table("rope_parameters") or Fields(fields.path, {})
    full = nested.table("full_attention") or Fields(fields.path, {})
    if scaling := fields.table("rope_scaling"):
        full = dataclasses.replace(full, data={**full.data, **scaling.data})
    window = nested.table("sliding_attention") or Fields(fields.path, {})
    theta = fields.number("rope_theta", 1e6)
    local_theta = fields.number("rope_local_base_freq", 1e4)
    plain = dataclasses.replace(
        fields, data={k: v for k, v in fields.data.items() if k != "rope_theta"}
    )
    return _read_gemma2(
        family,
        fields,
        period=fields.integer("sliding_window_pattern", 6),
        qk_norm=True,
        rope=parse_rope(full, plain, head_dim, max_position, theta),
        window_rope=parse_rope(window, plain, head_dim, max_position, local_theta),
    )


# What transformers takes where a text_config leaves it out (Gemma3TextConfig), and its files do.
_TEXT_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def _text_part(fields: Fields) -> Fields:
    """Of a model with a vision part, the fields of the text; what the file says of the whole model
    counts."""
    text = fields.table("text_config")
    if text is None:
        return fields
    names = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id", "bos_token_id")
    whole = {name: fields.data[name] for name in names if fields.data.get(name) is not None}
    data = {**_TEXT_SIZES, **text.data, **whole}
    return dataclasses.replace(fields, data=data, inside="text_config")


def _beside_vision(rules: Rules) -> Rules:
    """The same tensors as they are named, and as they were once, beside a vision part."""
    renamed = [
        dataclasses.replace(rule, theirs=tuple(placed(name) for name in rule.theirs))
        for rule in rules
        for placed in (
            lambda name: f"language_model.{name}",
            lambda name: name.replace("model.", "model.language_model.", 1),
        )
    ]
    return (*rules, *(rule for rule in renamed if rule not in rules))


_ENDS: Rules = (
    rename("model.embed_tokens.weight", "embed.weight"),
    _norm("model.norm", "final_norm"),
    rename("lm_head.weight", "head.weight"),
)
_PRE_AND_POST_NORMS: Rules = (
    _norm("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    _norm("model.layers.{i}.post_attention_layernorm", "layers.{i}.attention_post_norm"),
    _norm("model.layers.{i}.pre_feedforward_layernorm", "layers.{i}.mlp_norm"),
    _norm("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.mlp_post_norm"),
)
_GEMMA3_ATTENTION: Rules = (
    *QKV,
    _norm("model.layers.{i}.self_attn.q_norm", "layers.{i}.attention.q_norm"),
    _norm("model.layers.{i}.self_attn.k_norm", "layers.{i}.attention.k_norm"),
    *OUTPUT,
)
_DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": (1,),
}
_DEFAULTS_2 = {**_DEFAULTS, "num_key_value_heads": 4, "sliding_window": 4096}
_ALIASES_2 = {**RMS_EPS, "hidden_act": "hidden_activation"}

GEMMA_FAMILIES = (
    Family(
        "gemma",
        ("GemmaForCausalLM", "GemmaModel"),
        ("gemma",),
        _read_gemma,
        (
            *_ENDS,
            _norm("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
            _norm("model.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
            *ATTENTION,
            *MLP,
        ),
        "model.",
        ROTARY_AND_MASKS,
        {**_DEFAULTS, "num_key_value_heads": 16},
        RMS_EPS,
        "scaled embedding; norm weights stored less one",
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma2Model"),
        ("gemma2",),
        _read_gemma2,
        (*_ENDS, *_PRE_AND_POST_NORMS, *ATTENTION, *MLP),
        "model.",
        ROTARY_AND_MASKS,
        {**_DEFAULTS_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _ALIASES_2,
        "soft caps of scores and logits; norms before and behind; every other layer a window",
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        _read_gemma3,
        _beside_vision((*_ENDS, *_PRE_AND_POST_NORMS, *_GEMMA3_ATTENTION, *MLP)),
        "model.",
        (
            *ROTARY_AND_MASKS,
            Ignore(
                r"(model\.)?(vision_tower|multi_modal_projector)\..*",
                "the vision part: the model is converted for text",
            ),
        ),
        {**_DEFAULTS_2, "max_position_embeddings": 131072},
        _ALIASES_2,
        "text, also of models with vision; norms of q and k; another rope on layers with windows",
    ),
)
