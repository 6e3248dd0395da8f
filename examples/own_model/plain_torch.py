"""Parallax in plain torch: random weights to convert, and the logits to compare with.

    python examples/own_model/plain_torch.py DIRECTORY

writes config.json and model.safetensors, in the model's own names, into DIRECTORY.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

CONFIG: dict[str, Any] = {
    "architectures": ["ParallaxForCausalLM"],
    "model_type": "parallax",
    "dtype": "float32",
    "vocabulary": 101,
    "width": 64,
    "depth": 3,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 96,
    "context": 128,
    "block_scales": [1.0, 0.75, 0.5],
}
Weights = dict[str, torch.Tensor]


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    width, mlp = config["width"], config["mlp_width"]
    head_dim = width // config["heads"]
    fused = (config["heads"] + 2 * config["kv_heads"]) * head_dim + mlp

    def normal(*shape: int, mean: float = 0.0, std: float = 0.15) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    weights = {"wte": normal(config["vocabulary"], width, std=1.0)}
    for i in range(config["depth"]):
        weights[f"h{i}.gain"] = normal(width, mean=1.0)
        weights[f"h{i}.w_in"] = normal(width, fused)
        weights[f"h{i}.w_mix"] = normal(width, width)
        weights[f"h{i}.w_down"] = normal(width, mlp)
    weights["gain"] = normal(width, mean=1.0)
    weights["unembed"] = normal(config["vocabulary"], width)
    weights["training_step"] = torch.zeros(1)
    return weights


def logits(config: dict[str, Any], weights: Weights, tokens: list[int]) -> torch.Tensor:
    """The logits [tokens, vocabulary] of every position of a sequence."""
    heads, kv_heads = config["heads"], config["kv_heads"]
    head_dim = config["width"] // heads
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, config["mlp_width"]]
    x = weights["wte"][tokens]
    for i, block_scale in enumerate(config["block_scales"]):
        normed = _norm(x, weights[f"h{i}.gain"])
        q, k, v, up = (normed @ weights[f"h{i}.w_in"]).split(sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(0, 1) for t in (q, k, v))
        q, k = _rotated(q), _rotated(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(0, 1).flatten(1)
        mixed = attended @ weights[f"h{i}.w_mix"].T
        x = x + block_scale * (mixed + F.relu(up).square() @ weights[f"h{i}.w_down"].T)
    return _norm(x, weights["gain"]) @ weights["unembed"].T


def _norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [heads, tokens, head_dim], halves rotated."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def save(directory: Path, config: dict[str, Any], weights: Weights) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, directory / "model.safetensors")


if __name__ == "__main__":
    save(Path(sys.argv[1]), CONFIG, random_weights(CONFIG))
