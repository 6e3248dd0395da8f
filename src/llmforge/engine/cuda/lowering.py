"""Graph → Program: a row for each op, and the patterns of nodes that one kernel computes together.

`lower` walks the nodes. At each it first tries the patterns (`PATTERNS`), which take several nodes
at once, then the node's row in `LOWERINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from llmforge.checkpoint.config import RopeConfig
from llmforge.engine.cuda.program import (
    Instruction,
    Matmul,
    Program,
    StepLayout,
    StepShape,
    buffer_bytes,
    plan_arena,
)
from llmforge.engine.memory import largest_step
from llmforge.engine.step import Limits
from llmforge.errors import BuildError
from llmforge.kernels import launch as kernels
from llmforge.kernels.launch import Cache, Launch, Operand, SplitScratch
from llmforge.model.graph import Graph, Node

# Blocks a sequence's keys are divided among at most: enough to fill a large GPU from one sequence.
MAX_SPLITS = 32
_BLOCKS_WANTED = 264  # two for each multiprocessor of the largest GPUs


@dataclass(frozen=True)
class DeferredNorm:
    """A normed tensor that is not in memory: the products that read it compute it on the way in."""

    x: Operand
    weight: Operand
    eps: float


class Lowering:
    """The program of one graph and step shape in the making."""

    def __init__(self, graph: Graph, limits: Limits, shape: StepShape) -> None:
        self.graph = graph
        self.limits = limits
        self.shape = shape
        self.layout = StepLayout.of(shape, limits)
        self.readers = graph.consumers()
        self.parameters = {p.name for p in graph.parameters}
        self.operands: dict[str, Operand] = {}
        self.constants: dict[str, tuple[float, ...]] = {}
        self.deferred: dict[str, DeferredNorm] = {}
        self.streamed = 0  # products by stream_gemm.cu so far
        self._instructions: list[Instruction] = []
        self._buffers: dict[str, int] = {}
        self._sizes = largest_step(limits) | {
            "tokens": shape.tokens,
            "sequences": shape.sequences,
            "rows": shape.sequences,
        }
        for tensor in graph.inputs:
            self.operands[tensor.name] = self._whole(f"step.{tensor.name}", tensor.name)
        for tensor in (*graph.states, *graph.parameters):
            self.operands[tensor.name] = self._whole(tensor.name, tensor.name)

    def run(self) -> Program:
        nodes = self.graph.nodes
        index = 0
        while index < len(nodes):
            for pattern in PATTERNS:
                if taken := pattern(self, index):
                    index += taken
                    break
            else:
                LOWERINGS[nodes[index].op](self, nodes[index])
                index += 1
        outputs = [self.operands[name].buffer for name in self.graph.outputs]
        arena, nbytes = plan_arena(self._instructions, self._buffers, outputs)
        return Program(
            self.shape,
            self.layout,
            tuple(self._instructions),
            self.operands,
            self.graph.outputs,
            self.constants,
            arena,
            nbytes,
        )

    def operand(self, name: str) -> Operand:
        """The operand of a graph tensor that is computed already."""
        return self.operands[name]

    def new(self, name: str) -> Operand:
        """A buffer of its own for a graph tensor."""
        tensor = self.graph.tensors[name]
        operand = self._whole(f"arena.{name}", name)
        self._buffers[operand.buffer] = buffer_bytes(tensor.shape, tensor.dtype, self._sizes)
        self.operands[name] = operand
        return operand

    def emit(self, call: Launch | Matmul, *tensors: str) -> None:
        """Append an instruction; `tensors` are computed once it has run."""
        self._instructions.append(Instruction(call, tensors))

    def only_reader(self, name: str) -> Node | None:
        """The node that reads a tensor, where there is just one and the graph does not give the
        tensor out."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.graph.outputs else None

    def cache(self, node: Node) -> Cache:
        """The cache and step tables of an attention node."""
        keys = self.graph.tensors[node.inputs[3]]
        kv_heads = keys.shape[2]
        assert isinstance(kv_heads, int)
        return Cache(
            keys=self.operand(node.inputs[3]),
            values=self.operand(node.inputs[4]),
            query_starts=self.operand(node.inputs[5]),
            kv_lens=self.operand(node.inputs[6]),
            block_table=self.operand(node.inputs[7]),
            kv_heads=kv_heads,
            head_dim=node.attrs["head_dim"],
            block_size=self.limits.block_size,
            table_stride=self.layout.table_stride,
        )

    def _whole(self, buffer: str, name: str) -> Operand:
        tensor = self.graph.tensors[name]
        last = tensor.shape[-1]
        stride = last if isinstance(last, int) else 1
        return Operand(buffer, tensor.shape, tensor.dtype, stride)


def lower(graph: Graph, limits: Limits, shape: StepShape) -> Program:
    """The program of a prepared graph for steps of this shape. Raises BuildError where the graph
    has ops that this target cannot execute yet."""
    return Lowering(graph, limits, shape).run()


# -- patterns: several nodes, one kernel -----------------------------------------------------------


@dataclass(frozen=True)
class _Qkv:
    """linear with a bias (maybe), split, norms of q and k (maybe), ropes, attention."""

    linear: Node | None
    split: Node
    norms: tuple[Node, ...]
    ropes: tuple[Node, Node]
    attention: Node

    @property
    def count(self) -> int:
        return (self.linear is not None) + 1 + len(self.norms) + 2 + 1


def _match_qkv(low: Lowering, index: int) -> _Qkv | None:
    nodes = low.graph.nodes[index : index + 7]
    linear = None
    if nodes[0].op == "linear" and nodes[0].inputs[2]:
        linear, nodes = nodes[0], nodes[1:]
    if not nodes or nodes[0].op != "split" or len(nodes[0].outputs) != 3:
        return None
    split = nodes[0]
    if linear and (split.inputs[0] != linear.outputs[0] or not low.only_reader(split.inputs[0])):
        return None
    q, k, v = split.outputs
    norms = tuple(n for n in nodes[1:3] if n.op == "rms_norm")
    rest = nodes[1 + len(norms) :]
    if norms:
        if [n.inputs[0] for n in norms] != [q, k]:
            return None
        q, k = (n.outputs[0] for n in norms)
    if [n.op for n in rest[:3]] != ["rope", "rope", "attention"]:
        return None
    ropes, attention = (rest[0], rest[1]), rest[2]
    if [n.inputs[0] for n in ropes] != [q, k] or ropes[0].inputs[1] != ropes[1].inputs[1]:
        return None
    rotated = tuple(n.outputs[0] for n in ropes)
    if attention.inputs[:3] != (*rotated, v):
        return None
    inner = (*split.outputs, *(n.outputs[0] for n in norms), *rotated)
    if not all(low.only_reader(name) for name in inner):
        return None
    return _Qkv(linear, split, norms, ropes, attention)


def _qkv_attention(low: Lowering, index: int) -> int:
    """The product's bias, qk-norm, rope and the cache writes in one kernel, then attention."""
    found = _match_qkv(low, index)
    if found is None:
        return 0
    bias = None
    if found.linear:
        _product(low, found.linear, low.new(found.linear.outputs[0]), bias=None)
        bias = low.operand(found.linear.inputs[2])
    LOWERINGS["split"](low, found.split)
    q, k, v = (low.operand(name) for name in found.split.outputs)
    norms = [low.operand(n.inputs[1]) for n in found.norms]
    cache = low.cache(found.attention)
    rotated = low.new(found.ropes[0].outputs[0])
    epilogue = kernels.qkv(
        rotated,
        q,
        k,
        v,
        cache,
        low.operand("positions"),
        table=low.operand(found.ropes[0].inputs[1]),
        bias=bias,
        q_norm=norms[0] if norms else None,
        k_norm=norms[1] if norms else None,
        eps=found.norms[0].attrs["eps"] if found.norms else 0.0,
    )
    low.emit(epilogue, rotated.buffer.removeprefix("arena."))
    _attend(low, found.attention, rotated, cache)
    return found.count


def _streams(low: Lowering, node: Node) -> bool:
    """Whether a linear node is one for stream_gemm.cu in this program."""
    weight = low.operand(node.inputs[1])
    plan = kernels.stream_plan(weight.dtype, weight.features)
    few = low.shape.decode and low.shape.tokens <= kernels.STREAM_ROWS
    if plan is None or not few or not low.shape.bulk_copies:
        return False
    return node.inputs[0] not in low.deferred or plan.split == 1


def _linear_gated(low: Lowering, index: int) -> int:
    """gate and up in one streamed product, which also applies the activation."""
    nodes = low.graph.nodes[index : index + 3]
    if [n.op for n in nodes] != ["linear", "split", "gated_activation"]:
        return 0
    linear, split, gated = nodes
    gate_up = linear.outputs[0]
    chained = split.inputs == (gate_up,) and gated.inputs == split.outputs
    if not chained or not all(low.only_reader(name) for name in (gate_up, *split.outputs)):
        return 0
    features = low.graph.tensors[gate_up].shape[-1]
    whole_tiles = isinstance(features, int) and features % 16 == 0
    if not whole_tiles or len(set(split.attrs["sizes"])) != 1 or not _streams(low, linear):
        return 0
    out = low.new(gated.outputs[0])
    bias = low.operand(linear.inputs[2]) if linear.inputs[2] else None
    _product(low, linear, out, bias=bias, activation=gated.attrs["activation"])
    return 3


def _linear_add(low: Lowering, index: int) -> int:
    """A streamed product that adds the residual; the norm behind the sum is left to its readers."""
    nodes = low.graph.nodes[index : index + 2]
    if nodes[0].op != "linear" or len(nodes) < 2 or nodes[1].op not in ("add", "add_rms_norm"):
        return 0
    linear, added = nodes
    product, pair = linear.outputs[0], added.inputs[:2]
    if product not in pair or pair[0] == pair[1] or not low.only_reader(product):
        return 0
    residual = low.operands.get(pair[0] if pair[1] == product else pair[1])
    if residual is None or len(residual.shape) != 2 or not _streams(low, linear):
        return 0
    if not residual.contiguous:
        return 0
    bias = low.operand(linear.inputs[2]) if linear.inputs[2] else None
    total = low.new(added.outputs[0])
    _product(low, linear, total, bias=bias, residual=residual)
    if added.op == "add_rms_norm":
        _norm(low, added.outputs[1], total, low.operand(added.inputs[2]), added.attrs["eps"])
    return 2


PATTERNS: tuple[Callable[[Lowering, int], int], ...] = (
    _qkv_attention,
    _linear_gated,
    _linear_add,
)
"""Each returns how many nodes it has lowered, from `index` on; 0 where it does not apply."""


def _product(
    low: Lowering,
    linear: Node,
    out: Operand,
    *,
    bias: Operand | None,
    residual: Operand | None = None,
    activation: str | None = None,
) -> None:
    """The product of a linear node, with what is fused behind it, by the kernel that suits."""
    x_name, weight = linear.inputs[0], low.operand(linear.inputs[1])
    computed = out.buffer.removeprefix("arena.")
    if not _streams(low, linear):
        assert residual is None and activation is None, "only streamed products fuse these"
        low.emit(Matmul(low.operand(x_name), weight, bias, out), computed)
        return
    norm = low.deferred.get(x_name)
    scratch = kernels.StreamScratch(
        Operand("scratch.sums", (1,), "float32", 1), Operand("scratch.arrived", (1,), "int32", 1)
    )
    call = kernels.stream_gemm(
        out,
        norm.x if norm else low.operand(x_name),
        weight,
        scratch,
        bias=bias,
        residual=residual,
        norm_weight=norm.weight if norm else None,
        eps=norm.eps if norm else 0.0,
        activation=activation,
        alone=low.streamed % 2 == 1,
    )
    low.streamed += 1
    low.emit(call, computed)


def _norm(low: Lowering, name: str, x: Operand, weight: Operand, eps: float) -> None:
    """The RMSNorm `name` of x, left to its readers where all of them can compute it."""
    readers = low.readers.get(name, [])
    plan = kernels.stream_plan(x.dtype, x.features)
    whole = weight.features == x.features and x.contiguous and name not in low.graph.outputs
    streamed = all(n.op == "linear" and _streams(low, n) for n in readers)
    if whole and streamed and plan and plan.split == 1:
        low.deferred[name] = DeferredNorm(x, weight, eps)
        return
    low.emit(kernels.rms_norm(low.new(name), x, weight, eps=eps), name)


# -- one node --------------------------------------------------------------------------------------


def _embed(low: Lowering, node: Node) -> None:
    ids, weight = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    low.emit(kernels.gather(out, weight, ids, first=node.attrs["start"]), node.outputs[0])


def _linear(low: Lowering, node: Node) -> None:
    bias = low.operand(node.inputs[2]) if node.inputs[2] else None
    _product(low, node, low.new(node.outputs[0]), bias=bias)


def _split(low: Lowering, node: Node) -> None:
    x = low.operand(node.inputs[0])
    start = 0
    for name, size in zip(node.outputs, node.attrs["sizes"], strict=True):
        low.operands[name] = x.columns(start, start + size)
        start += size


def _rms_norm(low: Lowering, node: Node) -> None:
    x, weight = (low.operand(name) for name in node.inputs)
    _norm(low, node.outputs[0], x, weight, node.attrs["eps"])


def _add(low: Lowering, node: Node) -> None:
    x, y = (low.operand(name) for name in node.inputs)
    low.emit(kernels.add(low.new(node.outputs[0]), x, y), node.outputs[0])


def _add_rms_norm(low: Lowering, node: Node) -> None:
    x, residual, weight = (low.operand(name) for name in node.inputs)
    total, out = (low.new(name) for name in node.outputs)
    eps = node.attrs["eps"]
    call = kernels.rms_norm(out, x, weight, eps=eps, residual=residual, out_sum=total)
    low.emit(call, *node.outputs)


def _rope_table(low: Lowering, node: Node) -> None:
    rope = node.attrs["rope"]
    name = f"constant.{node.outputs[0]}"
    low.constants[name] = tuple(RopeConfig(**rope).frequencies())
    frequencies = Operand(name, (rope["dim"] // 2,), "float32", rope["dim"] // 2)
    positions, query_starts, prompt_lens = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    call = kernels.rope_table(
        out, positions, query_starts, prompt_lens, frequencies, rope=rope
    )
    low.emit(call, node.outputs[0])


def _rope(low: Lowering, node: Node) -> None:
    x, table = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    low.emit(kernels.rope(out, x, table, head_dim=node.attrs["head_dim"]), node.outputs[0])


def _attention(low: Lowering, node: Node) -> None:
    """Without what precedes it: q is copied, k and v are stored."""
    q, k, v = (low.operand(name) for name in node.inputs[:3])
    cache = low.cache(node)
    name = f"{node.outputs[0]}.q"
    tensor = dataclasses.replace(low.graph.tensors[node.inputs[0]], name=name)
    low.graph = dataclasses.replace(low.graph, tensors={**low.graph.tensors, name: tensor})
    copied = low.new(name)
    low.emit(kernels.qkv(copied, q, k, v, cache, low.operand("positions")))
    _attend(low, node, copied, cache)


def _attend(low: Lowering, node: Node, q: Operand, cache: Cache) -> None:
    out = low.new(node.outputs[0])
    split = None
    if low.shape.decode:
        blocks = low.shape.sequences * cache.kv_heads
        splits = max(1, min(MAX_SPLITS, -(-_BLOCKS_WANTED // blocks)))
        partial = Operand("scratch.partial", (1,), "float32", 1)
        split = SplitScratch(partial, Operand("scratch.counters", (1,), "int32", 1), splits)
    scale, window = node.attrs["scale"], node.attrs["window"]
    call = kernels.attention(out, q, cache, scale=scale, window=window, split=split)
    low.emit(call, node.outputs[0])


def _gated_activation(low: Lowering, node: Node) -> None:
    gate, up = (low.operand(name) for name in node.inputs)
    out = low.new(node.outputs[0])
    call = kernels.gated_activation(out, gate, up, activation=node.attrs["activation"])
    low.emit(call, node.outputs[0])


def _select_rows(low: Lowering, node: Node) -> None:
    x, rows = (low.operand(name) for name in node.inputs)
    if low.shape.decode and node.inputs[1] == "logit_rows":
        # Every row is wanted, in order.
        shape = (*rows.shape, *x.shape[1:])
        low.operands[node.outputs[0]] = dataclasses.replace(x, shape=shape)
        return
    low.emit(kernels.gather(low.new(node.outputs[0]), x, rows), node.outputs[0])


def _refuse(low: Lowering, node: Node) -> NoReturn:
    raise BuildError(
        f"the cuda target cannot execute {node.op} yet, which an engine of several ranks needs; "
        "build with tensor_parallel 1 and pipeline_parallel 1, or for the target cpu"
    )


LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "embed": _embed,
    "linear": _linear,
    "split": _split,
    "rms_norm": _rms_norm,
    "add": _add,
    "add_rms_norm": _add_rms_norm,
    "rope_table": _rope_table,
    "rope": _rope,
    "attention": _attention,
    "gated_activation": _gated_activation,
    "select_rows": _select_rows,
    "all_reduce": _refuse,
    "all_gather": _refuse,
    "send": _refuse,
    "recv": _refuse,
}
