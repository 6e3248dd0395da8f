"""Cases of models.py with mixtures of experts."""

from __future__ import annotations

from case import Case, rope

_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
_MANY = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_ALL = {"num_experts_per_tok": 6}
_YARN = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=0.7,
)
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "q_lora_rank": 24,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_EIGHT = {"num_experts_per_tok": 8}
_GROUPS = {"n_group": 4, "topk_group": 2}
_UNGROUPED = {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 8}

MIXTURES = [
    Case("mixtral", "Mixtral", _EXPERTS, every_expert=_ALL),
    Case(
        "mixtral-window",
        "Mixtral",
        {**_EXPERTS, "sliding_window": 6, "num_experts_per_tok": 1},
        every_expert=_ALL,
    ),
    Case(
        "qwen2-moe",
        "Qwen2Moe",
        {**_MANY, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
        every_expert=_ALL,
    ),
    Case(
        "qwen2-moe-normed",
        "Qwen2Moe",
        {
            **_MANY,
            "shared_expert_intermediate_size": 28,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
        every_expert=_ALL,
    ),
    Case(
        "qwen3-moe",
        "Qwen3Moe",
        {**_MANY, "head_dim": 16, "norm_topk_prob": True},
        every_expert=_ALL,
    ),
    Case("qwen3-moe-plain", "Qwen3Moe", {**_MANY, "head_dim": 16}, every_expert=_ALL),
    Case("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}, every_expert=_ALL),
    Case(
        "olmoe-clipped",
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.8, "norm_topk_prob": True},
        every_expert=_ALL,
    ),
    Case(
        "granitemoe",
        "GraniteMoe",
        {**_EXPERTS, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
        every_expert=_ALL,
    ),
    Case(
        "glm4-moe",
        "Glm4Moe",
        {
            "head_dim": 16,
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
            **_GROUPS,
        },
        every_expert=_UNGROUPED,
    ),
    Case(
        "dbrx",
        "Dbrx",
        {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 2},
            **rope("default"),
        },
        every_expert={"ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 6}},
    ),
    Case("deepseek-v2", "DeepseekV2", {**_LATENT, **_YARN}, every_expert=_EIGHT),
    Case(
        "deepseek-v2-groups",
        "DeepseekV2",
        {
            **_LATENT,
            **_GROUPS,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        every_expert=_UNGROUPED,
    ),
    Case(
        "deepseek-v3",
        "DeepseekV3",
        {**_LATENT, **_GROUPS, "routed_scaling_factor": 1.5},
        every_expert=_UNGROUPED,
    ),
    Case(
        "deepseek-v3-yarn",
        "DeepseekV3",
        {**_LATENT, **_YARN, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        every_expert=_EIGHT,
    ),
    Case(
        "gpt-oss",
        "GptOss",
        {
            **_EXPERTS,
            "head_dim": 16,
            "sliding_window": 6,
            "swiglu_limit": 0.9,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        },
        every_expert=_ALL,
    ),
]
