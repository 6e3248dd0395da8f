"""Tiny random transformers models of every architecture, in the odd sizes that break things."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 101  # divides by nothing
LAYERS = 3
MAX_POSITION = 64


@dataclass(frozen=True)
class Case:
    """A transformers config class and what differs from `_COMMON`."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype) -> transformers.PreTrainedModel:
        config_class = getattr(transformers, f"{self.config}Config")
        config = config_class(**{**_COMMON, **self.settings})
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Large enough that every part of the network shows in the logits, biases included.
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
        return model.to(dtype).eval()

    def save(self, directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
        model = self.build(dtype)
        model.save_pretrained(directory)
        return model


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **values}
    return {"rope_parameters": parameters}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

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
    Case("llama-linear", "Llama", _rope("linear", factor=4.0)),
    Case("llama-dynamic", "Llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    Case(
        "llama-llama3",
        "Llama",
        _rope("llama3", **_LLAMA3, original_max_position_embeddings=16),
    ),
    Case("llama-yarn", "Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
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
]
BY_NAME = {case.name: case for case in CASES}
