"""The one config-driven decoder: ModelConfig and Topology in, one rank's Graph out."""

from __future__ import annotations

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import EMBEDDING, HEAD, layer_prefix, parameters
from llmforge.model.builder import GraphBuilder
from llmforge.model.graph import Graph, Shape, Tensor
from llmforge.parallel import Topology


def trace(config: ModelConfig, topology: Topology, rank: int) -> Graph:
    """The graph of `rank`: its stage's layers, its tensor-parallel share of each.

    Its output is the logits [rows, vocab_size], on every rank of the last stage and on rank 0.
    """
    return _Decoder(config, topology, rank).trace()


class _Decoder:
    def __init__(self, config: ModelConfig, topology: Topology, rank: int) -> None:
        self.config = config
        self.topology = topology
        self.rank = rank
        self.tensor_rank = topology.tensor_rank(rank)
        self.specs = parameters(config)
        self.builder = GraphBuilder()

    def trace(self) -> Graph:
        config, topology, g = self.config, self.topology, self.builder
        if topology.is_first_stage(self.rank):
            hidden = self._embed()
        else:
            hidden = g.recv(self._neighbour(-1), ("tokens", config.hidden_size), config.dtype)
        table = g.rope_table(config.rope)
        for layer in topology.layers(self.rank, config.num_layers):
            hidden = self._layer(hidden, table, layer)
        if topology.is_last_stage(self.rank):
            return g.graph([self._head(hidden)])
        g.send(hidden, to=self._neighbour(+1))
        return g.graph(self._logits_from_last_stage())

    # -- the parts of the network ----------------------------------------------------------------

    def _embed(self) -> Tensor:
        g, weight = self.builder, self._weight(EMBEDDING)
        local_size = weight.shape[0]
        assert isinstance(local_size, int)
        hidden = g.embed(g.inputs["token_ids"], weight, start=self.tensor_rank * local_size)
        return self._reduced(hidden)

    def _layer(self, x: Tensor, table: Tensor, layer: int) -> Tensor:
        g, prefix, eps = self.builder, layer_prefix(layer), self.config.norm_eps
        normed = g.rms_norm(x, self._weight(f"{prefix}attention_norm.weight"), eps=eps)
        x = g.add(x, self._attention(normed, table, layer))
        normed = g.rms_norm(x, self._weight(f"{prefix}mlp_norm.weight"), eps=eps)
        return g.add(x, self._mlp(normed, prefix))

    def _attention(self, x: Tensor, table: Tensor, layer: int) -> Tensor:
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        head_dim = config.head_dim
        q, k, v = (self._linear(x, prefix + name) for name in ("q", "k", "v"))
        kv_size = k.shape[-1]
        assert isinstance(kv_size, int)
        if config.qk_norm:
            q = g.rms_norm(q, self._weight(f"{prefix}q_norm.weight"), eps=config.norm_eps)
            k = g.rms_norm(k, self._weight(f"{prefix}k_norm.weight"), eps=config.norm_eps)
        q = g.rope(q, table, head_dim=head_dim)
        k = g.rope(k, table, head_dim=head_dim)
        attended = g.attention(
            q,
            k,
            v,
            g.kv_cache(layer, kv_size // head_dim, head_dim, config.dtype),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            window=config.sliding_window[layer],
        )
        return self._row_linear(attended, f"{prefix}o")

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate = self._linear(x, f"{prefix}mlp.gate")
        up = self._linear(x, f"{prefix}mlp.up")
        activated = self.builder.gated_activation(gate, up, activation=self.config.activation)
        return self._row_linear(activated, f"{prefix}mlp.down")

    def _head(self, hidden: Tensor) -> Tensor:
        g, config = self.builder, self.config
        hidden = g.select_rows(hidden, g.inputs["logit_rows"])
        hidden = g.rms_norm(hidden, self._weight("final_norm.weight"), eps=config.norm_eps)
        head = self._weight(EMBEDDING if config.tied_embeddings else HEAD)
        logits = g.linear(hidden, head)
        if self.topology.tensor_parallel > 1:
            logits = g.all_gather(logits, size=config.vocab_size)
        if self.topology.pipeline_parallel > 1 and self.tensor_rank == 0:
            g.send(logits, to=0)
        return logits

    def _logits_from_last_stage(self) -> list[Tensor]:
        if self.rank != 0:
            return []
        last = self.topology.rank(self.topology.pipeline_parallel - 1, 0)
        shape: Shape = ("rows", self.config.vocab_size)
        return [self.builder.recv(last, shape, self.config.dtype)]

    # -- layers that ranks share -----------------------------------------------------------------

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """Column parallel: each rank computes its own output features."""
        return self.builder.linear(x, self._weight(f"{name}.weight"), self._bias(name))

    def _row_linear(self, x: Tensor, name: str) -> Tensor:
        """Row parallel: each rank has its own input features; the sum over ranks is the output.
        The bias is added once, to the sum."""
        weight, bias = self._weight(f"{name}.weight"), self._bias(name)
        if self.topology.tensor_parallel == 1:
            return self.builder.linear(x, weight, bias)
        total = self.builder.all_reduce(self.builder.linear(x, weight))
        return total if bias is None else self.builder.add(total, bias)

    def _reduced(self, x: Tensor) -> Tensor:
        return self.builder.all_reduce(x) if self.topology.tensor_parallel > 1 else x

    def _bias(self, name: str) -> Tensor | None:
        bias = f"{name}.bias"
        return self._weight(bias) if bias in self.specs else None

    def _weight(self, name: str) -> Tensor:
        spec = self.specs[name]
        shape = spec.shard.local_shape(spec.shape, self.tensor_rank, self.topology.tensor_parallel)
        return self.builder.parameter(name, shape, self.config.dtype)

    def _neighbour(self, step: int) -> int:
        """The rank with this tensor rank, `step` stages on."""
        return self.topology.rank(self.topology.stage(self.rank) + step, self.tensor_rank)
