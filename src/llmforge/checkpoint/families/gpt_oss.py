"""gpt-oss: attention sinks, windows on every other layer, experts with a clamped activation."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    ROTARY_AND_MASKS,
    Family,
    Rules,
    both,
    read_common,
    rename,
)
from llmforge.checkpoint.families.experts import DOWN, EXPERT_ALIASES, GATE_UP, read_mixture
from llmforge.checkpoint.families.llama import ATTENTION, ENDS, PRE_NORMS
from llmforge.checkpoint.hf_config import Fields, read_windows_by_type
from llmforge.checkpoint.mapping import Rule
from llmforge.checkpoint.quantized import MXFP4_DTYPES, mxfp4
from llmforge.safetensors_io import Array

# What transformers takes where a file says nothing of its rope.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(family: Family, fields: Fields) -> ModelConfig:
    if not fields.has("rope_scaling") and not fields.has("rope_parameters"):
        fields = dataclasses.replace(fields, data={**fields.data, "rope_scaling": _ROPE})
    layers = fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias", True)
    window = fields.integer("sliding_window", 128)
    types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    moe = read_mixture(
        fields,
        count=128,
        top_k=4,
        normalize=True,
        router_bias=True,
        expert_bias=True,
        alpha=fields.number("swiglu_alpha", 1.702),
        limit=fields.number("swiglu_limit", 7.0),
    )
    return read_common(
        family,
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        attention_sinks=True,
        sliding_window=read_windows_by_type(fields, types, window),
        moe=moe,
    )


def _halves(rows: Array) -> Array:
    """Rows of gate and up that alternate, one after the other."""
    return np.concatenate((rows[0::2], rows[1::2]))


def _gate_up(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """[1, hidden, 2 I], which is how transformers multiplies."""
    return [_halves(arrays[0][0].T)]


def _down(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [np.ascontiguousarray(arrays[0][0].T)]


def _packed_gate_up(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [_halves(mxfp4(*arrays)[0])]


def _packed_down(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [mxfp4(*arrays)[0]]


def _gate_up_bias(arrays: list[Array], config: ModelConfig) -> list[Array]:
    return [_halves(arrays[0][0])]


def _packed(name: str) -> tuple[str, str]:
    return f"{name}_blocks", f"{name}_scales"


_EXPERTS = "model.layers.{i}.mlp.experts."
_GATE_UP, _DOWN = f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
_RULES: Rules = (
    *ENDS,
    *PRE_NORMS,
    *ATTENTION,
    rename("model.layers.{i}.self_attn.sinks", "layers.{i}.attention.sinks"),
    *both("model.layers.{i}.mlp.router", "layers.{i}.moe.router"),
    Rule((_GATE_UP,), (GATE_UP,), _gate_up, by_expert=True),
    Rule(_packed(_GATE_UP), (GATE_UP,), _packed_gate_up, by_expert=True, dtypes=MXFP4_DTYPES),
    Rule(
        (f"{_GATE_UP}_bias",),
        ("layers.{i}.moe.experts.gate_up.bias",),
        _gate_up_bias,
        by_expert=True,
    ),
    Rule((_DOWN,), (DOWN,), _down, by_expert=True),
    Rule(_packed(_DOWN), (DOWN,), _packed_down, by_expert=True, dtypes=MXFP4_DTYPES),
    rename(f"{_DOWN}_bias", "layers.{i}.moe.experts.down.bias"),
)

GPT_OSS_FAMILIES = (
    Family(
        "gpt_oss",
        ("GptOssForCausalLM", "GptOssModel"),
        ("gpt_oss",),
        _read,
        _RULES,
        "model.",
        ROTARY_AND_MASKS,
        {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 150000.0,
        },
        EXPERT_ALIASES,
        "attention sinks, a window on every other layer, mixture of experts with a clamped "
        "activation; MXFP4 weights are converted",
        ("mxfp4",),
    ),
)
