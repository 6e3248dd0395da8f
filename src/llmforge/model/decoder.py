"""The one config-driven decoder: ModelConfig and Topology in, one rank's Graph out."""

from __future__ import annotations

from llmforge.checkpoint.config import ModelConfig, RopeConfig
from llmforge.checkpoint.params import (
    EMBEDDING,
    EMBEDDING_NORM,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    layer_prefix,
    parameters,
)
from llmforge.model.graph import Graph, Tensor
from llmforge.model.rank import RankBuilder
from llmforge.parallel import Topology
from llmforge.safetensors_io import NUMPY_DTYPES


def trace(config: ModelConfig, topology: Topology, rank: int) -> Graph:
    """The graph of `rank`: its stage's layers, its tensor-parallel share of each.

    Its output is the logits [rows, vocab_size], on every rank of the last stage and on rank 0.
    """
    return _Decoder(config, topology, rank).trace()


class _Decoder:
    def __init__(self, config: ModelConfig, topology: Topology, rank: int) -> None:
        self.config = config
        self.topology = topology
        self.builder = RankBuilder(config, topology, rank, parameters(config))
        self.tables: dict[RopeConfig, Tensor] = {}

    def trace(self) -> Graph:
        config, g = self.config, self.builder
        hidden = self._embed() if g.is_first_stage else g.receive_hidden()
        for rope in dict.fromkeys(map(config.layer_rope, g.layers)):
            if rope is not None:
                self.tables[rope] = g.rope_table(rope)
        for layer in g.layers:
            hidden = self._layer(hidden, layer)
        return g.finish(self._head(hidden)) if g.is_last_stage else g.send_hidden(hidden)

    # -- the parts of the network ----------------------------------------------------------------

    def _embed(self) -> Tensor:
        g, config = self.builder, self.config
        hidden = g.embed_tokens(EMBEDDING)
        hidden = self._scaled(hidden, _rounded(config.embedding_scale, config.dtype))
        if config.learned_positions:
            hidden = g.add(hidden, g.embed(g.inputs["positions"], g.weight(POSITIONS)))
        return self._norm(hidden, EMBEDDING_NORM) if config.embedding_norm else hidden

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        g, config, prefix = self.builder, self.config, layer_prefix(layer)
        o, down = f"{prefix}attention.o", f"{prefix}mlp.down"
        normed = self._norm(x, f"{prefix}attention_norm") if config.pre_norm else x
        attended = self._attention(normed, layer)
        if config.parallel_block and not config.post_norm and self.topology.tensor_parallel > 1:
            # Nothing stands between the two branches and their sum: ranks meet once for both.
            read = normed if config.shared_norm else self._norm(x, f"{prefix}mlp_norm")
            both = g.row_linear((attended, o), (self._mlp(read, f"{prefix}mlp."), down))
            return g.add(x, self._scaled(both, config.residual_scale))
        total = g.add(x, self._branch(g.row_linear((attended, o)), f"{prefix}attention_post_norm"))
        read = x if config.parallel_block else total  # what the MLP reads
        if config.shared_norm:
            read = normed
        elif config.pre_norm:
            read = self._norm(read, f"{prefix}mlp_norm")
        given = g.row_linear((self._mlp(read, f"{prefix}mlp."), down))
        return g.add(total, self._branch(given, f"{prefix}mlp_post_norm"))

    def _branch(self, x: Tensor, norm: str) -> Tensor:
        """What attention or MLP gives, as it is added to the residual."""
        return self._scaled(
            self._norm(x, norm) if self.config.post_norm else x, self.config.residual_scale
        )

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        """What the rank's heads attend to, before the output projection."""
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        head_dim = config.head_dim
        q, k, v = (g.column_linear(x, prefix + name) for name in ("q", "k", "v"))
        kv_size = k.shape[-1]
        assert isinstance(kv_size, int)
        if config.qk_norm:
            q, k = self._qk_norm(q, f"{prefix}q_norm"), self._qk_norm(k, f"{prefix}k_norm")
        if rope := config.layer_rope(layer):
            q, k = (g.rope(t, self.tables[rope], head_dim=head_dim) for t in (q, k))
        caches = g.kv_cache(layer, kv_size // head_dim, head_dim, config.dtype)
        scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        window, cap, slopes = config.sliding_window[layer], config.attention_softcap, self._slopes()
        if cap is None and not slopes:
            return g.attention(q, k, v, caches, head_dim=head_dim, scale=scale, window=window)
        return g.scored_attention(
            *(q, k, v, caches),
            head_dim=head_dim,
            scale=scale,
            window=window,
            soft_cap=cap,
            slopes=slopes,
        )

    def _slopes(self) -> tuple[float, ...]:
        """The ALiBi slopes of this rank's query heads."""
        local = len(self.config.alibi_slopes) // self.topology.tensor_parallel
        return self.config.alibi_slopes[self.builder.tensor_rank * local :][:local]

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        """The rank's share of the hidden layer, before the down projection."""
        g, activation = self.builder, self.config.activation
        if not self.config.gated_mlp:
            return g.activation(g.column_linear(x, f"{prefix}up"), activation=activation)
        gate, up = g.column_linear(x, f"{prefix}gate"), g.column_linear(x, f"{prefix}up")
        return g.gated_activation(gate, up, activation=activation)

    def _head(self, hidden: Tensor) -> Tensor:
        """The logits of the rank's share of the vocabulary."""
        g, config = self.builder, self.config
        hidden = g.select_rows(hidden, g.inputs["logit_rows"])
        hidden = self._norm(hidden, FINAL_NORM)
        weight = g.weight(EMBEDDING if config.tied_embeddings else f"{HEAD}.weight")
        logits = self._scaled(g.linear(hidden, weight, g.bias(HEAD)), config.logit_scale)
        if config.logit_softcap is not None:
            logits = g.soft_cap(logits, cap=config.logit_softcap)
        return logits

    # -- norms and scales ------------------------------------------------------------------------

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """The norm `name` of the residual or of a branch: whole on every rank."""
        g, config, weight = self.builder, self.config, self.builder.weight(f"{name}.weight")
        if config.norm == "rms":
            return g.rms_norm(x, weight, eps=config.norm_eps)
        run = config.hidden_size
        return g.layer_norm(x, weight, g.bias(name), eps=config.norm_eps, run=run)

    def _qk_norm(self, x: Tensor, name: str) -> Tensor:
        """The norm of this rank's heads of q or k."""
        g, config, weight = self.builder, self.config, self.builder.weight(f"{name}.weight")
        eps, ranks = config.norm_eps, self.topology.tensor_parallel
        if config.norm == "layer":
            return g.layer_norm(x, weight, g.bias(name), eps=eps, run=config.head_dim)
        if config.qk_norm_span == "head" or ranks == 1:
            return g.rms_norm(x, weight, eps=eps)
        # The heads of all ranks are normed as one. Where ranks hold copies of a kv head, every
        # head has as many copies, so that they leave the mean as it is.
        features = x.shape[-1]
        assert isinstance(features, int)
        total = g.all_reduce(g.square_sum(x))
        return g.rms_norm_by(x, total, weight, eps=eps, size=features * ranks)

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        return x if factor == 1 else self.builder.scale(x, factor=factor)


def _rounded(value: float, dtype: str) -> float:
    return float(NUMPY_DTYPES[dtype].type(value))
