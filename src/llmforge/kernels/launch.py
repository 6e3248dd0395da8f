"""Launches described: which kernel, on what, with which grid. One typed function a kernel, which
checks shapes and dtypes and chooses the specialisation.

A description holds names of buffers and of sizes, no addresses: it is made at build time, on a
machine without a GPU, to know which kernels to compile, and again at load time, where `driver`
binds it to memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmforge.kernels.compile import KernelSpec

Dim = int | str
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Operand:
    """A matrix, or a list where `row` is 1, in a named buffer.

    shape: its dimensions, symbolic ones by name. row_stride: elements from one row of the first
    dimension to the next. offset: elements from the buffer's start.
    """

    buffer: str
    shape: tuple[Dim, ...]
    dtype: str
    row_stride: int
    offset: int = 0

    @property
    def features(self) -> int:
        """The size of the last dimension, which is a number."""
        size = self.shape[-1]
        assert isinstance(size, int), self
        return size

    @property
    def contiguous(self) -> bool:
        return len(self.shape) < 2 or self.row_stride == self.features

    def columns(self, start: int, stop: int) -> Operand:
        """A part of every row."""
        shape = (*self.shape[:-1], stop - start)
        return replace(self, shape=shape, offset=self.offset + start)


@dataclass(frozen=True)
class Size:
    """A symbolic size, as a kernel argument or in a grid: ``ceil(name * times / per)``, at most
    `most`."""

    name: str
    times: int = 1
    per: int = 1
    most: int = 2**31 - 1


@dataclass(frozen=True)
class Float:
    """A float32 argument."""

    value: float


@dataclass(frozen=True)
class Double:
    """A float64 argument."""

    value: float


@dataclass(frozen=True)
class TensorMap:
    """A description of a matrix for the tensor copy engine: [rows, columns] seen as [columns / 64,
    halves, rows / halves, 64], copied in boxes of `box`, in rows of 128 bytes, swizzled. What of a
    box lies beyond the matrix is copied as zeros.

    most_rows: how many there is memory for, where the number of rows is symbolic: a kernel may be
    given more rows than it was asked for."""

    matrix: Operand
    halves: int
    box: tuple[int, int, int, int]  # elements in the order of the dimensions
    most_rows: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Elements of each dimension, the innermost first."""
        rows = self.matrix.shape[0] if self.most_rows is None else self.most_rows
        assert isinstance(rows, int)
        return 64, rows // self.halves, self.halves, self.matrix.features // 64

    @property
    def strides(self) -> tuple[int, int, int]:
        """Bytes between neighbours, of the dimensions from the second on."""
        row = self.matrix.features * DTYPE_BYTES[self.matrix.dtype]
        return row, self.sizes[1] * row, 64 * DTYPE_BYTES[self.matrix.dtype]


@dataclass(frozen=True)
class HeadsMap:
    """The same of a matrix [rows, heads * head_dim], seen as [1, rows, heads, head_dim] and copied
    in boxes of 64 elements of some heads of some rows. `rows`: how many there is memory for."""

    matrix: Operand
    heads: int
    head_dim: int
    rows: int
    box_heads: int
    box_rows: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Elements in the order of the dimensions."""
        return 1, self.box_rows, self.box_heads, 64

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Elements of each dimension, the innermost first."""
        return self.head_dim, self.heads, self.rows, 1

    @property
    def strides(self) -> tuple[int, int, int]:
        """Bytes between neighbours, of the dimensions from the second on."""
        head = self.head_dim * DTYPE_BYTES[self.matrix.dtype]
        return head, self.heads * head, self.rows * self.heads * head


AnyMap = TensorMap | HeadsMap
Argument = Operand | TensorMap | HeadsMap | Size | Float | Double | int | None
Extent = int | Size


@dataclass(frozen=True)
class Launch:
    """A kernel on its operands. None is a null pointer; int is int32."""

    kernel: KernelSpec
    arguments: tuple[Argument, ...]
    grid: tuple[Extent, Extent, Extent]
    block: int
    shared_bytes: int = 0


def specialised(source: str, entry: str, dtype: str, **defines: int | str) -> KernelSpec:
    macros = {f"DTYPE_{dtype.upper()}": 1, **defines}
    return KernelSpec(source, entry, tuple(sorted(macros.items())))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def same_dtype(*operands: Operand | None) -> str:
    dtypes = {o.dtype for o in operands if o is not None}
    require(len(dtypes) == 1, f"operands of several dtypes: {sorted(dtypes)}")
    return dtypes.pop()


def load_width(*operands: Operand, run: int) -> int:
    """Elements that one load may take: 16 bytes where every row, and every run of a row, starts
    at a multiple of that, else one."""
    width = 16 // DTYPE_BYTES[operands[0].dtype]
    numbers = [run]
    for operand in operands:
        numbers += [operand.offset, operand.row_stride if len(operand.shape) > 1 else 0]
    return width if all(number % width == 0 for number in numbers) else 1


def block_threads(packs: int, most: int) -> int:
    return min(most, -(-packs // 32) * 32)


def gather(
    out: Operand, table: Operand, ids: Operand, *, first: int = 0, drawn: Operand | None = None
) -> Launch:
    """out[i] = table[ids[i] - first]; zeros where the table has no such row. With `drawn`, an id
    below zero, ~j, stands for the id drawn[j]."""
    dtype = same_dtype(out, table)
    hidden = table.features
    require(out.features == hidden and ids.dtype == "int32", "gather: out and table differ")
    require(out.contiguous and table.contiguous, "gather: rows must be contiguous")
    width = load_width(out, table, run=hidden)
    threads = block_threads(hidden // width, 256)
    spec = specialised(
        "gather.cu", "gather", dtype,
        HIDDEN=hidden, WIDTH=width, THREADS=threads, DRAWN=int(drawn is not None),
    )  # fmt: skip
    rows = ids.shape[0]
    # The number of rows is symbolic where the table is an activation; its ids are then in range.
    table_rows = table.shape[0] if isinstance(table.shape[0], int) else 2**31 - 1
    arguments = (out, table, ids, drawn, table_rows, first)
    return Launch(spec, arguments, (extent(rows), 1, 1), threads)


def extent(dim: Dim) -> Extent:
    return dim if isinstance(dim, int) else Size(dim)


def rms_norm(
    out: Operand,
    x: Operand,
    weight: Operand,
    *,
    eps: float,
    residual: Operand | None = None,
    out_sum: Operand | None = None,
) -> Launch:
    """out = norm(x) weight over runs as long as `weight`; with `residual`, of out_sum = x +
    residual."""
    dtype = same_dtype(out, x, weight, residual, out_sum)
    run = weight.features
    require(x.features % run == 0, f"rms_norm: {x.features} features, runs of {run}")
    require((residual is None) == (out_sum is None), "rms_norm: residual and its sum go together")
    matrices = [o for o in (out, x, residual, out_sum) if o is not None]
    require(all(m.shape == x.shape for m in matrices), "rms_norm: shapes differ")
    width = load_width(*matrices, weight, run=run)
    threads = block_threads(run // width, 1024)
    defines = {"RUN": run, "WIDTH": width, "THREADS": threads, "ADD": int(residual is not None)}
    strides = [o.row_stride if o is not None else 0 for o in (out, out_sum, x, residual)]
    return Launch(
        specialised("norm.cu", "rms_norm", dtype, **defines),
        (out, out_sum, x, residual, weight, *strides, Float(eps)),
        (extent(x.shape[0]), x.features // run, 1),
        threads,
    )


def layer_norm(
    out: Operand, x: Operand, weight: Operand, bias: Operand | None, *, eps: float, run: int
) -> Launch:
    """out = (x - mean) / deviation weight + bias over runs; weight and bias are as long as a run or
    as all features."""
    dtype = same_dtype(out, x, weight, bias)
    require(out.shape == x.shape and x.features % run == 0, "layer_norm: whole runs of x")
    require(weight.features in (run, x.features), "layer_norm: weight")
    threads = block_threads(run, 1024)
    shared = int(weight.features == run)
    spec = specialised(
        "layer_norm.cu", "layer_norm", dtype,
        RUN=run, THREADS=threads, BIAS=int(bias is not None), SHARED=shared,
    )  # fmt: skip
    arguments = (out, x, weight, bias, out.row_stride, x.row_stride, Float(eps))
    return Launch(spec, arguments, (extent(x.shape[0]), x.features // run, 1), threads)


def add(out: Operand, x: Operand, y: Operand) -> Launch:
    """out = x + y; y may be one row for all."""
    return _elementwise(out, x, y, {"OP_ADD": 1})


def gated_activation(out: Operand, gate: Operand, up: Operand, *, activation: str) -> Launch:
    """out = activation(gate) up."""
    return _elementwise(out, gate, up, {"OP_GATED": 1, f"ACTIVATION_{activation.upper()}": 1})


def activation(out: Operand, x: Operand, *, activation: str) -> Launch:
    """out = activation(x)."""
    return _elementwise(out, x, None, {"OP_ACTIVATION": 1, f"ACTIVATION_{activation.upper()}": 1})


def scale(out: Operand, x: Operand, *, factor: float) -> Launch:
    """out = x factor."""
    return _elementwise(out, x, None, {"OP_SCALE": 1}, factor)


def soft_cap(out: Operand, x: Operand, *, cap: float) -> Launch:
    """out = cap tanh(x / cap)."""
    return _elementwise(out, x, None, {"OP_CAP": 1}, cap)


def clamp(out: Operand, x: Operand, *, limit: float) -> Launch:
    """out = x, what is beyond -limit or limit being set to it."""
    return _elementwise(out, x, None, {"OP_CLAMP": 1}, limit)


def _elementwise(
    out: Operand, x: Operand, y: Operand | None, defines: Mapping[str, int], factor: float = 0.0
) -> Launch:
    dtype = same_dtype(out, x, y)
    features = out.features
    operands = [o for o in (out, x, y) if o is not None]
    require(all(o.features == features for o in operands), "elementwise: shapes differ")
    width = load_width(*operands, run=features)
    threads = block_threads(features // width, 256)
    spec = specialised(
        "elementwise.cu", "elementwise", dtype,
        FEATURES=features, WIDTH=width, THREADS=threads, **defines,
    )  # fmt: skip
    y_stride = y.row_stride if y is not None and len(y.shape) > 1 else 0
    grid = (extent(out.shape[0]), -(-features // (width * threads)), 1)
    arguments = (out, x, y, out.row_stride, x.row_stride, y_stride, Float(factor))
    return Launch(spec, arguments, grid, threads)


def rope_table(
    out: Operand,
    positions: Operand,
    query_starts: Operand,
    prompt_lens: Operand,
    frequencies: Operand,
    *,
    rope: Mapping[str, Any],
) -> Launch:
    """Each token's cosines and sines. `frequencies` [dim / 2] float32 are those for sequences of
    the trained length, followed for longrope by those for longer ones; `rope` holds the fields of a
    RopeConfig."""
    dim = int(rope["dim"])
    require(out.dtype == "float32" and out.features == dim, "rope_table: float32 [tokens, dim]")
    scaling = rope["scaling"]
    spec = specialised(
        "rope_table.cu", "rope_table", "float32",
        DIM=dim, DYNAMIC=int(scaling == "dynamic"), LONGROPE=int(scaling == "longrope"),
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        out, positions, query_starts, prompt_lens, frequencies, Size("sequences"),
        Float(rope["attention_factor"]), Double(rope["theta"]), Double(rope["factor"]),
        int(rope["original_max_position"]),
    )  # fmt: skip
    return Launch(spec, arguments, (extent(out.shape[0]), 1, 1), dim // 2)


def rope(out: Operand, x: Operand, table: Operand, *, head_dim: int) -> Launch:
    """out = x with the first elements of each head rotated by the table's angles."""
    dtype = same_dtype(out, x)
    spec = specialised("rope.cu", "rope", dtype, DIM=table.features, HEAD_DIM=head_dim)
    grid = (extent(x.shape[0]), x.features // head_dim, 1)
    return Launch(spec, (out, x, table, out.row_stride, x.row_stride), grid, 32)


def square_sum(out: Operand, x: Operand) -> Launch:
    """out [tokens, 1] float32 = the sum of the squares of each row of x."""
    require(out.dtype == "float32" and out.features == 1, "square_sum: float32 [tokens, 1]")
    threads = block_threads(x.features, 256)
    spec = specialised("norm_parts.cu", "square_sum", x.dtype, FEATURES=x.features, THREADS=threads)
    return Launch(spec, (out, x, x.row_stride), (extent(x.shape[0]), 1, 1), threads)


def rms_norm_by(
    out: Operand, x: Operand, sums: Operand, weight: Operand, *, eps: float, size: int
) -> Launch:
    """out = x / sqrt(sums / size + eps) weight, with the `sums` of each row's squares."""
    dtype = same_dtype(out, x, weight)
    require(sums.dtype == "float32" and sums.features == 1, "rms_norm_by: float32 [tokens, 1]")
    require(out.shape == x.shape and weight.features == x.features, "rms_norm_by: shapes differ")
    threads = block_threads(x.features, 256)
    spec = specialised("norm_parts.cu", "rms_norm_by", dtype, FEATURES=x.features, THREADS=threads)
    arguments = (out, x, sums, weight, out.row_stride, x.row_stride, Float(size), Float(eps))
    return Launch(spec, arguments, (extent(x.shape[0]), 1, 1), threads)
