"""`Lowering`: what the rows of the table need while one network is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.step import Limits
from llmforge.engine.target import Weights
from llmforge.engine.tensorrt.io import STEP_SHAPES, weight_input
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.engine.tensorrt.plan import CachePlan
from llmforge.model.graph import Graph, Node, Parameter, Tensor


@dataclass(frozen=True)
class Rotation:
    """A lowered rope_table: cosines and sines of each token, [B, S, dim / 2], or for primitives
    [B, S, dim] with the sines of the first half negative; float32."""

    cos: Value
    sin: Value
    dim: int


@dataclass(frozen=True)
class WeightUse:
    """How a network wants a parameter: see `Lowering.vector`."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str | None = None
    order: tuple[int, ...] | None = None

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The parameter's values so. Copied only where they have to be."""
        if self.order is not None:
            array = array.transpose(self.order)
        if self.dtype is not None:
            array = array.astype(self.dtype)
        return np.ascontiguousarray(array).reshape(self.shape)


@dataclass
class Lowering:
    """One network being written from (a segment of) the prepared graph of a rank.

    graph: the whole rank's, or what concerns the network. native_cache: whether caches are updated
    in place. values: what each tensor of the graph has become. caches: those that the network has,
    in order. uses: of the weights that are its inputs, in order; None: weights are constants.
    """

    net: Network
    graph: Graph
    limits: Limits
    weights: Weights
    native_cache: bool
    values: dict[str, Value | Rotation] = field(default_factory=dict)
    caches: list[CachePlan] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    uses: list[WeightUse] | None = None
    node: Node | None = None
    made: dict[Any, Value] = field(default_factory=dict)  # what several nodes share, by key

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """What `make` gave the first time that it was asked for by this key."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def capacity(self) -> int:
        """Positions of a slot."""
        return self.limits.block_size

    def step_input(self, name: str) -> Value:
        """An input of the step (io.py), int32."""
        if name not in self.values:
            self.inputs.append(name)
            self.values[name] = self.net.input(name, "int32", STEP_SHAPES[name])
        value = self.values[name]
        assert isinstance(value, Value)
        return value

    def weight(self, parameter: Tensor) -> Value:
        """A parameter as [1, *shape], which is there once however often it is used."""
        return self.vector(parameter, (1, *map(int, parameter.shape)))

    def vector(
        self,
        parameter: Tensor,
        shape: tuple[int, ...],
        dtype: str | None = None,
        order: tuple[int, ...] | None = None,
    ) -> Value:
        """A parameter with its dimensions in this order (where it is not its own), of this shape,
        and in this dtype (likewise)."""
        assert isinstance(parameter, Parameter)
        use = WeightUse(parameter.name, shape, dtype, order)

        def made() -> Value:
            if self.uses is None:
                return self.net.constant(use.of(self.weights.map(parameter)))
            name = weight_input(len(self.uses))
            self.uses.append(use)
            return self.net.input(name, dtype or parameter.dtype, shape)

        return self.once(use, made)

    def integers(self, *numbers: int, shape: tuple[int, ...] | None = None) -> Value:
        """A constant of int32 numbers."""

        def constant() -> Value:
            array = np.array(numbers, np.int32)
            return self.net.constant(array if shape is None else array.reshape(shape))

        return self.once((numbers, shape), constant)

    def floats(self, numbers: Any, shape: tuple[int, ...]) -> Value:
        """A constant of float32 numbers."""
        return self.net.constant(np.ascontiguousarray(numbers, np.float32).reshape(shape))

    def cache(self, state: Tensor) -> tuple[Value, str]:
        """The cache of a state [blocks, block_size, heads, size] as an input
        [B, heads, capacity, size], and the name of the output that goes with it."""
        heads, size = int(state.shape[2]), int(state.shape[3])
        _, layer, kind = state.name.split(".")
        name = f"{kind}.{layer}"
        output = f"{name}.out" if self.native_cache else f"{name}.new"
        self.caches.append(CachePlan(name, output, heads, size, state.dtype))
        shape = ("B", heads, self.capacity, size)
        return self.net.input(name, state.dtype, shape), output

    def features(self, x: Value) -> int:
        """The size of the last dimension."""
        return int(x.tensor.shape[-1])
