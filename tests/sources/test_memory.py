"""Reading the other layouts takes no more memory for a larger model."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_layout import write_meta
from nemo_layout import NemoWriter, as_yaml, below, nemo1_config, pack
from parts import Parts
from trtllm_layout import write_trtllm

from llmforge.checkpoint.convert import convert
from llmforge.settings import ConvertSettings

HIDDEN, SIZE, VOCABULARY, HEADS = 512, 12288, 32768, 8
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}
# The pipeline's buffers, and the strips of a tensor that is cut by columns.
BOUND = 32 << 20


def model() -> dict[str, torch.Tensor]:
    """A layer of 38 MB, between tables of 34 MB: each is larger than BOUND."""
    shapes = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
        **{f"model.layers.0.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
        "model.layers.0.mlp.gate_proj": (SIZE, HIDDEN),
        "model.layers.0.mlp.up_proj": (SIZE, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, SIZE),
    }
    return {f"{n}.weight": torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}


def nemo(path: Path, state: dict[str, torch.Tensor], container: str, form: str) -> Path:
    outer = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    inner = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{x: f"self_attn.{x}_proj" for x in "qkvo"},
        **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    parts = Parts(
        {f"{ours}.weight": state[f"{theirs}.weight"] for ours, theirs in outer.items()},
        [
            {
                f"{ours}.weight": state[f"model.layers.0.{theirs}.weight"]
                for ours, theirs in inner.items()
            }
        ],
        HEADS,
        HEADS,
        HIDDEN // HEADS,
    )
    writer = NemoWriter(parts)
    if form == "ranks":
        files = writer.ranks(2, 1)
    else:
        files = below("model_weights", writer.zarr(2) if form == "zarr" else writer.torch_dist(2))
    config = nemo1_config(parts, tensor_model_parallel_size=2)
    return pack(path, {"model_config.yaml": as_yaml(config), **files}, container)


TRTLLM = {
    "architecture": "LlamaForCausalLM",
    "position_embedding_type": "rope_gpt_neox",
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}
LAYOUTS: dict[str, Callable[[Path, Any], Path]] = {
    "meta": lambda path, state: write_meta(path, CONFIG, state, 2),
    "tensorrt-llm": lambda path, state: write_trtllm(path, CONFIG, state, 2, fields=TRTLLM),
    "nemo ranks": lambda path, state: nemo(path, state, "tar", "ranks"),
    "nemo torch_dist": lambda path, state: nemo(path, state, "tar", "torch_dist"),
    "nemo zarr": lambda path, state: nemo(path, state, "directory", "zarr"),
    "nemo compressed": lambda path, state: nemo(path, state, "gz", "torch_dist"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_less_than_a_tensor(tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout](tmp_path / "model", model())
    tracemalloc.start()
    try:
        convert(path, tmp_path / "out", ConvertSettings())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BOUND, f"{peak / 2**20:.0f} MiB"
