"""`ModelConfig`: what a decoder is, in neutral terms. Foreign spellings are read in families.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmforge.errors import StoreError

DTYPES = ("bfloat16", "float16", "float32")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of `dim` of each head's elements, halves rotated (GPT-NeoX style).

    `scaling` says how the frequencies are stretched beyond `original_max_position`; the fields
    below it are read by the scalings named in their comments.
    """

    theta: float
    dim: int
    scaling: str = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_position: int = 0  # dynamic, llama3, yarn: positions seen in training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole-numbered ramp bounds
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it

    def frequencies(self, sequence_length: int = 0) -> list[float]:
        """The `dim / 2` angular frequencies in radians a position.

        `sequence_length` matters to dynamic scaling only: the base grows with it beyond
        `original_max_position` (NTK-aware scaling, https://arxiv.org/abs/2306.15595 and its
        sequel by bloc97). llama3: frequencies of long wavelength divided by `factor`, a ramp
        between (Llama 3.1 release). yarn: https://arxiv.org/abs/2309.00071, section 3.2.
        """
        theta = self.theta
        if self.scaling == "dynamic" and sequence_length > self.original_max_position:
            stretch = self.factor * sequence_length / self.original_max_position - (self.factor - 1)
            theta *= stretch ** (self.dim / (self.dim - 2))
        plain = [theta ** (-2 * i / self.dim) for i in range(self.dim // 2)]
        if self.scaling == "linear":
            return [f / self.factor for f in plain]
        if self.scaling == "llama3":
            return [self._llama3(f) for f in plain]
        if self.scaling == "yarn":
            return self._yarn(plain)
        return plain

    def _llama3(self, frequency: float) -> float:
        turns = self.original_max_position * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - ramp) * frequency / self.factor + ramp * frequency

    def _yarn(self, plain: list[float]) -> list[float]:
        def dimension_of(turns: float) -> float:
            """The (fractional) pair index that turns this often over the trained length."""
            ratio = self.original_max_position / (turns * 2 * math.pi)
            return self.dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = (high - low) or 0.001
        result = []
        for index, frequency in enumerate(plain):
            ramp = min(max((index - low) / span, 0.0), 1.0)
            result.append(frequency / self.factor * ramp + frequency * (1 - ramp))
        return result


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Lengths in elements or tokens.

    `family` is the name of the row in families.py that read it, for people; no code branches
    on it. `sliding_window` has one entry a layer: the number of positions, its own included,
    that a token attends to, or None for all before it.
    """

    family: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    activation: str = "silu"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.activation in ACTIVATIONS, self.activation
        assert self.rope.scaling in ROPE_SCALINGS, self.rope.scaling
        assert len(self.sliding_window) == self.num_layers, "one sliding_window entry a layer"
        assert self.num_heads % self.num_kv_heads == 0, "q heads divide into groups of kv heads"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        values = dataclasses.asdict(self)
        values["sliding_window"] = list(self.sliding_window)
        values["eos_token_ids"] = list(self.eos_token_ids)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises StoreError where fields are missing, unknown or bad."""
        try:
            fields = dict(values)
            fields["rope"] = RopeConfig(**fields["rope"])
            fields["sliding_window"] = tuple(fields["sliding_window"])
            fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
            return cls(**fields)
        except (TypeError, ValueError, KeyError, ArithmeticError, AssertionError) as error:
            raise StoreError(f"the manifest's model config is not valid: {error}") from error
