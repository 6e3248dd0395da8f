"""DeepSeek-V2 and V3: latent attention and mixtures of experts with shared ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig
from llmforge.checkpoint.families.base import (
    RMS_EPS,
    Family,
    Rules,
    read_common,
    refuse,
    rename,
)
from llmforge.checkpoint.families.experts import (
    CORRECTED_MIXTURE,
    next_token_layers,
    read_groups,
    read_top_k,
)
from llmforge.checkpoint.families.llama import ENDS, MLP, OUTPUT, PRE_NORMS
from llmforge.checkpoint.hf_config import Fields, read_rope
from llmforge.checkpoint.mapping import Rule
from llmforge.safetensors_io import Array


def _read(family: Family, fields: Fields, **router: Any) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        refuse(fields, name, False)
    refuse(fields, "moe_layer_freq", 1)
    refuse(fields, "rope_interleave", True)
    rank = fields.data.get("q_lora_rank", family.default("q_rank"))
    latent = LatentConfig(
        q_rank=None if rank is None else fields.integer("q_lora_rank", rank),
        kv_rank=fields.integer("kv_lora_rank", 512),
        nope_dim=fields.integer("qk_nope_head_dim", 128),
        rope_dim=fields.integer("qk_rope_head_dim", 64),
        value_dim=fields.integer("v_head_dim", 128),
    )
    head_dim = latent.nope_dim + latent.rope_dim
    length = fields.integer("max_position_embeddings", family.default("max_position_embeddings"))
    rope = read_rope(fields, latent.rope_dim, length, family.default("rope_theta"))
    size = fields.integer("moe_intermediate_size", family.default("expert_size"))
    shared = fields.integer("n_shared_experts", family.default("shared_experts"))
    moe = MoeConfig(
        expert_size=size,
        dense_layers=tuple(
            range(fields.integer("first_k_dense_replace", family.default("dense"), minimum=0))
        ),
        scale=fields.number("routed_scaling_factor", family.default("routed_scale")),
        shared_size=size * shared,
        **router,
    )
    return read_common(
        family,
        fields,
        num_kv_heads=1,
        head_dim=head_dim,
        rope=rope,
        attention_scale=head_dim**-0.5 * _scale_beyond(fields) ** 2,
        latent=latent,
        moe=moe,
    )


def _scale_beyond(fields: Fields) -> float:
    """By which q and k each are scaled where positions are stretched (DeepSeek's extension of
    https://arxiv.org/abs/2309.00071, section 3.4)."""
    rope = fields.table("rope_scaling") or fields.table("rope_parameters")
    if rope is None or rope.text("rope_type", rope.text("type", "default")) == "default":
        return 1.0
    if not rope.data.get("mscale_all_dim"):
        return 1.0
    factor = rope.number("factor")
    return 1.0 if factor <= 1 else 0.1 * rope.number("mscale_all_dim") * math.log(factor) + 1.0


def _read_v2(family: Family, fields: Fields) -> ModelConfig:
    refuse(fields, "topk_method", "greedy", "group_limited_greedy")
    refuse(fields, "scoring_func", "softmax")
    refuse(fields, "norm_topk_prob", False)
    count = fields.integer("num_experts", 64)
    top_k = read_top_k(fields, "num_experts_per_tok", 6, count)
    groups, kept = 1, 1
    if fields.text("topk_method", "greedy") == "group_limited_greedy":
        groups, kept = read_groups(fields, count, top_k, (1, 1))
    return _read(family, fields, num_experts=count, top_k=top_k, groups=groups, kept_groups=kept)


def _read_v3(family: Family, fields: Fields) -> ModelConfig:
    refuse(fields, "topk_method", "noaux_tc")
    refuse(fields, "scoring_func", "sigmoid")
    count = fields.integer("num_experts", 256)
    top_k = read_top_k(fields, "num_experts_per_tok", 8, count)
    groups, kept = read_groups(fields, count, top_k, (8, 4))
    return _read(
        family,
        fields,
        num_experts=count,
        top_k=top_k,
        groups=groups,
        kept_groups=kept,
        group_top=2,
        score="sigmoid",
        normalize=fields.flag("norm_topk_prob", True),
        correction=True,
    )


# -- tensors ---------------------------------------------------------------------------------------


def _halves(rows: Array) -> Array:
    """Rows [..., dim, in] whose rope turns neighbours, reordered so that it turns halves."""
    return np.concatenate((rows[..., 0::2, :], rows[..., 1::2, :]), axis=-2)


def _split_queries(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """Of each head the rows that are not rotated, then those that are."""
    assert config.latent is not None
    [weight] = arrays
    heads = weight.reshape(config.num_heads, -1, weight.shape[-1])
    plain, rotated = np.split(heads, [config.latent.nope_dim], axis=1)
    return [x.reshape(-1, weight.shape[-1]) for x in (plain, _halves(rotated))]


def _split_latents(arrays: list[Array], config: ModelConfig) -> list[Array]:
    assert config.latent is not None
    latent, rotated = np.split(arrays[0], [config.latent.kv_rank])
    return [latent, _halves(rotated)]


def _split_keys_and_values(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """Of each head the rows that give its key of a latent, then those that give its value. The
    key's are wanted transposed: see `_latent_attention` of model/decoder.py."""
    assert config.latent is not None
    [weight] = arrays
    heads = weight.reshape(config.num_heads, -1, weight.shape[-1])
    keys, values = np.split(heads, [config.latent.nope_dim], axis=1)
    return [np.ascontiguousarray(keys.transpose(0, 2, 1)), np.ascontiguousarray(values)]


_THEIRS = "model.layers.{i}.self_attn."
_OURS = "layers.{i}.attention."
_QUERIES = (f"{_OURS}q.weight", f"{_OURS}q_rope.weight")
_RULES: Rules = (
    *ENDS,
    *PRE_NORMS,
    rename(f"{_THEIRS}q_a_proj.weight", f"{_OURS}q_a.weight"),
    rename(f"{_THEIRS}q_a_layernorm.weight", f"{_OURS}q_a_norm.weight"),
    Rule((f"{_THEIRS}q_b_proj.weight",), _QUERIES, _split_queries),
    Rule((f"{_THEIRS}q_proj.weight",), _QUERIES, _split_queries),
    Rule(
        (f"{_THEIRS}kv_a_proj_with_mqa.weight",),
        (f"{_OURS}latent.weight", f"{_OURS}k_rope.weight"),
        _split_latents,
    ),
    rename(f"{_THEIRS}kv_a_layernorm.weight", f"{_OURS}latent_norm.weight"),
    Rule(
        (f"{_THEIRS}kv_b_proj.weight",),
        (f"{_OURS}k_up", f"{_OURS}v_up"),
        _split_keys_and_values,
    ),
    *OUTPUT,
    *MLP,
    *CORRECTED_MIXTURE,
)

_ALIASES = {**RMS_EPS, "num_experts": "n_routed_experts"}

DEEPSEEK_FAMILIES = (
    Family(
        "deepseek_v2",
        ("DeepseekV2ForCausalLM", "DeepseekV2Model"),
        ("deepseek_v2",),
        _read_v2,
        _RULES,
        "model.",
        next_token_layers,
        {
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": (2,),
            "q_rank": 1536,
            "expert_size": 1407,
            "shared_experts": 2,
            "dense": 0,
            "routed_scale": 1.0,
        },
        _ALIASES,
        "latent attention; mixture of experts by groups, shared experts",
    ),
    Family(
        "deepseek_v3",
        ("DeepseekV3ForCausalLM", "DeepseekV3Model"),
        ("deepseek_v3",),
        _read_v3,
        _RULES,
        "model.",
        next_token_layers,
        {
            "max_position_embeddings": 4096,
            "bos_token_id": 0,
            "eos_token_id": (1,),
            "q_rank": 1536,
            "expert_size": 2048,
            "shared_experts": 1,
            "dense": 3,
            "routed_scale": 2.5,
        },
        _ALIASES,
        "V3 and R1: latent attention; mixture of experts by corrected sigmoids and groups, shared "
        "experts; FP8 weights are converted, multi-token prediction is left out",
    ),
)
