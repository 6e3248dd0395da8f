"""`Network`: adding layers to a TensorRT network, each checked as it is added.

The few layers that the lowering is made of, the same for all packages. Values know their dtype:
where the package's networks are not strongly typed, each computing layer is constrained to it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.tensorrt.package import Package
from llmforge.errors import BuildError
from llmforge.model.graph import Shape

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Value:
    """A tensor of the network and its dtype."""

    tensor: Any
    dtype: str

    @property
    def rank(self) -> int:
        return len(self.tensor.shape)


class Network:
    """One network being written. Arrays that become constants are held until it is built."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.builder, self.network = package.create_network()
        self.label = ""  # what layers are named after: the graph's node being lowered
        self.shapes: dict[str, Shape] = {}  # of the inputs
        self._held: list[NDArray[Any]] = []
        self._count = 0
        self._precise = not package.features.strongly_typed

    # -- edges -----------------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Shape) -> Value:
        """An input; named dimensions may vary."""
        dims = tuple(-1 if isinstance(d, str) else d for d in shape)
        tensor = self.network.add_input(name, self.package.dtype(dtype), dims)
        if tensor is None:
            raise self._failed("input", name)
        self.shapes[name] = shape
        return Value(tensor, dtype)

    def output(self, name: str, value: Value) -> None:
        # A tensor that is an input, or an output already, needs another name: a copy of it.
        if value.tensor.is_network_input or value.tensor.is_network_output:
            value = self._one(self.network.add_identity(value.tensor), value.dtype, True)
        value.tensor.name = name
        self.network.mark_output(value.tensor)
        if self._precise:
            value.tensor.dtype = self.package.dtype(value.dtype)

    def constant(self, array: NDArray[Any]) -> Value:
        """A constant with the array's shape; the array is not copied."""
        assert array.flags.c_contiguous
        self._held.append(array)
        layer = self.network.add_constant(array.shape, self.package.weights(array))
        return self._one(layer, str(array.dtype))

    def scalar(self, number: float, like: Value) -> Value:
        """A constant of one element that broadcasts against a value."""
        import ml_dtypes

        dtype = ml_dtypes.bfloat16 if like.dtype == "bfloat16" else np.dtype(like.dtype)
        return self._scalar(float(number), like.rank, np.dtype(dtype))

    @functools.cache  # noqa: B019 (a network does not outlive its build)
    def _scalar(self, number: float, rank: int, dtype: np.dtype[Any]) -> Value:
        return self.constant(np.full((1,) * rank, number, dtype))

    # -- elementwise -----------------------------------------------------------------------------

    def cast(self, x: Value, dtype: str) -> Value:
        if x.dtype == dtype:
            return x
        layer = self.network.add_cast(x.tensor, self.package.dtype(dtype))
        return self._one(layer, dtype)

    def elementwise(self, op: str, x: Value, y: Value | float) -> Value:
        """x op y: SUM, SUB, PROD, DIV, MAX, MIN, and GREATER, LESS, EQUAL, AND, OR, which give
        bool."""
        if not isinstance(y, Value):
            y = self.scalar(y, x)
        assert x.dtype == y.dtype, (op, x.dtype, y.dtype)
        assert x.rank == y.rank, (op, x.tensor.shape, y.tensor.shape)
        operation = getattr(self.package.trt.ElementWiseOperation, op)
        layer = self.network.add_elementwise(x.tensor, y.tensor, operation)
        logical = op in ("GREATER", "LESS", "EQUAL", "AND", "OR")
        return self._one(layer, "bool" if logical else x.dtype, not logical)

    def add(self, x: Value, y: Value | float) -> Value:
        return self.elementwise("SUM", x, y)

    def sub(self, x: Value, y: Value | float) -> Value:
        return self.elementwise("SUB", x, y)

    def mul(self, x: Value, y: Value | float) -> Value:
        return self.elementwise("PROD", x, y)

    def div(self, x: Value, y: Value | float) -> Value:
        return self.elementwise("DIV", x, y)

    def unary(self, op: str, x: Value) -> Value:
        """SQRT, RECIP, EXP, COS, SIN, ERF, NOT of each element."""
        layer = self.network.add_unary(x.tensor, getattr(self.package.trt.UnaryOperation, op))
        return self._one(layer, x.dtype, True)

    def activation(self, op: str, x: Value) -> Value:
        """RELU, SIGMOID or TANH of each element."""
        layer = self.network.add_activation(x.tensor, getattr(self.package.trt.ActivationType, op))
        return self._one(layer, x.dtype, True)

    def select(self, condition: Value, x: Value, y: Value) -> Value:
        """x where the condition holds, else y."""
        assert condition.dtype == "bool" and x.dtype == y.dtype
        layer = self.network.add_select(condition.tensor, x.tensor, y.tensor)
        return self._one(layer, x.dtype, True)

    # -- across elements -------------------------------------------------------------------------

    def reduce(self, op: str, x: Value, axis: int) -> Value:
        """SUM, AVG or MAX along an axis, which stays with one element."""
        layer = self.network.add_reduce(
            x.tensor,
            getattr(self.package.trt.ReduceOperation, op),
            axes=1 << (axis % x.rank),
            keep_dims=True,
        )
        return self._one(layer, x.dtype, True)

    def matmul(self, x: Value, y: Value, *, transpose: bool = False) -> Value:
        """The product over the last two dimensions; with `transpose`, y's are exchanged first."""
        assert x.dtype == y.dtype and x.rank == y.rank, (x.tensor.shape, y.tensor.shape)
        operations = self.package.trt.MatrixOperation
        layer = self.network.add_matrix_multiply(
            x.tensor,
            operations.NONE,
            y.tensor,
            operations.TRANSPOSE if transpose else operations.NONE,
        )
        return self._one(layer, x.dtype, True)

    def top_k(self, x: Value, k: int) -> tuple[Value, Value]:
        """The k largest along the last axis, largest first, and their indices."""
        operation = self.package.trt.TopKOperation.MAX
        layer = self.network.add_topk(x.tensor, operation, k, 1 << (x.rank - 1))
        values = self._one(layer, x.dtype)
        return values, Value(layer.get_output(1), "int32")

    # -- shapes ----------------------------------------------------------------------------------

    def reshape(
        self,
        x: Value,
        shape: Sequence[int],
        *,
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Value:
        """The elements in another shape: 0 stands for x's dimension at the same place, one -1 for
        what is left. `before` and `after` permute dimensions."""
        layer = self.network.add_shuffle(x.tensor)
        if layer is None:
            raise self._failed("shuffle", self.label)
        if before is not None:
            layer.first_transpose = self.package.trt.Permutation(tuple(before))
        layer.reshape_dims = tuple(shape)
        if after is not None:
            layer.second_transpose = self.package.trt.Permutation(tuple(after))
        return self._one(layer, x.dtype)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        layer = self.network.add_shuffle(x.tensor)
        if layer is None:
            raise self._failed("shuffle", self.label)
        layer.first_transpose = self.package.trt.Permutation(tuple(order))
        return self._one(layer, x.dtype)

    def gather(self, x: Value, indices: Value, axis: int) -> Value:
        """x at `indices` of an axis, whose place the dimensions of `indices` take."""
        layer = self.network.add_gather(x.tensor, indices.tensor, axis % x.rank)
        return self._one(layer, x.dtype)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        layer = self.network.add_concatenation([value.tensor for value in values])
        if layer is not None:
            layer.axis = axis % values[0].rank
        return self._one(layer, values[0].dtype)

    # -- native layers ---------------------------------------------------------------------------

    def update_cache(self, cache: Value, new: Value, first: Value) -> Value:
        """The cache [B, heads, capacity, size] with `new` [B, heads, S, size] from position
        `first` [B] on, in the same memory."""
        mode = self.package.trt.KVCacheMode.LINEAR
        layer = self.network.add_kv_cache_update(cache.tensor, new.tensor, first.tensor, mode)
        return self._one(layer, cache.dtype)

    def attention(self, q: Value, keys: Value, values: Value, mask: Value) -> Value:
        """softmax(q keysᵀ) values, [B, heads, S, size], of the keys where mask [B, 1, S, keys]
        holds. The layer has no scale."""
        trt, net = self.package.trt, self.network
        operation = trt.AttentionNormalizationOp.SOFTMAX
        tensors = (q.tensor, keys.tensor, values.tensor)
        if hasattr(net, "add_attention_v2"):
            layer = net.add_attention_v2(*tensors, operation, trt.CausalMaskKind.NONE)
        else:
            layer = net.add_attention(*tensors, operation, False)
        if layer is None:
            raise self._failed("attention", self.label)
        layer.mask = mask.tensor
        # A fused kernel is taken where there is one for the head size and dtype.
        layer.decomposable = True
        self._name(layer)
        return Value(self._checked(layer.get_output(0)), q.dtype)

    def rotary(self, x: Value, cos: Value, sin: Value, dim: int) -> Value:
        """x [B, heads, S, size] with its first `dim` elements rotated, i with i + dim / 2, by
        angles whose cosines and sines are [B, S, dim / 2]."""
        size = x.tensor.shape[3]
        layer = self.network.add_rotary_embedding(
            x.tensor, cos.tensor, sin.tensor, False, 0 if dim == size else dim
        )
        return self._one(layer, x.dtype)

    def collective(self, x: Value, op: str, reduce: str, ranks: int, metadata: str) -> Value:
        """ALL_REDUCE or ALL_GATHER (along the first dimension) among `ranks` ranks. Its operation
        cannot be read back from the layer: `metadata` says it."""
        trt = self.package.trt
        layer = self.network.add_dist_collective(
            x.tensor,
            getattr(trt.CollectiveOperation, op),
            getattr(trt.ReduceOperation, reduce),
            -1,
            [],
        )
        if layer is not None:
            layer.num_ranks = ranks  # before the output's shape is asked for
            layer.metadata = metadata
        return self._one(layer, x.dtype)

    # --------------------------------------------------------------------------------------------

    def _one(self, layer: Any, dtype: str, computes: bool = False) -> Value:
        """The first output of a layer. computes: it rounds, so its precision matters."""
        if layer is None:
            raise self._failed("layer", self.label)
        self._name(layer)
        if self._precise and dtype in FLOATS:
            kind = self.package.dtype(dtype)
            if computes:
                layer.precision = kind
            layer.set_output_type(0, kind)
        return Value(self._checked(layer.get_output(0)), dtype)

    def _name(self, layer: Any) -> None:
        self._count += 1
        layer.name = f"{self.label} #{self._count}"

    def _checked(self, tensor: Any) -> Any:
        try:
            len(tensor.shape)
        except (AttributeError, RuntimeError, ValueError) as error:  # none, or without a shape
            raise self._failed("output", self.label) from error
        return tensor

    def _failed(self, what: str, name: str) -> BuildError:
        return BuildError(self.package.messages.reason(f"the {what} of {name!r} cannot be built"))
