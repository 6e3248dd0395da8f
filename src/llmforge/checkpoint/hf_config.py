"""Reading a Hugging Face config.json: typed fields, and the parts that model families share.

The file is read as transformers 4 writes it (`rope_theta` beside `rope_scaling`, `torch_dtype`)
and as transformers 5 does (`rope_parameters` with everything in it, `dtype`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmforge.checkpoint.config import DTYPES, ROPE_SCALINGS, RopeConfig
from llmforge.errors import SourceError, UnsupportedModelError

# Their names of activations that mean one of ours (transformers/activations.py, ACT2FN).
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_REQUIRED = object()
_TOO_LARGE = 1 << 27  # for a number of anything that a config counts


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises SourceError."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path} is not a JSON object")
    return data


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, each read with the type it must have.

    A field that is absent or null has the default; without a default it is an error. `inside` is
    the name of the object within the file; `aliases` other spellings of fields, which are read
    where the usual one is absent. Raises SourceError naming file, field and value.
    """

    path: Path
    data: Mapping[str, Any]
    inside: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

    def spelling(self, name: str) -> str:
        """The name under which the file has, or should have, the field."""
        alias = self.aliases.get(name, name)
        return name if name in self.data and alias not in self.data else alias

    def label(self, name: str) -> str:
        spelling = self.spelling(name)
        return f"{self.inside}.{spelling}" if self.inside else spelling

    def has(self, name: str) -> bool:
        return self.data.get(self.spelling(name)) is not None

    def bad(self, name: str, expected: str) -> SourceError:
        label = self.label(name)
        if not self.has(name):
            return SourceError(f"{self.path}: the field {label} is missing; it must be {expected}")
        value = self.data[self.spelling(name)]
        return SourceError(f"{self.path}: {label} must be {expected}, not {value!r}")

    def _get(self, name: str, default: Any, expected: str) -> Any:
        if self.has(name):
            return self.data[self.spelling(name)]
        if default is _REQUIRED:
            raise self.bad(name, expected)
        return default

    def integer(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        expected = "a positive whole number" if minimum == 1 else f"a whole number >= {minimum}"
        value = self._get(name, default, expected)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and value >= _TOO_LARGE:
            expected += f" below {_TOO_LARGE}"
        if type(value) is not int or not minimum <= value < _TOO_LARGE:
            raise self.bad(name, expected)
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._get(name, default, "a positive number")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.bad(name, "a positive number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of positive finite numbers."""
        expected = f"a list of {count} positive numbers"
        values = self._get(name, _REQUIRED, expected)
        if not isinstance(values, list) or len(values) != count:
            raise self.bad(name, expected)
        if not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
            raise self.bad(name, expected)
        return tuple(map(float, values))

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default, "true or false")
        if type(value) is not bool:
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self._get(name, default, "a string")
        if not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def table(self, name: str) -> Fields | None:
        """The object in this field, or None where there is none or an empty one."""
        value = self._get(name, {}, "an object")
        if not isinstance(value, dict):
            raise self.bad(name, "an object")
        return Fields(self.path, value, name) if value else None

    def token_ids(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One id or a list of them; negative ones, which stand for "none", are left out."""
        if name not in self.data:
            return default
        value = self.data[name]
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int for item in values):
            raise self.bad(name, "a token id or a list of token ids")
        return tuple(dict.fromkeys(item for item in values if item >= 0))


def read_activation(fields: Fields, default: str) -> str:
    name = fields.text("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.path}: the activation {name!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def read_dtype(fields: Fields) -> str:
    """The dtype that the config names; bfloat16 where it names none."""
    name = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
    if name == "float64":
        return "float32"
    if name not in DTYPES:
        raise UnsupportedModelError(
            f"{fields.path}: the dtype {name!r} is not supported; supported: {', '.join(DTYPES)}"
        )
    return name


def read_rope(
    fields: Fields, head_dim: int, max_position: int, theta: float, share: float = 1.0
) -> RopeConfig:
    """The rotary embedding; `theta` is the family's default base, `share` that part of each head
    which is rotated by default.

    Where both spellings are present `rope_scaling` wins, as in transformers
    (modeling_rope_utils.py, RotaryEmbeddingConfigMixin), from which the defaults are too.
    """
    rope = fields.table("rope_scaling") or fields.table("rope_parameters")
    rope = rope or Fields(fields.path, {}, "rope_parameters")
    if nested := [key for key, value in rope.data.items() if isinstance(value, dict)]:
        raise UnsupportedModelError(
            f"{fields.path}: rotary embeddings that differ by layer type "
            f"({', '.join(nested)}) are not supported"
        )
    return parse_rope(rope, fields, head_dim, max_position, theta, share)


def parse_rope(
    rope: Fields,
    fields: Fields,
    head_dim: int,
    max_position: int,
    theta: float,
    share: float = 1.0,
) -> RopeConfig:
    """`read_rope` for the object `rope` of the file."""
    scaling = rope.text("rope_type", rope.text("type", "default"))
    scaling = "longrope" if scaling == "su" else scaling  # its first name
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"{fields.path}: the rope type {scaling!r} is not supported; "
            f"supported: {', '.join(ROPE_SCALINGS)}"
        )
    theta = rope.number("rope_theta", fields.number("rope_theta", theta))
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", share))
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise SourceError(
            f"{fields.path}: {dim} of each head's {head_dim} elements would be rotated; "
            "it must be an even number of them"
        )
    if scaling == "default":
        return RopeConfig(theta, dim)
    original = rope.integer(
        "original_max_position_embeddings",
        fields.integer("original_max_position_embeddings", max_position),
    )
    if fields.has("original_max_position_embeddings"):  # it has precedence in transformers
        original = fields.integer("original_max_position_embeddings")
    if scaling == "linear":
        return RopeConfig(theta, dim, scaling, rope.number("factor"))
    if scaling == "dynamic":
        return RopeConfig(theta, dim, scaling, rope.number("factor"), max_position)
    if scaling == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.bad("high_freq_factor", f"more than low_freq_factor ({low:g})")
        return RopeConfig(theta, dim, scaling, rope.number("factor"), original, low, high)
    factor = rope.number("factor", max_position / original)
    if scaling == "longrope":
        stretch = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return RopeConfig(
            theta,
            dim,
            scaling,
            factor,
            original,
            attention_factor=rope.number("attention_factor", stretch),
            short_factor=rope.numbers("short_factor", dim // 2),
            long_factor=rope.numbers("long_factor", dim // 2),
        )
    return RopeConfig(
        theta,
        dim,
        scaling,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """What cos and sin are multiplied by (https://arxiv.org/abs/2309.00071, section 3.4, and
    DeepSeek's `mscale` extension of it)."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    # Zero means "not given" for both.
    if rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


def read_layer_windows(
    fields: Fields, layers: int, default_window: int, default_first_layer: int
) -> tuple[int | None, ...]:
    """Sliding windows of models where they are switched on by
    `use_sliding_window`, placed by `layer_types` or from `max_window_layers` on."""
    window = None
    if fields.flag("use_sliding_window", False) and fields.data.get("sliding_window", True):
        window = fields.integer("sliding_window", default_window)
    first = fields.integer("max_window_layers", default_first_layer, minimum=0)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return read_windows_by_type(fields, default, window)


def read_windows_by_type(
    fields: Fields, default: list[str], window: int | None
) -> tuple[int | None, ...]:
    """The window of each layer: `window` where `layer_types`, or else `default`, says
    "sliding_attention"."""
    types = fields.data["layer_types"] if fields.has("layer_types") else default
    if not isinstance(types, list) or len(types) != len(default):
        raise fields.bad("layer_types", f"a list of {len(default)} names, one a layer")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"{fields.path}: the layer type {name!r} is not supported; "
                "supported: full_attention, sliding_attention"
            )
    return tuple(window if name == "sliding_attention" else None for name in types)
