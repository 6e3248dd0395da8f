"""`GraphBuilder`: how a model definition is written. One method an op, checked as it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from llmforge.checkpoint.config import RopeConfig
from llmforge.model.graph import Graph, Node, Parameter, Shape, Tensor
from llmforge.model.ops import OPS

STEP_INPUTS: tuple[tuple[str, Shape], ...] = (
    ("token_ids", ("tokens",)),
    ("positions", ("tokens",)),
    ("query_starts", ("sequences + 1",)),
    ("kv_lens", ("sequences",)),
    ("block_table", ("sequences", "table_width")),
    ("prompt_lens", ("sequences",)),
    ("logit_rows", ("rows",)),
)


class GraphBuilder:
    """Collects the nodes of one rank's graph. The step's inputs are attributes of `inputs`."""

    def __init__(self, tensor_parallel: int = 1) -> None:
        """tensor_parallel: the ranks that collectives join."""
        self.tensor_parallel = tensor_parallel
        self.inputs = {name: Tensor(name, shape, "int32") for name, shape in STEP_INPUTS}
        self._states: list[Tensor] = []
        self._parameters: dict[str, Parameter] = {}
        self._nodes: list[Node] = []
        self._tensors: dict[str, Tensor] = dict(self.inputs)

    # -- tensors that are not computed -----------------------------------------------------------

    def parameter(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        """A weight of the checkpoint, with this rank's shape. The same name is the same weight."""
        if name not in self._parameters:
            parameter = Parameter(name, tuple(shape), dtype, (name,))
            self._parameters[name] = self._tensors[name] = parameter
        return self._parameters[name]

    def kv_cache(self, layer: int, kv_heads: int, head_dim: int, dtype: str) -> tuple[Tensor, ...]:
        """The key and value cache of a layer."""
        shape = ("blocks", "block_size", kv_heads, head_dim)
        caches = tuple(Tensor(f"layers.{layer}.{x}_cache", shape, dtype) for x in ("key", "value"))
        self._states.extend(caches)
        self._tensors.update({t.name: t for t in caches})
        return caches

    def latent_cache(self, layer: int, size: int, dtype: str) -> Tensor:
        """The cache of a layer's latents, which all heads share."""
        cache = Tensor(f"layers.{layer}.latent_cache", ("blocks", "block_size", 1, size), dtype)
        self._states.append(cache)
        self._tensors[cache.name] = cache
        return cache

    # -- ops (their meaning: ops.py) -------------------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, *, start: int = 0) -> Tensor:
        return self._one("embed", ids, weight, start=start)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._one("linear", x, weight, bias)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return self._node("split", x, sizes=list(sizes))

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return self._one("rms_norm", x, weight, eps=eps)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, run: int
    ) -> Tensor:
        return self._one("layer_norm", x, weight, bias, eps=eps, run=run)

    def square_sum(self, x: Tensor) -> Tensor:
        return self._one("square_sum", x)

    def rms_norm_by(
        self, x: Tensor, square_sum: Tensor, weight: Tensor, *, eps: float, size: int
    ) -> Tensor:
        return self._one("rms_norm_by", x, square_sum, weight, eps=eps, size=size)

    def scale(self, x: Tensor, *, factor: float) -> Tensor:
        return self._one("scale", x, factor=factor)

    def soft_cap(self, x: Tensor, *, cap: float) -> Tensor:
        return self._one("soft_cap", x, cap=cap)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._one("add", x, y)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, ...]:
        return self._node("add_rms_norm", x, residual, weight, eps=eps)

    def rope_table(self, rope: RopeConfig) -> Tensor:
        step = (self.inputs[n] for n in ("positions", "query_starts", "prompt_lens"))
        fields = dataclasses.asdict(rope)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return self._one("rope_table", *step, rope=plain)

    def rope(self, x: Tensor, table: Tensor, *, head_dim: int) -> Tensor:
        return self._one("rope", x, table, head_dim=head_dim)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        caches: Sequence[Tensor],
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        step = (self.inputs[n] for n in ("query_starts", "kv_lens", "block_table"))
        return self._one(
            "attention", q, k, v, *caches, *step, head_dim=head_dim, scale=scale, window=window
        )

    def scored_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        caches: Sequence[Tensor],
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        slopes: Sequence[float] = (),
        sinks: Tensor | None = None,
    ) -> Tensor:
        return self._one(
            "scored_attention",
            *(q, k, v, *caches),
            *(self.inputs[n] for n in ("query_starts", "kv_lens", "block_table")),
            sinks,
            head_dim=head_dim,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            slopes=list(slopes),
        )

    def latent_attention(
        self,
        q: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cache: Tensor,
        *,
        scale: float,
    ) -> Tensor:
        step = (self.inputs[n] for n in ("query_starts", "kv_lens", "block_table"))
        return self._one("latent_attention", q, q_rope, latent, k_rope, cache, *step, scale=scale)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._one("head_linear", x, weight)

    def clamp(self, x: Tensor, *, limit: float) -> Tensor:
        return self._one("clamp", x, limit=limit)

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        correction: Tensor | None = None,
        *,
        top_k: int,
        score: str = "softmax",
        groups: int = 1,
        kept_groups: int = 1,
        group_top: int = 1,
        normalize: bool = False,
        scale: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """The ids and the weights of each token's experts."""
        return self._node(
            "route",
            *(x, weight, bias, correction),
            top_k=top_k,
            score=score,
            groups=groups,
            kept_groups=kept_groups,
            group_top=group_top,
            normalize=normalize,
            scale=scale,
        )

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        first: int = 0,
        activation: str = "silu",
        alpha: float = 1.0,
        limit: float | None = None,
    ) -> Tensor:
        return self._one(
            "experts",
            *(x, ids, weights, gate_up, down, gate_up_bias, down_bias),
            first=first,
            activation=activation,
            alpha=alpha,
            limit=limit,
        )

    def token_gate(self, x: Tensor, by: Tensor, weight: Tensor) -> Tensor:
        return self._one("token_gate", x, by, weight)

    def activation(self, x: Tensor, *, activation: str) -> Tensor:
        return self._one("activation", x, activation=activation)

    def gated_activation(self, gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
        return self._one("gated_activation", gate, up, activation=activation)

    def select_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return self._one("select_rows", x, rows)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._one("all_reduce", x, ranks=self.tensor_parallel)

    def all_gather(self, x: Tensor, *, size: int) -> Tensor:
        return self._one("all_gather", x, size=size, ranks=self.tensor_parallel)

    def send(self, x: Tensor, *, to: int) -> None:
        self._node("send", x, to=to)

    def recv(self, source: int, shape: Shape, dtype: str) -> Tensor:
        return self._one("recv", source=source, shape=list(shape), dtype=dtype)

    # --------------------------------------------------------------------------------------------

    def graph(self, outputs: Sequence[Tensor]) -> Graph:
        """The finished graph."""
        graph = Graph(
            tuple(self.inputs.values()),
            tuple(self._states),
            tuple(self._parameters.values()),
            tuple(self._nodes),
            tuple(t.name for t in outputs),
            dict(self._tensors),
        )
        graph.validate()
        return graph

    def _node(self, op: str, *inputs: Tensor | None, **attrs: Any) -> tuple[Tensor, ...]:
        number = len(self._nodes)
        signature = OPS[op].check(inputs, attrs)
        outputs = tuple(
            Tensor(f"%{number}" if len(signature) == 1 else f"%{number}.{index}", shape, dtype)
            for index, (shape, dtype) in enumerate(signature)
        )
        names = tuple("" if t is None else t.name for t in inputs)
        self._nodes.append(Node(op, names, tuple(t.name for t in outputs), attrs))
        self._tensors.update({t.name: t for t in outputs})
        return outputs

    def _one(self, op: str, *inputs: Tensor | None, **attrs: Any) -> Tensor:
        (output,) = self._node(op, *inputs, **attrs)
        return output
