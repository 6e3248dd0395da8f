"""TensorRT-LLM's model classes, as tables: which family each one is, under which names its config
has the family's fields, what its code fixes, and what its tensors are.

Sources, in https://github.com/NVIDIA/TensorRT-LLM up to release 1.2: PretrainedConfig in
tensorrt_llm/models/modeling_utils.py with each model's config.py for the fields, each model's
convert.py, or examples/MODEL/convert_checkpoint.py, for names and layouts; for LLaMA's and QWen's
classes under other names, MODEL_MAP in tensorrt_llm/models/__init__.py. Its GELU is always the
approximation by tanh; here it is what the original model has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmforge.checkpoint.families.base import (
    Rules,
    both,
    halved,
    plain_mlp,
    refuse,
    rename,
)
from llmforge.checkpoint.families.experts import DOWN, GATE_UP, router
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.mapping import Rule
from llmforge.checkpoint.sources.trtllm_experts import AS_THEY_ARE, NORMALISED, read_router

LAYER = "transformer.layers.{i}."


def _split(theirs: str, *parts: tuple[str, str]) -> Rules:
    """A linear that gives several of ours, whose parts the source names `NAME[part]`."""
    return tuple(
        rename(f"{LAYER}{theirs}.{kind}[{part}]", f"layers.{{i}}.{ours}.{kind}")
        for part, ours in parts
        for kind in ("weight", "bias")
    )


_ENDS: Rules = (
    rename("transformer.vocab_embedding.weight", "embed.weight"),
    rename("transformer.position_embedding.weight", "positions.weight"),
    *both("transformer.ln_embed", "embed_norm"),
    *both("transformer.ln_f", "final_norm"),
    *both("lm_head", "head"),
)
_DENSE: Rules = both(f"{LAYER}attention.dense", "layers.{i}.attention.o")
_ATTENTION: Rules = (
    *_split("attention.qkv", ("q", "attention.q"), ("k", "attention.k"), ("v", "attention.v")),
    rename(f"{LAYER}attention.q_layernorm.weight", "layers.{i}.attention.q_norm.weight"),
    rename(f"{LAYER}attention.k_layernorm.weight", "layers.{i}.attention.k_norm.weight"),
    *_DENSE,
)
# Neighbouring elements rotated (`rope_gptj`).
_INTERLEAVED: Rules = (
    *(
        Rule(
            (f"{LAYER}attention.qkv.{kind}[{x}]",), (f"layers.{{i}}.attention.{x}.{kind}",), halved
        )
        for x in "qk"
        for kind in ("weight", "bias")
    ),
    *_split("attention.qkv", ("v", "attention.v")),
    *_DENSE,
)
_PLAIN_MLP: Rules = plain_mlp(f"{LAYER}mlp.fc", f"{LAYER}mlp.proj")
# GatedMLP: activation(fc) * gate.
_GATED_MLP: Rules = (
    *both(f"{LAYER}mlp.fc", "layers.{i}.mlp.gate"),
    *both(f"{LAYER}mlp.gate", "layers.{i}.mlp.up"),
    *both(f"{LAYER}mlp.proj", "layers.{i}.mlp.down"),
)
# MLP with "swiglu" as its activation: of what fc gives, the second half is activated.
_FUSED_MLP: Rules = (
    *_split("mlp.fc", ("gate", "mlp.gate"), ("up", "mlp.up")),
    *both(f"{LAYER}mlp.proj", "layers.{i}.mlp.down"),
)


# MixtureOfExperts, whose experts `trtllm_experts` takes apart: as in an MLP with "swiglu".
_MIXTURE: Rules = (
    router(f"{LAYER}mlp.router"),
    Rule((f"{LAYER}mlp.fc.weight[{{e}}.gate]", f"{LAYER}mlp.fc.weight[{{e}}.up]"), (GATE_UP,)),
    Rule((f"{LAYER}mlp.proj.weight[{{e}}]",), (DOWN,)),
)
_SHARED_EXPERT: Rules = (
    rename(f"{LAYER}shared_expert.fc.weight[gate]", "layers.{i}.moe.shared.gate.weight"),
    rename(f"{LAYER}shared_expert.fc.weight[up]", "layers.{i}.moe.shared.up.weight"),
    rename(f"{LAYER}shared_expert.proj.weight", "layers.{i}.moe.shared.down.weight"),
    rename(f"{LAYER}shared_expert_gate.weight", "layers.{i}.moe.shared_gate.weight"),
)


def _norms(mlp: str = "post_layernorm") -> Rules:
    return (
        *both(f"{LAYER}input_layernorm", "layers.{i}.attention_norm"),
        *both(f"{LAYER}{mlp}", "layers.{i}.mlp_norm"),
    )


def _llama(mlp: Rules = _GATED_MLP) -> Rules:
    return (*_ENDS, *_norms(), *_ATTENTION, *mlp)


_GPT: Rules = (*_ENDS, *_norms(), *_ATTENTION, *_PLAIN_MLP)
_GEMMA2: Rules = (
    *_ENDS,
    *_ATTENTION,
    *_GATED_MLP,
    *_norms(mlp="pre_feedforward_layernorm"),
    *both(f"{LAYER}post_layernorm", "layers.{i}.attention_post_norm"),
    *both(f"{LAYER}post_feedforward_layernorm", "layers.{i}.mlp_post_norm"),
)


@dataclass(frozen=True)
class Architecture:
    """A model class.

    names: what the config's `architecture` may say. family: the row of families/ that reads the
    config. rules: tensors, `fused_mlp` those where gate and up are one. aliases: the family's name
    of a field → the config's, besides COMMON. fixed: fields of the family that the class implies.
    positions: what `position_embedding_type` may be. qk_norm: whether `qk_layernorm` may be set.
    mixture: every layer is a mixture of experts. warning: for the user.
    """

    names: tuple[str, ...]
    family: str
    rules: Rules
    fused_mlp: Rules | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    positions: tuple[str, ...] = ("rope_gpt_neox",)
    qk_norm: bool = False
    mixture: bool = False
    warning: str = ""


# The families' names of fields → TensorRT-LLM's.
COMMON = {
    "norm_eps": "norm_epsilon",
    "head_dim": "head_size",
    "rope_theta": "rotary_base",
    "rope_scaling": "rotary_scaling",
    "partial_rotary_factor": "rotary_pct",
    "attention_bias": "attn_bias",
}
# Its names of activations that transformers does not have. `swiglu` is a gate in one product with
# what it gates.
ACTIVATIONS = {
    "swiglu": "silu",
    "fast-swiglu": "silu",
    "squared-relu": "relu2",
    "openai-gelu": "gelu_new",
}


def _falcon(fields: Fields) -> dict[str, Any]:
    new = bool(fields.data.get("new_decoder_architecture"))
    kv_heads = fields.data.get("num_key_value_heads") or fields.data.get("num_attention_heads")
    return {
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if new else None,
        "parallel_attn": bool(fields.data.get("parallel_attention", False)),
    }


def _phi3(fields: Fields) -> dict[str, Any]:
    if fields.data.get("position_embedding_type") != "long_rope":
        return {"rope_scaling": None}
    return {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": fields.data.get("longrope_scaling_short_factors"),
            "long_factor": fields.data.get("longrope_scaling_long_factors"),
        }
    }


def _mpt(fields: Fields) -> dict[str, Any]:
    return {
        "no_bias": not fields.data.get("bias", False),
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": fields.data.get("alibi_bias_max", 8),
            "clip_qkv": fields.data.get("clip_qkv"),
        },
    }


def _baichuan(fields: Fields) -> dict[str, Any]:
    """7B has rope; 13B has ALiBi, and its family calls the length otherwise."""
    if fields.data.get("position_embedding_type") != "alibi":
        return {}
    length = fields.integer("max_position_embeddings")
    return {"max_position_embeddings": None, "model_max_length": length}


def _chatglm(fields: Fields) -> dict[str, Any]:
    """Of the class that is also GLM-10B, ChatGLM-6B and GLM-4, only ChatGLM 2 and 3."""
    refuse(fields, "chatglm_version", "chatglm2", "chatglm3")
    refuse(fields, "rotary_base", 10000.0)
    refuse(fields, "rotary_scaling")
    refuse(fields, "rotary_pct", 0.5)
    return {
        "kv_channels": fields.integer("head_size"),
        "multi_query_attention": True,
        "multi_query_group_num": fields.integer("num_key_value_heads"),
        "add_qkv_bias": fields.flag("add_qkv_bias", True),
    }


_EVERY_LAYER = {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
_NO_WINDOW = "TensorRT-LLM checkpoints do not record a sliding window: full attention is taken"
_GELU_TANH = {"hidden_act": "gelu_pytorch_tanh"}

ARCHITECTURES = (
    Architecture(("LlamaForCausalLM", "LLaMAForCausalLM"), "llama", _llama(), _llama(_FUSED_MLP)),
    Architecture(
        ("MistralForCausalLM",),
        "mistral",
        _llama(),
        fixed=lambda fields: {"sliding_window": None},
        warning=_NO_WINDOW,
    ),
    Architecture(
        ("GraniteForCausalLM",),
        "granite",
        _llama(),
        fixed=lambda fields: {
            "attention_multiplier": fields.number("attention_multiplier", 1.0)
            / fields.integer("head_size") ** 0.5,
            "logits_scaling": 1 / fields.number("output_multiplier_scale", 1.0),
        },
    ),
    Architecture(
        ("Qwen2ForCausalLM",),
        "qwen2",
        _llama(),
        fixed=lambda fields: {"use_sliding_window": False},
    ),
    Architecture(
        ("Qwen3ForCausalLM",),
        "qwen3",
        _llama(),
        fixed=lambda fields: {"use_sliding_window": False},
        qk_norm=True,
    ),
    Architecture(
        ("Phi3ForCausalLM",),
        "phi3",
        _llama(),
        _llama(_FUSED_MLP),
        fixed=lambda fields: {**_phi3(fields), "sliding_window": None},
        positions=("rope_gpt_neox", "long_rope"),
    ),
    Architecture(
        ("GemmaForCausalLM",),
        "gemma",
        _llama(),
    ),
    Architecture(
        ("Gemma2ForCausalLM",),
        "gemma2",
        _GEMMA2,
        fixed=lambda fields: {"sliding_window": fields.data.get("sliding_window") or 4096},
    ),
    Architecture(
        ("CohereForCausalLM",),
        "cohere",
        (*_ENDS, *_norms(), *_INTERLEAVED, *_GATED_MLP),
        aliases={"logit_scale": "output_multiplier_scale"},
        positions=("rope_gptj",),
    ),
    Architecture(
        ("GPT2LMHeadModel", "GPTForCausalLM:gpt2"),
        "gpt2",
        _GPT,
        positions=("learned_absolute",),
    ),
    Architecture(
        ("GPTBigCodeForCausalLM", "GPTForCausalLM:starcoder", "GPTForCausalLM:santacoder"),
        "gpt_bigcode",
        _GPT,
        fixed=lambda fields: {"multi_query": fields.data.get("num_key_value_heads") == 1},
        positions=("learned_absolute",),
    ),
    Architecture(
        ("Starcoder2ForCausalLM", "GPTForCausalLM:starcoder2"),
        "starcoder2",
        _GPT,
        aliases={"use_bias": "bias"},
        fixed=lambda fields: {"sliding_window": None, **_GELU_TANH},
        warning=_NO_WINDOW,
    ),
    Architecture(
        ("NemotronForCausalLM", "GPTForCausalLM:nemotron"),
        "nemotron",
        _GPT,
        fixed=lambda fields: {
            "attention_bias": bool(fields.data.get("bias")),
            "mlp_bias": bool(fields.data.get("bias")),
        },
    ),
    Architecture(
        ("GPTJForCausalLM",),
        "gptj",
        (*_ENDS, *_norms(), *_INTERLEAVED, *_PLAIN_MLP),
        fixed=lambda fields: {"hidden_act": "gelu_new"},
        positions=("rope_gptj",),
    ),
    Architecture(
        ("GPTNeoXForCausalLM",),
        "gpt_neox",
        _GPT,
        aliases={"rope_theta": "rotary_emb_base"},
        positions=("learned_absolute", "rope_gpt_neox"),  # it says the first and means the second
    ),
    Architecture(("FalconForCausalLM",), "falcon", _GPT, fixed=_falcon),
    Architecture(
        ("PhiForCausalLM",),
        "phi",
        _GPT,
    ),
    Architecture(("OPTForCausalLM",), "opt", _GPT, positions=("learned_absolute",)),
    Architecture(
        ("BloomForCausalLM",),
        "bloom",
        _GPT,
        fixed=lambda fields: _GELU_TANH,
        positions=("alibi",),
    ),
    Architecture(
        ("MPTForCausalLM", "MptForCausalLM"), "mpt", _GPT, fixed=_mpt, positions=("alibi",)
    ),
    Architecture(
        ("InternLM2ForCausalLM",),
        "internlm2",
        _llama(),
        fixed=lambda fields: {"bias": fields.flag("attn_bias", False)},
    ),
    # The head of Baichuan 2 is stored normalised (models/baichuan/convert.py).
    Architecture(
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        "baichuan",
        _llama(),
        fixed=_baichuan,
        positions=("rope_gpt_neox", "alibi"),
    ),
    Architecture(
        ("ChatGLMModel", "ChatGLMForCausalLM", "ChatGLMForConditionalGeneration"),
        "chatglm",
        (*_ENDS, *_norms(), *_INTERLEAVED, *_FUSED_MLP),
        fixed=_chatglm,
        positions=("rope_gptj",),
    ),
    Architecture(("ExaoneForCausalLM",), "exaone", _llama()),
    Architecture(
        ("MixtralForCausalLM",),
        "mixtral",
        _llama(_MIXTURE),
        fixed=lambda fields: {**read_router(fields, NORMALISED), "sliding_window": None},
        mixture=True,
        warning=_NO_WINDOW,
    ),
    Architecture(
        ("Qwen2MoeForCausalLM",),
        "qwen2_moe",
        _llama((*_MIXTURE, *_SHARED_EXPERT)),
        aliases={
            "qkv_bias": "attn_bias",
            "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        },
        fixed=lambda fields: {
            **read_router(fields, AS_THEY_ARE, NORMALISED),
            **_EVERY_LAYER,
        },
        mixture=True,
    ),
    Architecture(
        ("Qwen3MoeForCausalLM",),
        "qwen3_moe",
        _llama(_MIXTURE),
        fixed=lambda fields: {**read_router(fields, AS_THEY_ARE, NORMALISED), **_EVERY_LAYER},
        qk_norm=True,
        mixture=True,
    ),
)
