"""`RankLowering`: a rank's prepared graph as TensorRT networks, one an engine, and its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from llmforge.engine.step import Limits
from llmforge.engine.target import Weights
from llmforge.engine.tensorrt.alike import Anonymous, anonymous
from llmforge.engine.tensorrt.io import engine_shape, profiles
from llmforge.engine.tensorrt.lowering import TABLE
from llmforge.engine.tensorrt.lowering.context import Lowering, WeightUse
from llmforge.engine.tensorrt.network import Network, Value
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import CachePlan, RankPlan, Step
from llmforge.engine.tensorrt.segments import Segment, cut
from llmforge.engine.tensorrt.weight_file import WeightFile
from llmforge.errors import BuildError
from llmforge.model.graph import Graph, Node, Parameter, Shape, Tensor


@dataclass(frozen=True)
class Engine:
    """A finished network and what it takes and gives, by name."""

    network: Network
    step: Step
    shapes: dict[str, Shape]  # of its inputs, with the dimensions of io.py


@dataclass(frozen=True)
class _Shared:
    """An engine whose weights are inputs, with what it takes, in its own names."""

    file: str
    inputs: tuple[str, ...]  # of the step's
    caches: tuple[CachePlan, ...]
    uses: tuple[WeightUse, ...]


class RankLowering:
    """Lowers one rank. `engines` gives its networks one after the other, so that the weights of
    one can be let go before the next; `plan` tells what was made of the rank, afterwards.

    primitives: no native layers, whatever the package has. apart: where weights go that are to be
    inputs of the engines, which segments that are alike then share; None: they are constants.
    """

    def __init__(
        self,
        graph: Graph,
        limits: Limits,
        weights: Weights,
        package: Package,
        *,
        primitives: bool,
        apart: WeightFile | None = None,
    ) -> None:
        self.graph = graph
        self.limits = limits
        self.weights = weights
        self.package = package
        self.primitives = primitives
        self.parts = cut(graph, self._by_runtime, package.features.layers_per_engine)
        self._apart = apart
        self._steps: list[Step] = []
        self._shared: dict[Hashable, _Shared] = {}
        self._caches: list[CachePlan] = []
        self._inputs: dict[str, None] = {}
        self._tensors: dict[str, Tensor] = {}

    @property
    def native_cache(self) -> bool:
        return self.package.features.cache_update and not self.primitives

    @property
    def num_engines(self) -> int:
        segments = [part for part in self.parts if isinstance(part, Segment)]
        if self._apart is None:
            return len(segments)
        return len({anonymous(self.graph, segment).key for segment in segments})

    def engines(self) -> Iterator[Engine]:
        """Raises BuildError where TensorRT refuses a layer."""
        self.package.dtype(model_dtype(self.graph))
        for part in self.parts:
            if isinstance(part, Segment) and self._apart is None:
                yield self._engine(part)
            elif isinstance(part, Segment):
                assert self._apart is not None
                yield from self._alike(part, self._apart)
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
            weights=self._apart.plans if self._apart else (),
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
        """A hidden state of the graph as it stands between engines."""
        return self._tensors.setdefault(name, _at_edge(self.graph.tensors[name]))

    def _engine(self, segment: Segment) -> Engine:
        """The engine of a segment, with its weights."""
        net = Network(self.package)
        g = Lowering(net, self.graph, self.limits, self.weights, self.native_cache)
        self._write(g, segment)
        step = Step(
            "engine",
            file=self._next_file(),
            inputs=(*g.inputs, *segment.inputs, *(c.name for c in g.caches)),
            outputs=(*segment.outputs, *(c.output for c in g.caches)),
        )
        self._take_over(step, g.inputs, g.caches, segment)
        return _finished(net, step)

    def _alike(self, segment: Segment, apart: WeightFile) -> Iterator[Engine]:
        """The engine of a segment, without its weights, unless there is one already."""
        made = anonymous(self.graph, segment)
        if shared := self._shared.get(made.key):
            self._shared_step(made, shared, segment, apart)
            return
        net = Network(self.package)
        g = Lowering(net, made.graph, self.limits, self.weights, self.native_cache, uses=[])
        self._write(g, made.segment)
        assert g.uses is not None
        shared = _Shared(self._next_file(), tuple(g.inputs), tuple(g.caches), tuple(g.uses))
        self._shared[made.key] = shared
        yield _finished(net, self._shared_step(made, shared, segment, apart))

    def _shared_step(
        self, made: Anonymous, shared: _Shared, segment: Segment, apart: WeightFile
    ) -> Step:
        """The step in which a shared engine computes this segment."""
        caches = [_renamed(made, local) for local in shared.caches]
        here, there = made.segment, shared.caches
        step = Step(
            "engine",
            file=shared.file,
            inputs=(*shared.inputs, *segment.inputs, *(c.name for c in caches)),
            outputs=(*segment.outputs, *(c.output for c in caches)),
            local=(
                *(*shared.inputs, *here.inputs, *(c.name for c in there)),
                *(*here.outputs, *(c.output for c in there)),
            ),
            weights=tuple(self._weight(made, use, apart) for use in shared.uses),
        )
        self._take_over(step, shared.inputs, caches, segment)
        return step

    def _weight(self, made: Anonymous, use: WeightUse, apart: WeightFile) -> str:
        """The name of a weight that a shared engine takes here."""
        parameter = self.graph.tensors[made.names[use.parameter]]
        assert isinstance(parameter, Parameter)
        key = dataclasses.replace(use, parameter=parameter.name)
        if not apart.has(key):
            apart.add(key, parameter.name, use.of(self.weights.map(parameter)))
        return apart.name(key)

    def _take_over(
        self, step: Step, inputs: Sequence[str], caches: Sequence[CachePlan], segment: Segment
    ) -> None:
        self._steps.append(step)
        self._inputs.update(dict.fromkeys(inputs))
        self._caches += caches
        for name in (*segment.inputs, *segment.outputs):
            self._edge(name)

    def _next_file(self) -> str:
        return f"segment{len({s.file for s in self._steps if s.kind == 'engine'})}.engine"

    def _write(self, g: Lowering, segment: Segment) -> None:
        """The segment as layers of g's network."""
        for name in segment.inputs:
            self._take(g, name)
        for node in segment.nodes:
            self._lower(g, node)
        for name in segment.outputs:
            self._give(g, name)
        self.package.messages.check("the network cannot be built")

    def _take(self, g: Lowering, name: str) -> None:
        tensor = g.graph.tensors[name]
        edge = _at_edge(tensor)
        value = g.net.input(name, edge.dtype, engine_shape(edge))
        if tensor.shape[0] == "rows":
            value = g.net.cast(g.net.reshape(value, (1, -1, int(tensor.shape[-1]))), tensor.dtype)
        g.values[name] = value

    def _give(self, g: Lowering, name: str) -> None:
        edge, value = _at_edge(g.graph.tensors[name]), g.values[name]
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
        tensor = g.graph.tensors[name]
        if isinstance(tensor, Parameter) or tensor in g.graph.states:
            return tensor
        if name in _TOKEN_INPUTS:
            return g.step_input(name)
        if name in {t.name for t in g.graph.inputs}:
            return None
        raise BuildError(f"{name} is read before it is computed")


def _at_edge(tensor: Tensor) -> Tensor:
    """A hidden state as it stands between engines: logits, and what else is of rows, in
    float32."""
    dtype = "float32" if tensor.shape[0] == "rows" else tensor.dtype
    return Tensor(tensor.name, tensor.shape, dtype)


def _finished(net: Network, step: Step) -> Engine:
    inputs = (net.network.get_input(i) for i in range(net.network.num_inputs))
    return Engine(net, step, {t.name: net.shapes[t.name] for t in inputs})


def _renamed(made: Anonymous, local: CachePlan) -> CachePlan:
    """What a cache of a shared engine is in this segment."""
    kind, number = local.name.split(".")
    _, layer, _ = made.names[f"layers.{number}.{kind}"].split(".")
    name = f"{kind}.{layer}"
    output = name + local.output.removeprefix(local.name)
    return dataclasses.replace(local, name=name, output=output)


def model_dtype(graph: Graph) -> str:
    """What the model computes in: the caches' dtype."""
    return graph.states[0].dtype


# Step inputs that rows take as they are; what the others say is said by io.py's.
_TOKEN_INPUTS = ("token_ids", "positions")
_UNUSED = ("query_starts", "kv_lens", "block_table", "prompt_lens", "logit_rows")
