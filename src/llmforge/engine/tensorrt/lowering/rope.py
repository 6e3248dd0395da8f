"""Rows of rotary embeddings. Tables are computed here, in float64 of the float32 angles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.config import RopeConfig
from llmforge.engine.tensorrt.io import POSITIONS, PROMPT_LENS
from llmforge.engine.tensorrt.lowering.basic import merge_heads, run
from llmforge.engine.tensorrt.lowering.context import Lowering, Rotation
from llmforge.engine.tensorrt.lowering.table import lowers, lowers_natively
from llmforge.engine.tensorrt.network import Value

Table = NDArray[np.float32]


@lowers("rope_table")
def rope_table(g: Lowering, *step: None, rope: Mapping[str, Any]) -> Rotation:
    return _rotation(g, rope, doubled=True)


@lowers_natively("rope_table", "rotary")
def native_rope_table(g: Lowering, *step: None, rope: Mapping[str, Any]) -> Rotation:
    return _rotation(g, rope, doubled=False)


def _rotation(g: Lowering, fields: Mapping[str, Any], *, doubled: bool) -> Rotation:
    """Rows of a constant table, chosen by position; of two tables, one behind the other, where
    the prompt's length chooses. With dynamic scaling every length has frequencies of its own:
    there the angles are computed in the network."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    config = RopeConfig(**plain)
    net, positions = g.net, g.step_input(POSITIONS)
    if config.scaling == "dynamic":
        return _computed(g, config, doubled=doubled)
    if config.by_length:
        trained = config.original_max_position
        beyond = net.elementwise("GREATER", _lengths(g), g.integers(trained, shape=(1, 1)))
        offset = net.mul(net.cast(beyond, "int32"), g.capacity)
        index = net.add(positions, offset)
        frequencies = [config.frequencies(trained), config.frequencies(trained + 1)]
    else:
        index, frequencies = positions, [config.frequencies()]
    cos, sin = tables(frequencies, g.capacity, config.attention_factor, doubled=doubled)
    return Rotation(
        net.gather(net.constant(cos), index, axis=0),
        net.gather(net.constant(sin), index, axis=0),
        config.dim,
    )


def tables(
    frequencies: list[list[float]], capacity: int, factor: float, *, doubled: bool
) -> tuple[Table, Table]:
    """Cosines and sines of positions up to `capacity`, for each list of frequencies, one table
    behind the other. doubled: for both halves of what is rotated, the first sines negated."""
    positions = np.arange(capacity, dtype=np.float32)[:, None]
    angles = np.concatenate([positions * np.asarray(f, np.float32)[None] for f in frequencies])
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    if doubled:
        cos, sin = np.concatenate((cos, cos), 1), np.concatenate((-sin, sin), 1)
    return (cos * factor).astype(np.float32), (sin * factor).astype(np.float32)


def _lengths(g: Lowering) -> Value:
    """[B, S]: the longer of the prompt and the tokens up to each."""
    prompts = g.net.reshape(g.step_input(PROMPT_LENS), (0, 1))
    return g.net.elementwise("MAX", g.net.add(g.step_input(POSITIONS), 1), prompts)


def _computed(g: Lowering, config: RopeConfig, *, doubled: bool) -> Rotation:
    net = g.net
    frequencies = np.array(
        [config.frequencies(length) for length in range(g.capacity + 1)], np.float32
    )
    if doubled:
        frequencies = np.concatenate((frequencies, frequencies), 1)
    chosen = net.gather(net.constant(frequencies), _lengths(g), axis=0)
    positions = net.cast(net.reshape(g.step_input(POSITIONS), (0, 0, 1)), "float32")
    angles = net.mul(chosen, positions)
    cos = net.mul(net.unary("COS", angles), config.attention_factor)
    sin = net.unary("SIN", angles)
    half = config.dim // 2
    signs = [-config.attention_factor] * half if doubled else []
    signs += [config.attention_factor] * half
    return Rotation(cos, net.mul(sin, g.floats(signs, (1, 1, len(signs)))), config.dim)


@lowers("rope")
def rope(g: Lowering, x: Value, table: Rotation, *, head_dim: int) -> Value:
    """x cos + (x with its halves exchanged) sin: the halves are exchanged by one gather."""
    net, features, dim = g.net, g.features(x), table.dim
    heads = net.cast(net.reshape(x, (0, 0, features // head_dim, head_dim)), "float32")
    cos, sin = (net.reshape(t, (0, 0, 1, dim)) for t in (table.cos, table.sin))
    rotated = run(g, heads, 0, dim)
    exchanged = net.gather(rotated, g.integers(*range(dim // 2, dim), *range(dim // 2)), axis=-1)
    result = net.add(net.mul(rotated, cos), net.mul(exchanged, sin))
    if dim < head_dim:
        result = net.concat((result, run(g, heads, dim, head_dim - dim)), axis=-1)
    return net.reshape(net.cast(result, x.dtype), (0, 0, features))


@lowers_natively("rope", "rotary")
def native_rope(g: Lowering, x: Value, table: Rotation, *, head_dim: int) -> Value:
    """On float32 values: the layer wants tables of x's dtype, and angles need more than 16 bits."""
    net, features = g.net, g.features(x)
    heads = net.reshape(x, (0, 0, features // head_dim, head_dim), after=(0, 2, 1, 3))
    rotated = net.rotary(net.cast(heads, "float32"), table.cos, table.sin, table.dim)
    return merge_heads(net, net.cast(rotated, x.dtype), features)
