"""`ModelConfig`: what a decoder is, in neutral terms. Foreign spellings are read in families/."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmforge.errors import StoreError

DTYPES = ("bfloat16", "float16", "float32")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
NORMS = ("rms", "layer")
QK_NORM_SPANS = ("head", "heads", "all")
ROUTER_SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of `dim` of each head's elements, halves rotated (GPT-NeoX style).

    `scaling` says how the frequencies are stretched beyond `original_max_position`; the fields
    below it are read by the scalings named in their comments. Models that rotate neighbouring
    elements instead of halves are converted to this style by reordering their q and k weights.
    """

    theta: float
    dim: int
    scaling: str = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_position: int = 0  # all but linear: positions seen in training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole-numbered ramp bounds
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope: a divisor of each frequency
    long_factor: tuple[float, ...] = ()  # longrope: the same beyond original_max_position

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence is."""
        return self.scaling in ("dynamic", "longrope")

    def frequencies(self, sequence_length: int = 0) -> list[float]:
        """The `dim / 2` angular frequencies in radians a position.

        `sequence_length` matters where `by_length`. dynamic: the base grows with it beyond
        `original_max_position` (NTK-aware scaling, https://arxiv.org/abs/2306.15595 and its
        sequel by bloc97). longrope, which must be given it: other divisors beyond
        `original_max_position` (https://arxiv.org/abs/2402.13753). llama3: frequencies of long
        wavelength divided by `factor`, a ramp between (Llama 3.1 release). yarn:
        https://arxiv.org/abs/2309.00071, section 3.2.
        """
        theta = self.theta
        if self.scaling == "dynamic" and sequence_length > self.original_max_position:
            stretch = self.factor * sequence_length / self.original_max_position - (self.factor - 1)
            theta *= stretch ** (self.dim / (self.dim - 2))
        plain = [theta ** (-2 * i / self.dim) for i in range(self.dim // 2)]
        if self.scaling == "longrope":
            if not sequence_length:
                raise ValueError("longrope frequencies depend on the sequence's length")
            beyond = sequence_length > self.original_max_position
            divisors = self.long_factor if beyond else self.short_factor
            return [f / divisor for f, divisor in zip(plain, divisors, strict=True)]
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
class MoeConfig:
    """A mixture of `num_experts` gated MLPs of intermediate size `expert_size`, `top_k` of them a
    token, in place of a layer's MLP; model/ops.py, `route` and `experts`, says what is computed.

    A layer's expert weights are two parameters: gate_up [experts, 2 expert_size, hidden], of each
    expert the rows of gate and then of up, and down [experts, hidden, expert_size].
    """

    num_experts: int
    top_k: int
    expert_size: int
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP instead

    # The router: `route`'s attributes, and whether it has a bias and a correction of the choice.
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_top: int = 1
    router_bias: bool = False
    correction: bool = False

    # The experts: with `limit`, a clamped activation with the gain `alpha` (see `experts`).
    expert_bias: bool = False
    alpha: float = 1.0
    limit: float | None = None

    # A plain MLP that every token takes besides, scaled by the sigmoid of a product of its own.
    shared_size: int = 0  # 0: there is none
    shared_gate: bool = False

    def __post_init__(self) -> None:
        assert self.score in ROUTER_SCORES, self.score
        assert self.num_experts % self.groups == 0, "experts divide into groups"
        allowed = self.num_experts // self.groups * self.kept_groups
        assert 0 < self.top_k <= allowed <= self.num_experts, "enough experts to choose from"
        assert self.shared_size or not self.shared_gate, "a gate of what is not there"


@dataclass(frozen=True)
class LatentConfig:
    """Latent attention (https://arxiv.org/abs/2405.04434, section 2.1): keys and values are
    linear in a normed latent of `kv_rank` elements, which is what the cache holds, with one rotated
    part of `rope_dim` that the keys of all heads share. A head's query and key have `nope_dim` more
    elements, its value `value_dim`. Queries come from a normed latent of `q_rank`, or from the
    hidden state (None)."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class OwnModel:
    """What a checkpoint keeps of a definition that is not built in (model/definition.py): the file
    that it was read from, that file's digest, and the parameters that it lists, as plain values
    (params.py: ParamSpec.to_dict)."""

    file: str
    digest: str
    parameters: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Lengths in elements or tokens.

    `family` is the name of the row in families/ that read it, for people; no code branches
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
    rope: RopeConfig | None
    activation: str = "silu"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    # How positions enter, besides or instead of `rope`.
    window_rope: RopeConfig | None = None  # of layers with a sliding window, where it differs
    unrotated_layers: tuple[int, ...] = ()  # layers without rope
    learned_positions: int = 0  # rows of a table of position embeddings; 0: there is none
    alibi_slopes: tuple[float, ...] = ()  # a query head: scores fall by it a position of distance

    # Norms.
    norm: str = "rms"  # or "layer": also the mean is taken off
    norm_bias: bool = False
    embedding_norm: bool = False  # of the embedded tokens
    pre_norm: bool = True  # of what attention and MLP read
    post_norm: bool = False  # of what they give
    sum_norm: bool = False  # of the residual with what they give, which is the new residual
    final_norm: bool = True  # before the head
    # "head": one weight for all heads; "heads": each head has its own; "all": q (or k) is
    # normalised as a whole.
    qk_norm_span: str = "head"
    qk_norm_bias: bool = False

    # The block.
    parallel_block: bool = False  # attention and MLP read the same residual
    shared_norm: bool = False  # in a parallel block: one pre-norm for both
    gated_mlp: bool = True  # activation(gate) * up; otherwise activation(up)
    head_bias: bool = False
    embedding_size: int = 0  # of embedding and head, with projections between; 0: hidden_size

    # Scales and caps; a cap c turns x into c tanh(x / c).
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0  # rounded to `dtype` before it is applied
    residual_scale: float = 1.0  # of what attention and MLP add to the residual
    logit_scale: float = 1.0

    # Attention: q, k and v clamped to ±qkv_clamp; a score of each query head that takes part in
    # the softmax's sum alone; latent attention, whose num_kv_heads is 1.
    qkv_clamp: float | None = None
    attention_sinks: bool = False
    latent: LatentConfig | None = None

    moe: MoeConfig | None = None

    # A definition of the user's own, and what it alone reads: names to plain values.
    own: OwnModel | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.activation in ACTIVATIONS, self.activation
        assert self.norm in NORMS, self.norm
        assert self.qk_norm_span in QK_NORM_SPANS, self.qk_norm_span
        for rope in (self.rope, self.window_rope):
            assert rope is None or rope.scaling in ROPE_SCALINGS, rope
        assert len(self.sliding_window) == self.num_layers, "one sliding_window entry a layer"
        assert self.num_heads % self.num_kv_heads == 0, "q heads divide into groups of kv heads"
        assert len(self.alibi_slopes) in (0, self.num_heads), "one slope a query head"
        assert self.pre_norm or self.post_norm or self.sum_norm, "a branch is normed somewhere"
        assert not (self.sum_norm and (self.pre_norm or self.parallel_block)), "a norm of the sum"
        assert self.parallel_block or not self.shared_norm, "parallel blocks share a norm"
        # These two are what the decoder can express so far.
        assert not (self.norm == "layer" and self.qk_norm_span == "all"), "a whole-width LayerNorm"
        assert not (self.norm == "rms" and self.qk_norm_span == "heads"), "an RMSNorm by head"
        assert self.gated_mlp or self.moe is None, "experts are gated MLPs"
        if self.latent is not None:
            assert self.num_kv_heads == 1, "all heads share the latents"
            own = (self.qkv_bias, self.attention_output_bias, self.qk_norm, self.attention_sinks)
            assert not any(own), "latent attention has no biases, norms of q and k, or sinks"
            assert self.qkv_clamp is None and not self.alibi_slopes, "nor clamps, nor slopes"
            assert self.attention_softcap is None and not any(self.sliding_window), "nor windows"
            assert self.rope is not None and self.rope.dim == self.latent.rope_dim, "a whole part"

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer's q and k, or None."""
        if layer in self.unrotated_layers:
            return None
        if self.window_rope is not None and self.sliding_window[layer] is not None:
            return self.window_rope
        return self.rope

    def layer_moe(self, layer: int) -> MoeConfig | None:
        """The mixture of experts of a layer, or None where it has a plain MLP."""
        dense = self.moe is None or layer in self.moe.dense_layers
        return None if dense else self.moe

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises StoreError where fields are missing, unknown or bad."""
        try:
            fields = {name: _frozen(value) for name, value in values.items()}
            for name, kind in _NESTED.items():
                if fields.get(name) is not None:
                    inner = fields[name].items()
                    fields[name] = kind(**{key: _frozen(value) for key, value in inner})
            return cls(**fields)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            AssertionError,
        ) as error:
            raise StoreError(f"the manifest's model config is not valid: {error}") from error


_NESTED: dict[str, Any] = {
    "rope": RopeConfig,
    "window_rope": RopeConfig,
    "latent": LatentConfig,
    "moe": MoeConfig,
    "own": OwnModel,
}


def _plain(value: Any) -> Any:
    """The value with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
