"""Every model family that llmforge reads, as tables. No other file knows a model's name.

A family is a row of `FAMILIES`: the names by which config.json announces it, how its config is
read into a `ModelConfig`, and which of its tensors become which of our parameters. To add one,
add a row; where it has a feature that `ModelConfig` cannot express, that comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.hf_config import (
    Fields,
    read_activation,
    read_dtype,
    read_json,
    read_layer_windows,
    read_rope,
)
from llmforge.checkpoint.mapping import Ignore, Plan, Rule, make_plan
from llmforge.errors import SourceError, UnsupportedModelError
from llmforge.safetensors_io import TensorInfo


@dataclass(frozen=True)
class Family:
    """A model family.

    architectures: what config.json's `architectures` may say. model_types: what `model_type` may
    say where `architectures` is missing. rules: tensor names. base_prefix: what names begin with
    except in saves of the bare decoder, without its head. ignored: tensors that are not needed.
    defaults: of config fields, where transformers' defaults differ from `_DEFAULTS`.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[Family, Fields], ModelConfig]
    rules: tuple[Rule, ...]
    base_prefix: str
    ignored: tuple[Ignore, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


# What transformers takes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": (),
}


def _rename(theirs: str, ours: str) -> Rule:
    return Rule((theirs,), (ours,))


def _linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return tuple(_rename(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias"))  # type: ignore[return-value]


# Rules for what a config does not have (biases, qk-norm, an untied head) are passed over.
_LLAMA_RULES = (
    _rename("model.embed_tokens.weight", "embed.weight"),
    _rename("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    *_linear("model.layers.{i}.self_attn.q_proj", "layers.{i}.attention.q"),
    *_linear("model.layers.{i}.self_attn.k_proj", "layers.{i}.attention.k"),
    *_linear("model.layers.{i}.self_attn.v_proj", "layers.{i}.attention.v"),
    _rename("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    _rename("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *_linear("model.layers.{i}.self_attn.o_proj", "layers.{i}.attention.o"),
    _rename("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    *_linear("model.layers.{i}.mlp.gate_proj", "layers.{i}.mlp.gate"),
    *_linear("model.layers.{i}.mlp.up_proj", "layers.{i}.mlp.up"),
    *_linear("model.layers.{i}.mlp.down_proj", "layers.{i}.mlp.down"),
    _rename("model.norm.weight", "final_norm.weight"),
    _rename("lm_head.weight", "head.weight"),
)
_LLAMA_IGNORED = (
    Ignore(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the config"),
    Ignore(r".*\.self_attn\.bias|.*\.self_attn\.masked_bias", "attention masks are computed"),
)
_TIED_HEAD = Ignore(r"lm_head\.weight", "the output head is tied to the embedding")


def _read_llama(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", _default(family, "attention_bias"))
    return _read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", _default(family, "mlp_bias")),
    )


def _read_mistral(family: Family, fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    window = None
    if fields.data.get("sliding_window", True) is not None:  # null is "none", absent is the default
        window = fields.integer("sliding_window", _default(family, "sliding_window"))
    return _read_common(family, fields, sliding_window=(window,) * layers)


def _read_qwen2(family: Family, fields: Fields) -> ModelConfig:
    return _read_common(
        family, fields, qkv_bias=True, sliding_window=_read_qwen_windows(family, fields)
    )


def _read_qwen3(family: Family, fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", _default(family, "attention_bias"))
    return _read_common(
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
        _default(family, "sliding_window"),
        _default(family, "max_window_layers"),
    )


def _default(family: Family, name: str) -> Any:
    return family.defaults.get(name, _DEFAULTS.get(name))


def _read_common(family: Family, fields: Fields, **own: Any) -> ModelConfig:
    """The fields that all families here share; `own` are those that the family has read."""
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", _default_kv_heads(family, fields, heads))
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = _read_head_dim(family, fields, hidden, heads)
    max_position = fields.integer(
        "max_position_embeddings", _default(family, "max_position_embeddings")
    )
    bos = fields.token_ids("bos_token_id", (_default(family, "bos_token_id"),))
    return ModelConfig(
        family=family.name,
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", _default(family, "rms_norm_eps")),
        rope=read_rope(fields, head_dim, max_position, _default(family, "rope_theta")),
        activation=read_activation(fields, _default(family, "hidden_act")),
        tied_embeddings=fields.flag("tie_word_embeddings", _default(family, "tie_word_embeddings")),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", _default(family, "eos_token_id")),
        **{"sliding_window": (None,) * layers, **own},
    )


def _default_kv_heads(family: Family, fields: Fields, heads: int) -> int:
    """Null means as many as attention heads; an absent field, the family's default."""
    if "num_key_value_heads" in fields.data:
        return heads
    return _default(family, "num_key_value_heads") or heads


def _read_head_dim(family: Family, fields: Fields, hidden: int, heads: int) -> int:
    if fields.has("head_dim"):
        return fields.integer("head_dim")
    default = _default(family, "head_dim")
    if default and "head_dim" not in fields.data:
        return int(default)
    if hidden % heads:
        raise fields.bad("hidden_size", f"a multiple of num_attention_heads ({heads})")
    return hidden // heads


FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LlamaModel"),
        ("llama",),
        _read_llama,
        _LLAMA_RULES,
        "model.",
        _LLAMA_IGNORED,
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": (2,)},
    ),
    Family(
        "mistral",
        ("MistralForCausalLM", "MistralModel"),
        ("mistral",),
        _read_mistral,
        _LLAMA_RULES,
        "model.",
        _LLAMA_IGNORED,
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        ("qwen2",),
        _read_qwen2,
        _LLAMA_RULES,
        "model.",
        _LLAMA_IGNORED,
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        ("qwen3",),
        _read_qwen3,
        _LLAMA_RULES,
        "model.",
        _LLAMA_IGNORED,
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
)


def supported_architectures() -> list[str]:
    return [family.architectures[0] for family in FAMILIES]


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """The family and the config of a config.json; end-of-sequence tokens of a
    generation_config.json beside it join in. Raises SourceError and UnsupportedModelError."""
    fields = Fields(path, read_json(path))
    family = _find_family(fields)
    _refuse_quantized(fields)
    config = family.read_config(family, fields)
    generation = path.with_name("generation_config.json")
    if generation.is_file():
        more = Fields(generation, read_json(generation)).token_ids("eos_token_id", ())
        eos = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        config = dataclasses.replace(config, eos_token_ids=eos)
    return family, config


def _find_family(fields: Fields) -> Family:
    architectures = fields.data.get("architectures") or []
    if not isinstance(architectures, list):
        raise fields.bad("architectures", "a list of names")
    model_type = fields.data.get("model_type")
    for family in FAMILIES:
        if architectures and any(name in family.architectures for name in architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    supported = f"supported: {', '.join(supported_architectures())}"
    if not architectures and model_type is None:
        raise SourceError(
            f"{fields.path} names no architecture (field architectures or model_type); {supported}"
        )
    name = ", ".join(map(str, architectures)) or f"model type {model_type}"
    code = ""
    if fields.has("auto_map"):
        code = " (it comes with code of its own, which llmforge never executes)"
    raise UnsupportedModelError(
        f"{fields.path}: the architecture {name} is not supported{code}; {supported}"
    )


def _refuse_quantized(fields: Fields) -> None:
    if quantization := fields.table("quantization_config"):
        method = quantization.data.get("quant_method", "unknown method")
        raise UnsupportedModelError(
            f"{fields.path}: the weights are quantized ({method}), which is not supported; "
            "use the model's unquantized weights"
        )


def plan_for(
    family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo], where: str
) -> Plan:
    """Which tensors of the source become which parameters. Raises SourceError, see make_plan."""
    prefix, rules = family.base_prefix, family.rules
    if tensors and not any(name.startswith(prefix) for name in tensors):
        rules = tuple(
            Rule(tuple(name.removeprefix(prefix) for name in r.theirs), r.ours, r.convert)
            for r in rules
        )
    ignored = family.ignored + ((_TIED_HEAD,) if config.tied_embeddings else ())
    return make_plan(config, rules, ignored, tensors, where)
