"""The one config-driven decoder: ModelConfig and Topology in, one rank's Graph out."""

from __future__ import annotations

from llmforge.checkpoint.config import ModelConfig, MoeConfig, RopeConfig
from llmforge.checkpoint.params import (
    EMBEDDING,
    EMBEDDING_NORM,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    layer_prefix,
    parameters,
)
from llmforge.model.builder import GraphBuilder
from llmforge.model.graph import Graph, Shape, Tensor
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
        self.rank = rank
        self.tensor_rank = topology.tensor_rank(rank)
        self.specs = parameters(config)
        self.builder = GraphBuilder(topology.tensor_parallel)
        self.tables: dict[RopeConfig, Tensor] = {}

    def trace(self) -> Graph:
        config, topology, g = self.config, self.topology, self.builder
        if topology.is_first_stage(self.rank):
            hidden = self._embed()
        else:
            hidden = g.recv(self._neighbour(-1), ("tokens", config.hidden_size), config.dtype)
        layers = topology.layers(self.rank, config.num_layers)
        for rope in dict.fromkeys(map(config.layer_rope, layers)):
            if rope is not None:
                self.tables[rope] = g.rope_table(rope)
        for layer in layers:
            hidden = self._layer(hidden, layer)
        if topology.is_last_stage(self.rank):
            return g.graph([self._head(hidden)])
        g.send(hidden, to=self._neighbour(+1))
        return g.graph(self._logits_from_last_stage())

    # -- the parts of the network ----------------------------------------------------------------

    def _embed(self) -> Tensor:
        g, config, weight = self.builder, self.config, self._weight(EMBEDDING)
        local_size = weight.shape[0]
        assert isinstance(local_size, int)
        hidden = g.embed(g.inputs["token_ids"], weight, start=self.tensor_rank * local_size)
        if self.topology.tensor_parallel > 1:
            hidden = g.all_reduce(hidden)
        hidden = self._scaled(hidden, _rounded(config.embedding_scale, config.dtype))
        if config.learned_positions:
            hidden = g.add(hidden, g.embed(g.inputs["positions"], self._weight(POSITIONS)))
        return self._norm(hidden, EMBEDDING_NORM) if config.embedding_norm else hidden

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        g, config, prefix = self.builder, self.config, layer_prefix(layer)
        normed = self._norm(x, f"{prefix}attention_norm") if config.pre_norm else x
        attention = self._attention if config.latent is None else self._latent_attention
        attended = self._branch(attention(normed, layer), f"{prefix}attention_post_norm")
        total = g.add(x, attended)
        read = x if config.parallel_block else total  # what the MLP reads
        if config.shared_norm:
            read = normed
        elif config.pre_norm:
            read = self._norm(read, f"{prefix}mlp_norm")
        return g.add(total, self._branch(self._feed_forward(read, layer), f"{prefix}mlp_post_norm"))

    def _branch(self, x: Tensor, norm: str) -> Tensor:
        """What attention or MLP gives, as it is added to the residual."""
        return self._scaled(
            self._norm(x, norm) if self.config.post_norm else x, self.config.residual_scale
        )

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        head_dim = config.head_dim
        q, k, v = (self._linear(x, prefix + name) for name in ("q", "k", "v"))
        kv_size = k.shape[-1]
        assert isinstance(kv_size, int)
        if config.qk_norm:
            q, k = self._qk_norm(q, f"{prefix}q_norm"), self._qk_norm(k, f"{prefix}k_norm")
        if (limit := config.qkv_clamp) is not None:
            q, k, v = (g.clamp(t, limit=limit) for t in (q, k, v))
        if rope := config.layer_rope(layer):
            q, k = (g.rope(t, self.tables[rope], head_dim=head_dim) for t in (q, k))
        caches = g.kv_cache(layer, kv_size // head_dim, head_dim, config.dtype)
        scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        window, cap, slopes = config.sliding_window[layer], config.attention_softcap, self._slopes()
        sinks = self._weight(f"{prefix}sinks") if config.attention_sinks else None
        if cap is None and not slopes and sinks is None:
            attended = g.attention(q, k, v, caches, head_dim=head_dim, scale=scale, window=window)
        else:
            attended = g.scored_attention(
                *(q, k, v, caches),
                head_dim=head_dim,
                scale=scale,
                window=window,
                soft_cap=cap,
                slopes=slopes,
                sinks=sinks,
            )
        return self._row_linear(attended, f"{prefix}o")

    def _latent_attention(self, x: Tensor, layer: int) -> Tensor:
        """The products by which keys and values are made of the latents stand on the other side:
        before the scores on the queries, behind the weighted sum on the result."""
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        sizes = config.latent
        assert sizes is not None

        def normed(t: Tensor, name: str) -> Tensor:
            return g.rms_norm(t, self._weight(f"{prefix}{name}.weight"), eps=sizes.norm_eps)

        source = x
        if sizes.q_rank is not None:
            source = normed(self._linear(x, f"{prefix}q_a"), "q_a_norm")
        q, q_rope = (self._linear(source, prefix + name) for name in ("q", "q_rope"))
        latent, k_rope = (self._linear(x, prefix + name) for name in ("latent", "k_rope"))
        if rope := config.layer_rope(layer):
            q_rope, k_rope = (
                g.rope(t, self.tables[rope], head_dim=sizes.rope_dim) for t in (q_rope, k_rope)
            )
        cache = g.latent_cache(layer, sizes.kv_rank + sizes.rope_dim, config.dtype)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        attended = g.latent_attention(
            g.head_linear(q, self._weight(f"{prefix}k_up")),
            q_rope,
            normed(latent, "latent_norm"),
            k_rope,
            cache,
            scale=scale,
        )
        values = g.head_linear(attended, self._weight(f"{prefix}v_up"))
        return self._row_linear(values, f"{prefix}o")

    def _slopes(self) -> tuple[float, ...]:
        """The ALiBi slopes of this rank's query heads."""
        local = len(self.config.alibi_slopes) // self.topology.tensor_parallel
        return self.config.alibi_slopes[self.tensor_rank * local :][:local]

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        """The MLP of a layer, or its mixture of experts."""
        prefix = layer_prefix(layer)
        if (moe := self.config.layer_moe(layer)) is None:
            return self._row_linear(self._activated(x, f"{prefix}mlp."), f"{prefix}mlp.down")
        return self._moe(x, moe, f"{prefix}moe.")

    def _activated(self, x: Tensor, prefix: str) -> Tensor:
        """What the last product of an MLP reads."""
        g, activation = self.builder, self.config.activation
        if not self.config.gated_mlp:
            return g.activation(self._linear(x, f"{prefix}up"), activation=activation)
        gate, up = self._linear(x, f"{prefix}gate"), self._linear(x, f"{prefix}up")
        return g.gated_activation(gate, up, activation=activation)

    def _moe(self, x: Tensor, moe: MoeConfig, prefix: str) -> Tensor:
        """This rank's share of the chosen experts and of the shared one, summed over ranks."""
        g, config, topology = self.builder, self.config, self.topology
        correction = self._weight(f"{prefix}router.correction") if moe.correction else None
        ids, weights = g.route(
            x,
            self._weight(f"{prefix}router.weight"),
            self._bias(f"{prefix}router"),
            correction,
            top_k=moe.top_k,
            score=moe.score,
            groups=moe.groups,
            kept_groups=moe.kept_groups,
            group_top=moe.group_top,
            normalize=moe.normalize,
            scale=moe.scale,
        )
        group, index = divmod(
            self.tensor_rank, topology.tensor_parallel // topology.expert_parallel
        )
        # The ranks of a group sum parts of the same experts: one of them adds the bias.
        down_bias = self._bias(f"{prefix}experts.down") if index == 0 else None
        total = g.experts(
            x,
            ids,
            weights,
            self._weight(f"{prefix}experts.gate_up.weight"),
            self._weight(f"{prefix}experts.down.weight"),
            self._bias(f"{prefix}experts.gate_up"),
            down_bias,
            first=group * (moe.num_experts // topology.expert_parallel),
            activation=config.activation,
            alpha=moe.alpha,
            limit=moe.limit,
        )
        if moe.shared_size:
            down = self._weight(f"{prefix}shared.down.weight")
            shared = g.linear(self._activated(x, f"{prefix}shared."), down)
            if moe.shared_gate:
                shared = g.token_gate(shared, x, self._weight(f"{prefix}shared_gate.weight"))
            total = g.add(total, shared)
        return g.all_reduce(total) if topology.tensor_parallel > 1 else total

    def _head(self, hidden: Tensor) -> Tensor:
        g, config = self.builder, self.config
        hidden = g.select_rows(hidden, g.inputs["logit_rows"])
        hidden = self._norm(hidden, FINAL_NORM)
        weight = self._weight(EMBEDDING if config.tied_embeddings else f"{HEAD}.weight")
        logits = self._scaled(g.linear(hidden, weight, self._bias(HEAD)), config.logit_scale)
        if config.logit_softcap is not None:
            logits = g.soft_cap(logits, cap=config.logit_softcap)
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

    # -- norms and scales ------------------------------------------------------------------------

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """The norm `name` of the residual or of a branch: whole on every rank."""
        g, config, weight = self.builder, self.config, self._weight(f"{name}.weight")
        if config.norm == "rms":
            return g.rms_norm(x, weight, eps=config.norm_eps)
        run = config.hidden_size
        return g.layer_norm(x, weight, self._bias(name), eps=config.norm_eps, run=run)

    def _qk_norm(self, x: Tensor, name: str) -> Tensor:
        """The norm of this rank's heads of q or k."""
        g, config, weight = self.builder, self.config, self._weight(f"{name}.weight")
        eps, ranks = config.norm_eps, self.topology.tensor_parallel
        if config.norm == "layer":
            return g.layer_norm(x, weight, self._bias(name), eps=eps, run=config.head_dim)
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

    def _bias(self, name: str) -> Tensor | None:
        bias = f"{name}.bias"
        return self._weight(bias) if bias in self.specs else None

    def _weight(self, name: str) -> Tensor:
        spec = self.specs[name]
        ranks, groups = self.topology.tensor_parallel, self.topology.expert_parallel
        shape = spec.shard.local_shape(spec.shape, self.tensor_rank, ranks, groups)
        return self.builder.parameter(name, shape, spec.stored_as(self.config))

    def _neighbour(self, step: int) -> int:
        """The rank with this tensor rank, `step` stages on."""
        return self.topology.rank(self.topology.stage(self.rank) + step, self.tensor_rank)


def _rounded(value: float, dtype: str) -> float:
    return float(NUMPY_DTYPES[dtype].type(value))
