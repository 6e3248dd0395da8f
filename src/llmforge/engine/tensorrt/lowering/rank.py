"""`RankLowering`: a rank's prepared graph as TensorRT networks, one an engine, and its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmforge.engine.step import Limits
from llmforge.engine.target import Weights
from llmforge.engine.tensorrt.io import engine_shape, profiles
from llmforge.engine.tensorrt.lowering import TABLE
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import CachePlan, RankPlan, Step
from llmforge.engine.tensorrt.segments import Segment, cut
from llmforge.errors import BuildError
from llmforge.model.graph import Graph, Node, Parameter, Shape, Tensor


@dataclass(frozen=True)
class Engine:
    """A finished network and what it takes and gives, by name."""

    network: Network
    step: Step
    shapes: dict[str, Shape]  # of its inputs, with the dimensions of io.py


class RankLowering:
    """Lowers one rank. `engines` gives its networks one after the other, so that the weights of
    one can be let go before the next; `plan` tells what was made of the rank, afterwards.

    primitives: no native layers, whatever the package has.
    """

    def __init__(
        self, graph: Graph, limits: Limits, weights: Weights, package: Package, *, primitives: bool
    ) -> None:
        self.graph = graph
        self.limits = limits
        self.weights = weights
        self.package = package
        self.primitives = primitives
        self.parts = cut(graph, self._by_runtime, package.features.layers_per_engine)
        self._steps: list[Step] = []
        self._caches: list[CachePlan] = []
        self._inputs: dict[str, None] = {}
        self._tensors: dict[str, Tensor] = {}

    @property
    def native_cache(self) -> bool:
        return self.package.features.cache_update and not self.primitives

    @property
    def num_engines(self) -> int:
        return sum(isinstance(part, Segment) for part in self.parts)

    def engines(self) -> Iterator[Engine]:
        """Raises BuildError where TensorRT refuses a layer."""
        self.package.dtype(model_dtype(self.graph))
        for part in self.parts:
            if isinstance(part, Segment):
                file = f"segment{sum(s.kind == 'engine' for s in self._steps)}.engine"
                yield self._engine(part, file)
            else:
                self._steps.append(self._exchange(part))

    def plan(self, archs: Sequence[str], gpu: str) -> RankPlan:
        """For engines made for these architectures, or for this kind of GPU."""
        collectives = [n for n in self.graph.nodes if n.op in ("all_reduce", "all_gather")]
        inside = [n.attrs["ranks"] for n in collectives if not self._by_runtime(n)]
        logits = self.graph.outputs[0] if self.graph.outputs else None
        return RankPlan(
            package=self.package.name,
            version=self.package.version,
            archs=tuple(archs),
            gpu=gpu,
            primitives=self.primitives,
            dtype=model_dtype(self.graph),
            capacity=self.limits.block_size,
            slots=self.limits.num_blocks,
            native_cache=self.native_cache,
            in_engine_ranks=max(inside, default=1),
            profiles=profiles(self.limits),
            inputs=tuple(self._inputs),
            caches=tuple(self._caches),
            steps=tuple(self._steps),
            tensors=dict(self._tensors),
            logits=logits,
            kernels={},
        )

    # --------------------------------------------------------------------------------------------

    def _by_runtime(self, node: Node) -> bool:
        row = TABLE[node.op]
        return row.by_runtime and not row.uses_native(self.package.features, self.primitives)

    def _exchange(self, node: Node) -> Step:
        x = self._edge(node.inputs[0]).name if node.inputs else ""
        out = self._edge(node.outputs[0]).name if node.outputs else ""
        attrs = node.attrs
        peer = attrs.get("to", attrs.get("source", 0))
        size, ranks = attrs.get("size", 0), attrs.get("ranks", 0)
        return Step(node.op, x=x, out=out, size=size, peer=peer, ranks=ranks)

    def _edge(self, name: str) -> Tensor:
        """A hidden state as it stands between engines: logits, and what else is of rows, in
        float32."""
        tensor = self.graph.tensors[name]
        dtype = "float32" if tensor.shape[0] == "rows" else tensor.dtype
        return self._tensors.setdefault(name, Tensor(name, tensor.shape, dtype))

    def _engine(self, segment: Segment, file: str) -> Engine:
        net = Network(self.package)
        g = Lowering(net, self.graph, self.limits, self.weights, self.native_cache)
        for name in segment.inputs:
            self._take(g, name)
        for node in segment.nodes:
            self._lower(g, node)
        for name in segment.outputs:
            self._give(g, name)
        self.package.messages.check("the network cannot be built")
        self._inputs.update(dict.fromkeys(g.inputs))
        self._caches += g.caches
        step = Step(
            "engine",
            file=file,
            inputs=(*g.inputs, *segment.inputs, *(c.name for c in g.caches)),
            outputs=(*segment.outputs, *(c.output for c in g.caches)),
        )
        self._steps.append(step)
        inputs = (net.network.get_input(i) for i in range(net.network.num_inputs))
        return Engine(net, step, {t.name: net.shapes[t.name] for t in inputs})

    def _take(self, g: Lowering, name: str) -> None:
        edge, tensor = self._edge(name), self.graph.tensors[name]
        value = g.net.input(name, edge.dtype, engine_shape(edge))
        if tensor.shape[0] == "rows":
            value = g.net.cast(g.net.reshape(value, (1, -1, int(tensor.shape[-1]))), tensor.dtype)
        g.values[name] = value

    def _give(self, g: Lowering, name: str) -> None:
        edge, value = self._edge(name), g.values[name]
        assert isinstance(value, Value)
        if edge.shape[0] == "rows":
            rows = g.net.reshape(value, (-1, int(edge.shape[-1])))
            value = g.net.cast(rows, edge.dtype)
        g.net.output(name, value)

    def _lower(self, g: Lowering, node: Node) -> None:
        g.node, g.net.label = node, f"{node.op} {', '.join(node.outputs)}"
        function = TABLE[node.op].choose(self.package.features, self.primitives)
        inputs = [self._operand(g, name) for name in node.inputs]
        result = function(g, *inputs, **node.attrs)
        results = result if isinstance(result, tuple) else (result,)
        g.values.update(zip(node.outputs, results, strict=True))

    def _operand(self, g: Lowering, name: str) -> object:
        """What a row gets for an input: see lowering/table.py."""
        if not name:
            return None
        if name in g.values and name not in _UNUSED:
            return g.values[name]
        tensor = self.graph.tensors[name]
        if isinstance(tensor, Parameter) or tensor in self.graph.states:
            return tensor
        if name in _TOKEN_INPUTS:
            return g.step_input(name)
        if name in {t.name for t in self.graph.inputs}:
            return None
        raise BuildError(f"{name} is read before it is computed")


def model_dtype(graph: Graph) -> str:
    """What the model computes in: the caches' dtype."""
    return graph.states[0].dtype


# Step inputs that rows take as they are; what the others say is said by io.py's.
_TOKEN_INPUTS = ("token_ids", "positions")
_UNUSED = ("query_starts", "kv_lens", "block_table", "prompt_lens", "logit_rows")
