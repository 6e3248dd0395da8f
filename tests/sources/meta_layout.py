"""Writes a Llama model as Meta's code saves it (github.com/meta-llama/llama-models,
models/llama3/model.py): consolidated.NN.pth of model-parallel ranks, and params.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def neighbours(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows i and i + head_dim / 2 of each head, which rotate together, put next to each other."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def theirs(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"layers.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def write_meta(
    directory: Path,
    config: dict[str, Any],
    state: State,
    ranks: int = 1,
    embedding_by_columns: bool = False,
    **params: Any,
) -> Path:
    directory.mkdir()
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    for rank in range(ranks):
        part: State = {"rope.freqs": torch.ones(head_dim // 2)}
        for name, tensor in state.items():
            if "q_proj" in name or "k_proj" in name:
                tensor = neighbours(tensor, head_dim)
            if "norm" in name:
                piece = tensor
            elif ("k_proj" in name or "v_proj" in name) and kv_heads < ranks:
                piece = tensor.chunk(kv_heads)[rank * kv_heads // ranks]
            elif (
                "o_proj" in name
                or "down_proj" in name
                or ("embed_tokens" in name and embedding_by_columns)
            ):
                piece = tensor.chunk(ranks, 1)[rank]
            else:
                piece = tensor.chunk(ranks)[rank]
            part[theirs(name)] = piece.clone()
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    values = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": kv_heads,
        "vocab_size": config["vocab_size"],
        "multiple_of": 256,
        "norm_eps": config["rms_norm_eps"],
        **params,
    }
    (directory / "params.json").write_text(json.dumps(values))
    return directory
