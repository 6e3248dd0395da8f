"""A tiny random transformers model, and what it is made of."""

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
    """A transformers config class and what differs from `COMMON`. Vectors, which are norms'
    weights for the most part, are drawn around `vector_mean`: 0 where they are stored less one.
    With `every_expert`, a mixture of experts chooses all of them."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    vector_mean: float = 1.0
    every_expert: dict[str, Any] | None = None

    @property
    def model_type(self) -> str:
        return str(self._config_class.model_type)

    @property
    def _config_class(self) -> Any:
        return getattr(transformers, f"{self.config}Config")

    def build(self, dtype: torch.dtype) -> transformers.PreTrainedModel:
        """A choice of experts between two that are nearly as good may fall otherwise in 16 bits,
        and then nothing is comparable; so there every expert is chosen."""
        settings = {**COMMON, **self.settings}
        if dtype != torch.float32:
            settings |= self.every_expert or {}
        config = self._config_class(**settings)
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Large enough that every part of the network shows in the logits, biases included.
            mean = self.vector_mean if parameter.ndim == 1 else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                torch.nn.init.normal_(buffer, std=0.15)
        return model.to(dtype).eval()

    def save(self, directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
        model = self.build(dtype)
        model.save_pretrained(directory)
        return model


COMMON = {
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


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **values}
    return {"rope_parameters": parameters}
