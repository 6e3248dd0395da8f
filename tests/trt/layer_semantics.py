"""What each kind of TensorRT layer computes, in torch, by the documentation of its API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import layer_attention
import layer_numbers
import layer_places
from layer_table import LAYERS, Tensor
from network_reader import Step

MODULES = (layer_attention, layer_numbers, layer_places)  # importing them fills the table


def evaluate(step: Step, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs of a layer. AssertionError where TensorRT would refuse or misread the inputs."""
    attrs = dict(step.attrs)
    if step.kind in ("FILL", "CAST"):
        attrs["dtype"] = step.outputs[0].dtype
    result = LAYERS[step.kind](*inputs, **attrs)
    return result if isinstance(result, tuple) else (result,)
