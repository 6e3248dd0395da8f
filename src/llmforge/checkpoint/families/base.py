"""What a family's row is made of: the row itself, the config fields that families share, and the
rules for tensor names and layouts that recur."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.hf_config import Fields, read_activation, read_dtype, read_rope
from llmforge.checkpoint.mapping import Ignore, Rule
from llmforge.errors import UnsupportedModelError
from llmforge.safetensors_io import Array

Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class Family:
    """A model family.

    architectures: what config.json's `architectures` may say. model_types: what `model_type` may
    say where `architectures` is missing. rules: tensor names, given as a function where they
    depend on the config, as `ignored` may be. base_prefix: what names begin with except in saves
    of the bare decoder, without its head. ignored: tensors that are not needed. defaults: of
    config fields, where transformers' defaults differ from `_DEFAULTS`. aliases: our name of a
    field → the family's. features: what is particular about it, for docs/families.md.
    quantizations: ways of quantizing (`quant_method`) that its rules know.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[Family, Fields], ModelConfig]
    rules: Rules | Callable[[ModelConfig], Rules]
    base_prefix: str
    ignored: tuple[Ignore, ...] | Callable[[ModelConfig], tuple[Ignore, ...]] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    features: str = ""
    quantizations: tuple[str, ...] = ()

    def default(self, name: str) -> Any:
        """What transformers takes for a field that config.json leaves out."""
        return self.defaults.get(name, _DEFAULTS.get(name))

    def rules_for(self, config: ModelConfig) -> Rules:
        return self.rules(config) if callable(self.rules) else self.rules


_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "intermediate_size": None,  # required; "4x": four times hidden_size
    "hidden_act": "silu",
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": (),
}
RMS_EPS = {"norm_eps": "rms_norm_eps"}


# -- config ----------------------------------------------------------------------------------------


def read_common(family: Family, fields: Fields, **own: Any) -> ModelConfig:
    """The fields that all families here share; `own` are those that the family has read."""
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    kv_heads = own.pop("num_kv_heads", None)
    if kv_heads is None:
        kv_heads = fields.integer("num_key_value_heads", _default_kv_heads(family, fields, heads))
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = own.pop("head_dim", None) or read_head_dim(family, fields, hidden, heads)
    max_position = fields.integer(
        "max_position_embeddings", family.default("max_position_embeddings")
    )
    if "rope" not in own:
        own["rope"] = read_rope(
            fields,
            head_dim,
            max_position,
            family.default("rope_theta"),
            family.default("partial_rotary_factor"),
        )
    if "intermediate_size" not in own:
        own["intermediate_size"] = _read_intermediate(family, fields, hidden)
    if "activation" not in own:
        own["activation"] = read_activation(fields, family.default("hidden_act"))
    own.setdefault("sliding_window", (None,) * layers)
    bos = fields.token_ids("bos_token_id", (family.default("bos_token_id"),))
    return ModelConfig(
        family=family.name,
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=fields.number("norm_eps", family.default("norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings", family.default("tie_word_embeddings")),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", family.default("eos_token_id")),
        **own,
    )


def _read_intermediate(family: Family, fields: Fields, hidden: int) -> int:
    if family.default("intermediate_size") == "4x":
        return fields.integer("intermediate_size", 4 * hidden)
    return fields.integer("intermediate_size")


def _default_kv_heads(family: Family, fields: Fields, heads: int) -> int:
    """Null means as many as attention heads; an absent field, the family's default."""
    if "num_key_value_heads" in fields.data:
        return heads
    return family.default("num_key_value_heads") or heads


def read_head_dim(family: Family, fields: Fields, hidden: int, heads: int) -> int:
    if fields.has("head_dim"):
        return fields.integer("head_dim")
    default = family.default("head_dim")
    if default and "head_dim" not in fields.data:
        return int(default)
    if hidden % heads:
        raise fields.bad("hidden_size", f"a multiple of num_attention_heads ({heads})")
    return hidden // heads


def read_window(family: Family, fields: Fields) -> int | None:
    """`sliding_window`: null is "none", absent is the family's default."""
    if "sliding_window" in fields.data and not fields.has("sliding_window"):
        return None
    default = family.default("sliding_window")
    if default is None and not fields.has("sliding_window"):
        return None
    return fields.integer("sliding_window", default)


def refuse(fields: Fields, name: str, *supported: Any) -> None:
    """Raises UnsupportedModelError where the field is present and not one of `supported`."""
    if fields.has(name) and fields.data[fields.spelling(name)] not in supported:
        allowed = ", ".join(map(repr, supported)) or "to leave it out"
        raise UnsupportedModelError(
            f"{fields.path}: {fields.label(name)} = {fields.data[fields.spelling(name)]!r} is not "
            f"supported; supported: {allowed}"
        )


# -- rules -----------------------------------------------------------------------------------------


def rename(theirs: str, ours: str) -> Rule:
    return Rule((theirs,), (ours,))


def both(theirs: str, ours: str) -> Rules:
    """A linear or a norm, with its bias. Rules for what a config does not have are passed over."""
    return tuple(rename(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias"))


def plain_mlp(up: str, down: str) -> Rules:
    return (*both(up, "layers.{i}.mlp.up"), *both(down, "layers.{i}.mlp.down"))


def merged_qkv(theirs: str, convert: Callable[[list[Array], ModelConfig], list[Array]]) -> Rules:
    """One linear that gives q, k and v; `convert` takes its weight, or bias, apart."""
    return tuple(
        Rule(
            (f"{theirs}.{part}",),
            tuple(f"layers.{{i}}.attention.{x}.{part}" for x in "qkv"),
            convert,
        )
        for part in ("weight", "bias")
    )


def stacked_qkv(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """All of q, all of k, all of v."""
    q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    return np.split(arrays[0], [q, q + kv])


def grouped_qkv(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """For each kv head: the q heads that read it, its k, its v. With as many kv heads as q heads
    this is q, k, v head by head; with one, all of q, then k, then v."""
    [array] = arrays
    groups, trailing = config.num_kv_heads, array.shape[1:]
    heads = array.reshape(groups, -1, config.head_dim, *trailing)
    parts = (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])
    return [part.reshape(-1, *trailing) for part in parts]


def transposed(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """Linear weights stored as [in_features, out_features]."""
    return [array.T for array in arrays]


def plus_one(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """A norm's weight stored as its difference from one."""
    return [array.astype(np.float32) + 1 for array in arrays]


def halved(arrays: list[Array], config: ModelConfig) -> list[Array]:
    """Rows (or elements) of q or k heads whose rope turns neighbours 2i and 2i + 1, reordered so
    that it turns i and i + dim / 2. Products of q and k stay what they are, since both are
    reordered alike."""
    assert config.rope is not None
    dim, head_dim = config.rope.dim, config.head_dim
    order = [*range(0, dim, 2), *range(1, dim, 2), *range(dim, head_dim)]
    return [a.reshape(-1, head_dim, *a.shape[1:])[:, order].reshape(a.shape) for a in arrays]


def converted(theirs: str, ours: str, convert: Callable[..., list[Array]]) -> Rules:
    """`both`, changed by `convert`."""
    return tuple(
        Rule((f"{theirs}.{part}",), (f"{ours}.{part}",), convert) for part in ("weight", "bias")
    )


def gate_up(theirs: str) -> Rule:
    """One linear that gives gate, then up."""
    ours = tuple(f"layers.{{i}}.mlp.{x}.weight" for x in ("gate", "up"))
    return Rule((theirs,), ours, lambda arrays, config: np.split(arrays[0], 2))


ROTARY_AND_MASKS = (
    Ignore(r".*\.inv_freq", "rotary frequencies are computed from the config"),
    Ignore(
        r".*\.(self_attn|attn|attention)\.(bias|masked_bias)",
        "attention masks are computed",
    ),
)


# Our name of a config field → what GPT-2 and those after its manner call it.
GPT_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}
