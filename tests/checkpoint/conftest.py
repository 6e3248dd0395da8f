"""Small models in the Hugging Face layout, written here by hand: independent of families/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 33,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Tensors = dict[str, Any]


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, size, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{layer}self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{layer}self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.gate_proj.weight": (size, hidden),
            f"{layer}mlp.up_proj.weight": (size, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, size),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


@pytest.fixture
def base_config() -> dict[str, Any]:
    return dict(CONFIG)


@pytest.fixture
def hf_model(tmp_path: Path) -> Callable[..., Path]:
    """make(name, config=changes, edit=f(tensors), dtype=..., shards=n): a model directory."""
    import torch
    from safetensors.torch import save_file

    def make(
        name: str = "model",
        config: dict[str, Any] | None = None,
        edit: Callable[[Tensors], None] = lambda tensors: None,
        dtype: str = "bfloat16",
        shards: int = 0,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        values = {**CONFIG, **(config or {})}
        (directory / "config.json").write_text(json.dumps(values))
        generator = torch.Generator().manual_seed(0)
        sizes = _shapes({**CONFIG, **{k: v for k, v in values.items() if type(v) is int}})
        tensors: Tensors = {
            key: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
            for key, shape in sizes.items()
        }
        edit(tensors)
        if not shards:
            save_file(tensors, directory / "model.safetensors")
            return directory
        weight_map: dict[str, str] = {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(tensors.items())[index::shards])
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)
        return directory

    return make


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output path in a directory of its own, so that anything left beside it is seen."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "checkpoint"


@pytest.fixture
def assert_nothing_left(output: Path) -> Callable[[], None]:
    def check() -> None:
        assert list(output.parent.iterdir()) == []

    return check
