"""The config of NeMo's GPT-type models: model_config.yaml of NeMo 1, context/model.yaml of NeMo 2.

What the fields mean: build_transformer_config and mcore_model_customize in
https://github.com/NVIDIA/NeMo (nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py
and megatron_base_model.py), GPTConfig in nemo/collections/llm/gpt/model/base.py, and
TransformerConfig in https://github.com/NVIDIA/Megatron-LM (megatron/core/transformer).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmforge.checkpoint.config import ModelConfig, RopeConfig
from llmforge.checkpoint.families.base import Family, read_common
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.sources.files import Slice, Tree
from llmforge.errors import SourceError, UnsupportedModelError

CONFIG_1 = "model_config.yaml"
CONFIG_2 = "context/model.yaml"

# Our names of fields → NeMo 1's, and how NeMo 2 spells those.
_ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
_SPELLINGS_2 = {
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "rotary_percent": "rotary_percentage",
    "seq_length": "max_position_embeddings",
    "vocab_size": "override_vocab_size",
}
# Activation → ours, and whether it is a gate.
_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "squared-relu": ("relu2", False),
    "relu": ("relu", False),
    "geglu": ("gelu", True),
    "fast-geglu": ("gelu", True),
    "swiglu": ("silu", True),
    "fast-swiglu": ("silu", True),
    "reglu": ("relu", True),
    "fast-reglu": ("relu", True),
}
_FUNCTIONS_2 = {
    "silu": "silu",
    "gelu": "gelu",
    "openai_gelu": "gelu_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
}
# Norm → ours, and whether its weight is stored less one.
_NORMS = {
    "layernorm": ("layer", False),
    "layernorm1p": ("layer", True),
    "rmsnorm": ("rms", False),
}
# Fields that must have one of these values, or be left out.
_ONLY: dict[str, tuple[Any, ...]] = {
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "position_embedding_type": ("learned_absolute", "rope"),
    "normalize_attention_scores": (True,),
    "virtual_pipeline_model_parallel_size": (1,),
    "num_moe_experts": (0,),
    "drop_layers": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "mtp_num_layers": (0,),
    "heterogeneous_block_specs": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    **dict.fromkeys(
        (
            "headscale",
            "megatron_legacy",
            "multi_query_attention",
            "multi_latent_attention",
            "rotary_interleaved",
            "qk_l2_norm",
            "nope_layer_interval",
        ),
        (False,),
    ),
}
_FAMILY = Family(
    "megatron_gpt",
    (),
    (),
    lambda family, fields: read_common(family, fields),
    (),
    "",
    defaults={"norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": ()},
)
_SIBLING = re.compile(r"\$\{\.(\w+)\}")
_PRODUCT = re.compile(r"\$\{multiply:\s*(\d+)\s*,\s*\$\{\.(\w+)\}\}")


@dataclass(frozen=True)
class NemoConfig:
    """`config`: the model, its vocabulary still to be set. gated: whether gate and up are merged;
    less_one: whether norms' weights are stored less one. padded_to: what a vocabulary is padded to
    a multiple of; vocabulary: where the config says how large it is. tokenizer: the config's
    section about it."""

    config: ModelConfig
    gated: bool
    less_one: bool
    padded_to: int
    vocabulary: int | None
    tensor_parallel: int
    pipeline_parallel: int
    tokenizer: Mapping[str, Any]


def read_nemo_config(tree: Tree) -> NemoConfig:
    """The config of a model of NeMo 1 or 2. Raises SourceError and UnsupportedModelError."""
    first = CONFIG_1 in tree.files
    part = tree.require(CONFIG_1 if first else CONFIG_2)
    data = _yaml(part)
    path = Path(part.label)
    tokenizer = data.get("tokenizer")
    if first:
        target = str(data.get("target", ""))
        if target and "GPT" not in target:
            raise UnsupportedModelError(
                f"{path}: the model class {target} is not supported; supported: GPT-type models "
                "(MegatronGPTModel)"
            )
        data = _resolved(data)
    else:
        data = _flat(path, data)
    fields = Fields(path, data, aliases=_ALIASES)
    _refuse(fields)
    gated, config = _read(fields)
    return NemoConfig(
        config=config,
        gated=gated,
        less_one=_norm(fields)[1],
        padded_to=fields.integer("make_vocab_size_divisible_by", 128)
        * (tensor_parallel := fields.integer("tensor_model_parallel_size", 1)),
        vocabulary=fields.integer("override_vocab_size", 0, minimum=0) or None,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=fields.integer("pipeline_model_parallel_size", 1),
        tokenizer=tokenizer if isinstance(tokenizer, dict) else {},
    )


def _yaml(part: Slice) -> dict[str, Any]:
    try:
        data = yaml.safe_load(part.read())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"{part.label} is not valid YAML") from error
    if not isinstance(data, dict):
        raise SourceError(f"{part.label} is not a table of settings")
    # NeMo 1 nests the model's settings in training's own files.
    inner = data.get("model")
    return inner if isinstance(inner, dict) and "num_layers" in inner else data


def _resolved(data: dict[str, Any]) -> dict[str, Any]:
    """The two kinds of references to other fields that NeMo's own configs use, followed."""

    def value(name: str, depth: int = 0) -> Any:
        found = data.get(name)
        if not isinstance(found, str) or depth > 5:
            return found
        if match := _SIBLING.fullmatch(found):
            return value(match[1], depth + 1)
        if match := _PRODUCT.fullmatch(found):
            factor = value(match[2], depth + 1)
            return int(match[1]) * factor if isinstance(factor, int) else found
        return found

    return {name: value(name) for name in data}


def _flat(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo 2's config under NeMo 1's names."""
    inner = data.get("config")
    if not isinstance(inner, dict):
        raise SourceError(f"{path} has no section config with the model's settings")
    values: dict[str, Any] = {_SPELLINGS_2.get(str(k), str(k)): v for k, v in inner.items()}
    function = _last_name(values.get("activation_func"))
    if function not in _FUNCTIONS_2:
        raise UnsupportedModelError(
            f"{path}: config.activation_func = {function!r} is not supported; supported: "
            f"{', '.join(_FUNCTIONS_2)}"
        )
    values["activation"] = function
    values.setdefault("position_embedding_type", "learned_absolute")
    values.setdefault("bias_activation_fusion", False)
    # Llama31Config stretches the rope; the classes before it do not have these fields.
    values["scale_positional_embedding"] = values.get("old_context_len") is not None
    # GemmaModel scales what the embedding gives; no field says so.
    if _last_name(inner).startswith(("GemmaConfig", "CodeGemmaConfig")):
        values["apply_embedding_scaling"] = True
    if values.get("ffn_hidden_size") is None and type(values.get("hidden_size")) is int:
        values["ffn_hidden_size"] = 4 * values["hidden_size"]
    return values


def _last_name(value: Any) -> str:
    """Of "package.module.name", or of a table with that as its `_target_`, the name."""
    target = value.get("_target_") if isinstance(value, dict) else value
    return str(target).rsplit(".", 1)[-1]


def _refuse(fields: Fields) -> None:
    values = dict(fields.data)
    extra = values.get("mcore_customization_config")
    if isinstance(extra, dict):
        values |= extra
    for name, allowed in _ONLY.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            supported = ", ".join(map(repr, allowed)) or "to leave it out"
            raise UnsupportedModelError(
                f"{fields.path}: {name} = {value!r} is not supported; supported: {supported}"
            )


def _read(fields: Fields) -> tuple[bool, ModelConfig]:
    activation, gated = _activation(fields)
    bias = fields.flag("bias", True)
    norm, _ = _norm(fields)
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_layers")
    head_dim = fields.integer("head_dim", hidden // fields.integer("num_attention_heads"))
    length = "max_position_embeddings"
    positions = fields.integer(length if fields.has(length) else "encoder_seq_length")
    rotated = fields.text("position_embedding_type", "learned_absolute") == "rope"
    qk_norm = fields.flag("qk_layernorm", False)
    window = fields.data.get("window_size")
    if window is not None and not (isinstance(window, list) and len(window) == 2):
        raise fields.bad("window_size", "two numbers")
    data = {**fields.data, "max_position_embeddings": positions, "vocab_size": 1}
    config = read_common(
        _FAMILY,
        dataclasses.replace(fields, data=data),
        rope=_rope(fields, head_dim) if rotated else None,
        learned_positions=0 if rotated else positions,
        activation=activation,
        gated_mlp=gated,
        norm=norm,
        norm_bias=norm == "layer",
        qkv_bias=bias or fields.flag("qkv_bias", False),
        attention_output_bias=bias,
        mlp_bias=bias,
        qk_norm=qk_norm,
        qk_norm_bias=qk_norm and norm == "layer",
        # The number that NeMo's exporter to Hugging Face takes for it.
        sliding_window=(window[0] if window else None,) * layers,
        embedding_scale=hidden**0.5 if fields.flag("apply_embedding_scaling", False) else 1.0,
    )
    return gated, config


def _activation(fields: Fields) -> tuple[str, bool]:
    """Ours, and whether it is a gate."""
    name = fields.text("activation", "gelu")
    if fields.has("gated_linear_unit"):  # NeMo 2 says it in two fields
        activation, gated = _FUNCTIONS_2[name], fields.flag("gated_linear_unit")
    elif name in _ACTIVATIONS:
        activation, gated = _ACTIVATIONS[name]
    else:
        raise UnsupportedModelError(
            f"{fields.path}: activation = {name!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    # The kernels that add the bias as well compute the approximation by tanh.
    fused = fields.flag("bias_activation_fusion", True)
    if activation == "gelu" and (fused or fields.flag("openai_gelu", False)):
        activation = "gelu_tanh"
    return activation, gated


def _norm(fields: Fields) -> tuple[str, bool]:
    """Ours, and whether its weight is stored less one."""
    name = fields.text("normalization", "layernorm")
    if name.lower() not in _NORMS:
        raise UnsupportedModelError(
            f"{fields.path}: normalization = {name!r} is not supported; "
            f"supported: {', '.join(_NORMS)}"
        )
    norm, less_one = _NORMS[name.lower()]
    return norm, less_one or fields.flag("layernorm_zero_centered_gamma", False)


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    share = fields.number("rotary_percentage", 1.0)
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise fields.bad(
            "rotary_percentage", f"such that an even number of {head_dim} elements is rotated"
        )
    theta = fields.number("rotary_base", 10000.0)
    if fields.flag("scale_positional_embedding", False):
        return RopeConfig(
            theta,
            dim,
            "llama3",
            fields.number("scale_factor", 8.0),
            fields.integer("old_context_len", 8192),
            fields.number("low_freq_factor", 1.0),
            fields.number("high_freq_factor", 4.0),
        )
    factor = fields.number("seq_len_interpolation_factor", 1.0)
    if factor != 1.0:
        return RopeConfig(theta, dim, "linear", factor)
    return RopeConfig(theta, dim)
