"""Tiny random transformers models of every architecture, in the odd sizes that break things."""

from __future__ import annotations

from case import COMMON, LAYERS, MAX_POSITION, VOCABULARY, Case, rope
from mixtures import MIXTURES

__all__ = ["BY_NAME", "CASES", "MAX_POSITION", "VOCABULARY", "Case"]

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.5, 3.0, 4.0],
    },
}
_HALF_ROTATED = rope("default", partial_rotary_factor=0.5)
_GEMMA2 = {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 10,
    "sliding_window": 6,
}

CASES = [
    Case("llama", "Llama"),
    Case("llama-tied", "Llama", {"tie_word_embeddings": True}),
    Case("llama-biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-mha", "Llama", {"num_key_value_heads": 4}),
    Case("llama-one-kv-head", "Llama", {"num_key_value_heads": 1}),
    Case("llama-head-dim-80", "Llama", {"head_dim": 80}),
    Case(
        "llama-group-7",
        "Llama",
        {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    Case("llama-gelu", "Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    Case("llama-linear", "Llama", rope("linear", factor=4.0)),
    Case("llama-dynamic", "Llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    Case(
        "llama-llama3",
        "Llama",
        rope("llama3", **_LLAMA3, original_max_position_embeddings=16),
    ),
    Case("llama-yarn", "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    Case("mistral", "Mistral", {"sliding_window": None, "head_dim": 12}),
    Case("mistral-window", "Mistral", {"sliding_window": 6, "head_dim": 12}),
    Case("qwen2", "Qwen2"),
    Case("qwen2-tied", "Qwen2", {"tie_word_embeddings": True}),
    Case(
        "qwen2-window",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    Case("qwen3", "Qwen3", {"head_dim": 16}),
    Case(
        "qwen3-tied-bias",
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    ),
    Case(
        "granite",
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    Case(
        "granite-mha-biases",
        "Granite",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    Case("olmo2", "Olmo2"),
    Case("olmo2-one-kv-head", "Olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    Case("exaone4", "Exaone4", {"sliding_window": 6, "sliding_window_pattern": 2}),
    Case(
        "exaone4-full",
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS},
    ),
    Case("phi3", "Phi3", {"sliding_window": 6}),
    Case("phi3-longrope", "Phi3", {**_LONGROPE, "num_key_value_heads": 1}),
    Case("glm", "Glm", {"head_dim": 16}),
    Case("glm4", "Glm4", {"head_dim": 16, "attention_bias": False}),
    Case("gemma", "Gemma", {"head_dim": 16, "tie_word_embeddings": True}, 0.0),
    Case(
        "gemma2",
        "Gemma2",
        {**_GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        0.0,
    ),
    Case(
        "gemma2-uncapped",
        "Gemma2",
        {
            **_GEMMA2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
        0.0,
    ),
    Case("gemma3", "Gemma3Text", {**_GEMMA2, "sliding_window_pattern": 2}, 0.0),
    Case(
        "gemma3-vision",
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "text_config": {
                **COMMON,
                **_GEMMA2,
                "sliding_window_pattern": 2,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 1,
        },
        0.0,
    ),
    Case("cohere", "Cohere", {"tie_word_embeddings": True}),
    Case(
        "cohere-qk-norm",
        "Cohere",
        {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    ),
    Case("nemotron", "Nemotron", {"head_dim": 16}, 0.0),
    Case("nemotron-biases", "Nemotron", {"attention_bias": True, "mlp_bias": True}, 0.0),
    Case("stablelm", "StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    Case(
        "stablelm-parallel",
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    Case("starcoder2", "Starcoder2", {"sliding_window": 6, "tie_word_embeddings": True}),
    Case("starcoder2-no-bias", "Starcoder2", {"use_bias": False}),
    Case("phi", "Phi"),
    Case("phi-qk-norm", "Phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    Case("gptj", "GPTJ", {"rotary_dim": 6}),
    Case("gpt-neox", "GPTNeoX", _HALF_ROTATED),
    Case(
        "gpt-neox-sequential",
        "GPTNeoX",
        {**_HALF_ROTATED, "use_parallel_residual": False, "attention_bias": False},
    ),
    Case("falcon-7b", "Falcon", {"tie_word_embeddings": True}),
    Case(
        "falcon-40b",
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    Case(
        "falcon-11b",
        "Falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 88,
        },
    ),
    Case("falcon-sequential", "Falcon", {"multi_query": False, "parallel_attn": False}),
    Case("gpt2", "GPT2", {"tie_word_embeddings": True}),
    Case("gpt2-unscaled", "GPT2", {"scale_attn_weights": False, "n_inner": 88}),
    Case("gpt-bigcode", "GPTBigCode", {"tie_word_embeddings": True}),
    Case("gpt-bigcode-mha", "GPTBigCode", {"multi_query": False}),
    Case("opt", "OPT", {"ffn_dim": 88, "tie_word_embeddings": True}),
    Case(
        "opt-350m",
        "OPT",
        {
            "ffn_dim": 88,
            "tie_word_embeddings": True,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 20,
        },
    ),
    Case("opt-no-final-norm", "OPT", {"ffn_dim": 88, "_remove_final_layer_norm": True}),
    Case("bloom", "Bloom", {"tie_word_embeddings": True}),
    Case("bloom-6-heads", "Bloom", {"num_attention_heads": 6}),
    Case("mpt", "Mpt", {"tie_word_embeddings": True, "max_seq_len": MAX_POSITION}),
    Case("mpt-clipped", "Mpt", {"max_seq_len": MAX_POSITION, "attn_config": {"clip_qkv": 0.8}}),
    Case("mpt-6-heads", "Mpt", {"num_attention_heads": 6, "max_seq_len": MAX_POSITION}),
    *MIXTURES,
]
BY_NAME = {case.name: case for case in CASES}
