"""Configs of released mixtures, in the fields that differ from defaults, have the parameters that
their model cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmforge.checkpoint.families import read_config
from llmforge.checkpoint.store import num_parameters
from llmforge.engine.build import check_topology
from llmforge.parallel import Topology

SIZES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "Mixtral",
        46.7,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "vocab_size": 32000,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        30.5,
        {
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_hidden_layers": 48,
            "vocab_size": 151936,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2Moe",
        14.3,
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "vocab_size": 151936,
        },
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        15.7,
        {
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "q_lora_rank": None,
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        671.0,
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_attention_heads": 128,
            "num_hidden_layers": 61,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "vocab_size": 129280,
        },
    ),
    "gpt-oss-20b": (
        "GptOss",
        20.9,
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "vocab_size": 201088,
        },
    ),
    "OLMoE-1B-7B": (
        "Olmoe",
        6.9,
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "vocab_size": 50304,
        },
    ),
    "DBRX": (
        "Dbrx",
        132.0,
        {
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
            "d_model": 6144,
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
        },
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_released_mixtures_have_their_published_sizes(name: str, tmp_path: Path) -> None:
    architecture, billions, values = SIZES[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": [f"{architecture}ForCausalLM"], **values}))
    _, config = read_config(path)
    assert num_parameters(config) / 1e9 == pytest.approx(billions, rel=0.005)
    check_topology(config, Topology(4, 1, 2))
