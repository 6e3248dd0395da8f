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
    """A symbolic size, as a kernel argument or in a grid: ``ceil(name * times / per)``."""

    name: str
    times: int = 1
    per: int = 1


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
    """A description of weights for the tensor copy engine: [rows, columns] seen as [columns / 64,
    halves, rows / halves, 64], copied in boxes of `box`, in rows of 128 bytes, swizzled."""

    weight: Operand
    halves: int
    box: tuple[int, int, int, int]  # elements in the order of the dimensions


Argument = Operand | TensorMap | Size | Float | Double | int | None
Extent = int | Size


@dataclass(frozen=True)
class Launch:
    """A kernel on its operands. None is a null pointer; int is int32."""

    kernel: KernelSpec
    arguments: tuple[Argument, ...]
    grid: tuple[Extent, Extent, Extent]
    block: int
    shared_bytes: int = 0


def _spec(source: str, entry: str, dtype: str, **defines: int | str) -> KernelSpec:
    macros = {f"DTYPE_{dtype.upper()}": 1, **defines}
    return KernelSpec(source, entry, tuple(sorted(macros.items())))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _same_dtype(*operands: Operand | None) -> str:
    dtypes = {o.dtype for o in operands if o is not None}
    _require(len(dtypes) == 1, f"operands of several dtypes: {sorted(dtypes)}")
    return dtypes.pop()


def _width(*operands: Operand, run: int) -> int:
    """Elements that one load may take: 16 bytes where every row, and every run of a row, starts
    at a multiple of that, else one."""
    width = 16 // DTYPE_BYTES[operands[0].dtype]
    numbers = [run]
    for operand in operands:
        numbers += [operand.offset, operand.row_stride if len(operand.shape) > 1 else 0]
    return width if all(number % width == 0 for number in numbers) else 1


def _threads(packs: int, most: int) -> int:
    return min(most, -(-packs // 32) * 32)


def gather(out: Operand, table: Operand, ids: Operand, *, first: int = 0) -> Launch:
    """out[i] = table[ids[i] - first]; zeros where the table has no such row."""
    dtype = _same_dtype(out, table)
    hidden = table.features
    _require(out.features == hidden and ids.dtype == "int32", "gather: out and table differ")
    _require(out.contiguous and table.contiguous, "gather: rows must be contiguous")
    width = _width(out, table, run=hidden)
    threads = _threads(hidden // width, 256)
    spec = _spec("gather.cu", "gather", dtype, HIDDEN=hidden, WIDTH=width, THREADS=threads)
    rows = ids.shape[0]
    # The number of rows is symbolic where the table is an activation; its ids are then in range.
    table_rows = table.shape[0] if isinstance(table.shape[0], int) else 2**31 - 1
    return Launch(spec, (out, table, ids, table_rows, first), (_extent(rows), 1, 1), threads)


def _extent(dim: Dim) -> Extent:
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
    dtype = _same_dtype(out, x, weight, residual, out_sum)
    run = weight.features
    _require(x.features % run == 0, f"rms_norm: {x.features} features, runs of {run}")
    _require((residual is None) == (out_sum is None), "rms_norm: residual and its sum go together")
    matrices = [o for o in (out, x, residual, out_sum) if o is not None]
    _require(all(m.shape == x.shape for m in matrices), "rms_norm: shapes differ")
    width = _width(*matrices, weight, run=run)
    threads = _threads(run // width, 1024)
    defines = {"RUN": run, "WIDTH": width, "THREADS": threads, "ADD": int(residual is not None)}
    strides = [o.row_stride if o is not None else 0 for o in (out, out_sum, x, residual)]
    return Launch(
        _spec("norm.cu", "rms_norm", dtype, **defines),
        (out, out_sum, x, residual, weight, *strides, Float(eps)),
        (_extent(x.shape[0]), x.features // run, 1),
        threads,
    )


def add(out: Operand, x: Operand, y: Operand) -> Launch:
    """out = x + y; y may be one row for all."""
    return _elementwise(out, x, y, {"OP_GATED": 0})


def gated_activation(out: Operand, gate: Operand, up: Operand, *, activation: str) -> Launch:
    """out = activation(gate) up."""
    return _elementwise(out, gate, up, {"OP_GATED": 1, f"ACTIVATION_{activation.upper()}": 1})


def _elementwise(out: Operand, x: Operand, y: Operand, defines: Mapping[str, int]) -> Launch:
    dtype = _same_dtype(out, x, y)
    features = out.features
    _require(x.features == features == y.features, "elementwise: shapes differ")
    width = _width(out, x, y, run=features)
    threads = _threads(features // width, 256)
    spec = _spec(
        "elementwise.cu", "elementwise", dtype,
        FEATURES=features, WIDTH=width, THREADS=threads, **defines,
    )  # fmt: skip
    y_stride = y.row_stride if len(y.shape) > 1 else 0
    grid = (_extent(out.shape[0]), -(-features // (width * threads)), 1)
    return Launch(spec, (out, x, y, out.row_stride, x.row_stride, y_stride), grid, threads)


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
    the trained length; `rope` holds the fields of a RopeConfig."""
    dim = int(rope["dim"])
    _require(out.dtype == "float32" and out.features == dim, "rope_table: float32 [tokens, dim]")
    dynamic = rope["scaling"] == "dynamic"
    spec = _spec("rope_table.cu", "rope_table", "float32", DIM=dim, DYNAMIC=int(dynamic))
    arguments: tuple[Argument, ...] = (
        out, positions, query_starts, prompt_lens, frequencies, Size("sequences"),
        Float(rope["attention_factor"]), Double(rope["theta"]), Double(rope["factor"]),
        int(rope["original_max_position"]),
    )  # fmt: skip
    return Launch(spec, arguments, (_extent(out.shape[0]), 1, 1), dim // 2)


def rope(out: Operand, x: Operand, table: Operand, *, head_dim: int) -> Launch:
    """out = x with the first elements of each head rotated by the table's angles."""
    dtype = _same_dtype(out, x)
    spec = _spec("rope.cu", "rope", dtype, DIM=table.features, HEAD_DIM=head_dim)
    grid = (_extent(x.shape[0]), x.features // head_dim, 1)
    return Launch(spec, (out, x, table, out.row_stride, x.row_stride), grid, 32)


@dataclass(frozen=True)
class Cache:
    """The paged KV cache of a layer, and the step's tables that say where things are."""

    keys: Operand
    values: Operand
    query_starts: Operand
    kv_lens: Operand
    block_table: Operand
    kv_heads: int
    head_dim: int
    block_size: int
    table_stride: int

    @property
    def defines(self) -> dict[str, int]:
        return {
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "TABLE_STRIDE": self.table_stride,
        }


def qkv(
    q_out: Operand,
    q: Operand,
    k: Operand,
    v: Operand,
    cache: Cache,
    positions: Operand,
    *,
    table: Operand | None = None,
    bias: Operand | None = None,
    q_norm: Operand | None = None,
    k_norm: Operand | None = None,
    eps: float = 0.0,
) -> Launch:
    """Bias, norm and rotate q and k; q to `q_out`, k and v into the cache. What is None is left
    out; `bias` is that of q | k | v."""
    dtype = _same_dtype(q_out, q, k, v, cache.keys, cache.values, bias, q_norm, k_norm)
    heads = q.features // cache.head_dim
    _require(k.features == v.features == cache.kv_heads * cache.head_dim, "qkv: k, v and cache")
    _require(q_out.contiguous and q_out.features == q.features, "qkv: q_out is q, contiguous")
    _require((q_norm is None) == (k_norm is None), "qkv: q and k are normed both or neither")
    warps = 4
    spec = _spec(
        "qkv.cu", "qkv", dtype, HEADS=heads, WARPS=warps, BIAS=int(bias is not None),
        NORM=int(q_norm is not None), ROPE_DIM=table.features if table else 0, **cache.defines,
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        q_out, cache.keys, cache.values, q, k, v, bias, q_norm, k_norm, table, positions,
        cache.query_starts, cache.block_table, Size("sequences"),
        q.row_stride, k.row_stride, v.row_stride, Float(eps),
    )  # fmt: skip
    blocks = -(-(heads + 2 * cache.kv_heads) // warps)
    return Launch(spec, arguments, (_extent(q.shape[0]), blocks, 1), warps * 32)


@dataclass(frozen=True)
class SplitScratch:
    """What the blocks that share a sequence's keys need to join their results: `partial` float32,
    `counters` int32 zeros, and how many blocks at most share a sequence."""

    partial: Operand
    counters: Operand
    splits: int


def split_scratch_sizes(sequences: int, heads: int, head_dim: int, splits: int) -> tuple[int, int]:
    """Elements of `partial` and of `counters` (one a query head is enough)."""
    return sequences * heads * splits * (head_dim + 2), sequences * heads


def has_tensor_core_attention(dtype: str, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether attention_mma.cu covers this shape."""
    return dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128 and heads // kv_heads <= 16


def attention(
    out: Operand,
    q: Operand,
    cache: Cache,
    *,
    scale: float,
    window: int | None,
    split: SplitScratch | None = None,
) -> Launch:
    """Causal attention of contiguous q [tokens, heads * head_dim] over the cache, which holds the
    new tokens already. With `split`, every sequence has one new token."""
    dtype = _same_dtype(out, q, cache.keys, cache.values)
    heads = q.features // cache.head_dim
    _require(q.contiguous and out.contiguous, "attention: q and out must be contiguous")
    defines = {"HEADS": heads, "WINDOW": window or 0, **cache.defines}
    step = (cache.query_starts, cache.kv_lens, cache.block_table)
    if not has_tensor_core_attention(dtype, heads, cache.kv_heads, cache.head_dim):
        warps = 4
        spec = _spec("attention_simple.cu", "attention_simple", dtype, WARPS=warps, **defines)
        arguments: tuple[Argument, ...] = (
            out, q, cache.keys, cache.values, *step,
            Size("tokens"), Size("sequences"), Float(scale),
        )  # fmt: skip
        return Launch(spec, arguments, (Size("tokens", heads, warps), 1, 1), warps * 32)
    group, warps = heads // cache.kv_heads, 4
    defines |= {"GROUP": group, "WARPS": warps, "OVER_KEYS": int(split is not None)}
    spec = _spec("attention_mma.cu", "attention", dtype, **defines)
    common = (out, q, cache.keys, cache.values, *step)
    if split is None:
        tiles = Size("longest_query", 1, warps * (16 // group))
        grid: tuple[Extent, Extent, Extent] = (tiles, cache.kv_heads, Size("sequences"))
        return Launch(spec, (*common, Float(scale)), grid, warps * 32)
    return Launch(
        spec,
        (*common, split.partial, split.counters, Float(scale)),
        (cache.kv_heads, Size("sequences"), split.splits),
        warps * 32,
    )


SAMPLE_PARAMS_BYTES = 56  # struct Params of sample.cu


def sample(
    tokens: Operand,
    largest: Operand,
    logits: Operand,
    params: Operand,
    history: Operand,
    seen: Operand,
) -> Launch:
    """One token a row of logits [rows, vocabulary]; see sample.cu for the other operands."""
    _require(logits.contiguous, "sample: logits must be contiguous")
    vocab = logits.features
    width = _width(logits, run=vocab)
    threads = 512
    spec = _spec("sample.cu", "sample", logits.dtype, VOCAB=vocab, WIDTH=width, THREADS=threads)
    arguments = (tokens, largest, logits, params, history, seen)
    return Launch(spec, arguments, (_extent(logits.shape[0]), 1, 1), threads)


@dataclass(frozen=True)
class StreamPlan:
    """How stream_gemm.cu divides a product over K elements; see there."""

    split: int
    chunk: int
    stages: int

    @property
    def stage_bytes(self) -> int:
        return 16 * self.chunk * 2


STREAM_ROWS = 8  # rows of x that the kernel takes
_STREAM_WARPS = 4
_MAX_SLICE = 1024  # elements of x that a warp keeps: 128 registers a lane
_MAX_SPLIT = 8
_RING_BYTES = 96 << 10  # of shared memory, so that blocks of two kernels fit a multiprocessor
# With the kernel's other 4 KB just over half of a multiprocessor's 228 KB of shared memory.
_ALONE_BYTES = 109 << 10


def stream_plan(dtype: str, k: int) -> StreamPlan | None:
    """The plan for weights of `k` columns, or None where the kernel does not take them."""
    if dtype == "float32":
        return None
    for split in range(1, _MAX_SPLIT + 1):
        slice_size, rest = divmod(k, split * _STREAM_WARPS)
        if rest == 0 and slice_size % 64 == 0 and slice_size <= _MAX_SLICE:
            sizes = [c for c in range(64, 257, 64) if slice_size % c == 0]
            chunk = sizes[-1]
            one = StreamPlan(split, chunk, 1)
            stages = min(_RING_BYTES // (_STREAM_WARPS * one.stage_bytes), 16)
            return replace(one, stages=stages)
    return None


@dataclass(frozen=True)
class StreamScratch:
    """What blocks that share a product need to add their sums: `partial` float32, `counters`
    int32 zeros."""

    partial: Operand
    counters: Operand


def stream_scratch_floats(features: int, split: int) -> int:
    """Elements of `partial` for a product with these output features."""
    return split * -(-features // 16) * 128


def stream_gemm(
    out: Operand,
    x: Operand,
    weight: Operand,
    scratch: StreamScratch,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    norm_weight: Operand | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    alone: bool = False,
) -> Launch:
    """out = x weightᵀ + bias for at most STREAM_ROWS rows; with `norm_weight`, of x's RMSNorm; with
    `residual`, plus that; with `activation`, gated: the weights are those of gate | up.

    alone: take so much shared memory that no two blocks of this launch fit a multiprocessor. Where
    every second product does, the blocks of each spread evenly, one to a multiprocessor, although
    they start while those of the product before still run: a block that is not alone finds room for
    just one beside each that is."""
    dtype = _same_dtype(out, x, weight, bias, residual, norm_weight)
    features, k = weight.shape
    assert isinstance(features, int) and isinstance(k, int)
    plan = stream_plan(dtype, k)
    assert plan is not None, f"stream_plan takes no products over {k} {dtype}"
    _require(x.features == k and x.contiguous, "stream_gemm: x is [rows, k], contiguous")
    _require(norm_weight is None or plan.split == 1, "stream_gemm: a norm needs all of k")
    gated = activation is not None
    _require(weight.contiguous and weight.offset == 0, "stream_gemm: weights lie whole")
    _require(not gated or features % 16 == 0, "stream_gemm: gate and up in whole tiles")
    _require(not (gated and residual), "stream_gemm: gated or residual, not both")
    _require(out.features == (features // 2 if gated else features), "stream_gemm: out's features")
    _require(residual is None or residual.row_stride == out.row_stride, "stream_gemm: strides")
    defines = {
        "K": k, "SPLIT": plan.split, "WARPS": _STREAM_WARPS, "CHUNK": plan.chunk,
        "STAGES": plan.stages, "NORM": int(norm_weight is not None), "BIAS": int(bias is not None),
        "RESIDUAL": int(residual is not None), "GATED": int(gated),
    }  # fmt: skip
    if activation is not None:
        defines[f"ACTIVATION_{activation.upper()}"] = 1
    rows, halves = x.shape[0], 2 if gated else 1
    weights = TensorMap(weight, halves, (plan.chunk // 64, halves, 16 // halves, 64))
    arguments = (
        out, x, weights, bias, residual, norm_weight, scratch.partial, scratch.counters,
        _extent(rows), features, out.row_stride, Float(eps),
    )  # fmt: skip
    shared = _STREAM_WARPS * plan.stages * plan.stage_bytes + 1024
    if alone:
        shared = max(shared, _ALONE_BYTES)
    spec = _spec("stream_gemm.cu", "stream_gemm", dtype, **defines)
    return Launch(spec, arguments, (Size("processors"), 1, 1), _STREAM_WARPS * 32, shared)
