"""Reads a finished TensorRT network back, layer by layer, into a plain program.

What the bindings do not give back (a collective's operation) is taken from the layer's metadata.
Constants of bfloat16 come as a bare pointer; their bytes are copied while the network is alive.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
    "UINT8": torch.uint8,
}


class Unreadable(Exception):
    """The network holds something that this reader or the interpreter does not know."""


@dataclass(frozen=True)
class Value:
    """A tensor of the network as it is declared; -1 is a dimension that varies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One layer. `inputs` are tensor names, "" where an optional input is absent."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A network: its layers, each after those that it reads."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: tuple[Step, ...]

    @property
    def aliases(self) -> dict[str, str]:
        """The input whose memory each updated cache shares, by output name."""
        return {s.outputs[0].name: s.inputs[0] for s in self.steps if s.kind == "KV_CACHE_UPDATE"}

    @property
    def collectives(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.kind == "DIST_COLLECTIVE")


def read(network: Any, trt: Any) -> Program:
    """The program of a network of the package `trt`."""
    inputs = tuple(_value(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_value(network.get_output(i)) for i in range(network.num_outputs))
    steps = [_step(network.get_layer(i), trt) for i in range(network.num_layers)]
    return Program(inputs, outputs, _in_order(steps, {value.name for value in inputs}))


def _in_order(steps: list[Step], known: set[str]) -> tuple[Step, ...]:
    """Layers stand as they were added, which need not be before those that read them."""
    known = {"", *known}
    ordered: list[Step] = []
    while steps:
        waiting = []
        for step in steps:
            if known.issuperset(step.inputs):
                ordered.append(step)
                names = [value.name for value in step.outputs]
                if again := known.intersection(names):
                    raise Unreadable(f"{again} are computed twice")
                known.update(names)
            else:
                waiting.append(step)
        if len(waiting) == len(steps):
            raise Unreadable(f"{waiting[0].name} reads what nothing computes")
        steps = waiting
    return tuple(ordered)


def _value(tensor: Any) -> Value:
    if tensor.dtype.name not in DTYPES:
        raise Unreadable(f"{tensor.name} is {tensor.dtype.name}")
    return Value(tensor.name, tuple(tensor.shape), DTYPES[tensor.dtype.name])


def _step(layer: Any, trt: Any) -> Step:
    kind = layer.type.name  # before the cast: an activation's `type` is another thing after it
    if kind not in _ATTRIBUTES:
        raise Unreadable(f"layer {layer.name} is of the kind {kind}")
    given = [layer.get_input(i) for i in range(layer.num_inputs)]
    outputs = tuple(_value(layer.get_output(i)) for i in range(layer.num_outputs))
    names = tuple("" if tensor is None else tensor.name for tensor in given)
    cls, attributes = _ATTRIBUTES[kind]
    layer.__class__ = getattr(trt, cls)
    return Step(kind, layer.name, names, outputs, attributes(layer, names))


Attributes = Callable[[Any, tuple[str, ...]], dict[str, Any]]


def _plain(value: Any) -> Any:
    """A binding's value as something that can be pickled and compared."""
    if hasattr(value, "name") and hasattr(type(value), "__members__"):
        return DTYPES.get(value.name, value.name) if "Type." in str(value) else value.name
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return tuple(value)


def _named(*names: str) -> Attributes:
    return lambda layer, _: {name: _plain(getattr(layer, name)) for name in names}


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(8) if mask >> axis & 1)


def _axes(*names: str) -> Attributes:
    rest = _named(*names)
    return lambda layer, inputs: {"axes": _bits(layer.axes), **rest(layer, inputs)}


def _shuffle(layer: Any, inputs: tuple[str, ...]) -> dict[str, Any]:
    dynamic = len(inputs) > 1 and inputs[1]
    return {
        "first": tuple(layer.first_transpose),
        "reshape": None if dynamic else _plain(layer.reshape_dims),
        "second": tuple(layer.second_transpose),
        "zero_copies": layer.zero_is_placeholder,
    }


def _slice(layer: Any, inputs: tuple[str, ...]) -> dict[str, Any]:
    def static(index: int, name: str) -> Any:
        given = len(inputs) > index and inputs[index]
        return None if given else tuple(getattr(layer, name))

    return {
        "start": static(1, "start"),
        "shape": static(2, "shape"),
        "stride": static(3, "stride"),
        "mode": layer.mode.name,
    }


def _fill(layer: Any, inputs: tuple[str, ...]) -> dict[str, Any]:
    given = any(inputs[1:])
    return {
        "operation": layer.operation.name,
        "shape": None if inputs and inputs[0] else tuple(layer.shape),
        "alpha": None if given else layer.alpha,
        "beta": None if given else layer.beta,
    }


def _attention(layer: Any, _: tuple[str, ...]) -> dict[str, Any]:
    attention = layer.attention
    return {
        "causal": attention.causal_kind.name,
        "norm": attention.norm_op.name,
        "num_ranks": attention.num_ranks,
        "forms": (attention.query_form.name, attention.key_value_form.name),
    }


def _collective(layer: Any, _: tuple[str, ...]) -> dict[str, Any]:
    if not layer.metadata:
        raise Unreadable(f"the collective {layer.name} has no metadata that says what it does")
    return {**json.loads(layer.metadata), "num_ranks": layer.num_ranks}


def _constant(layer: Any, _: tuple[str, ...]) -> dict[str, Any]:
    weights, shape = layer.weights, tuple(layer.shape)
    if isinstance(weights, np.ndarray):
        return {"value": torch.from_numpy(weights.copy()).view(shape)}
    dtype = DTYPES[weights.dtype.name]
    return {"value": _copied(weights, dtype).view(shape)}


def _copied(weights: Any, dtype: torch.dtype) -> torch.Tensor:
    """The values of a `Weights` object, whose C++ struct {type, values, count} stands behind the
    object's header: the bindings give no other way to numbers that numpy has not."""
    struct = ctypes.c_void_p.from_address(id(weights) + 16).value
    assert struct is not None
    values = ctypes.c_void_p.from_address(struct + 8).value
    count = ctypes.c_int64.from_address(struct + 16).value
    assert values and count == weights.size, "not the layout of Weights"
    raw = ctypes.string_at(values, count * dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


_ATTRIBUTES: dict[str, tuple[str, Attributes]] = {
    "ACTIVATION": ("IActivationLayer", _named("type", "alpha", "beta")),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _named()),
    "CAST": ("ICastLayer", _named("to_type")),
    "CONCATENATION": ("IConcatenationLayer", _named("axis")),
    "CONSTANT": ("IConstantLayer", _constant),
    "CUMULATIVE": ("ICumulativeLayer", _named("op", "exclusive", "reverse")),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _collective),
    "EINSUM": ("IEinsumLayer", _named("equation")),
    "ELEMENTWISE": ("IElementWiseLayer", _named("op")),
    "FILL": ("IFillLayer", _fill),
    "GATHER": ("IGatherLayer", _named("axis", "mode", "num_elementwise_dims")),
    "IDENTITY": ("IIdentityLayer", _named()),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _named("cache_mode", "update_form")),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _named("op0", "op1")),
    "NORMALIZATION": ("INormalizationLayer", _axes("epsilon", "num_groups")),
    "ONE_HOT": ("IOneHotLayer", _named("axis")),
    "REDUCE": ("IReduceLayer", _axes("op", "keep_dims")),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _named("interleaved", "rotary_embedding_dim")),
    "SCATTER": ("IScatterLayer", _named("axis", "mode")),
    "SELECT": ("ISelectLayer", _named()),
    "SHAPE": ("IShapeLayer", _named()),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", _axes()),
    "SQUEEZE": ("ISqueezeLayer", _named()),
    "TOPK": ("ITopKLayer", _axes("op", "k")),
    "UNARY": ("IUnaryLayer", _named("op")),
    "UNSQUEEZE": ("IUnsqueezeLayer", _named()),
}
