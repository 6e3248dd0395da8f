"""The one config-driven decoder: ModelConfig and Topology in, one rank's Graph out."""

from __future__ import annotations

from llmforge.checkpoint.config import ModelConfig, MoeConfig, RopeConfig
from llmforge.checkpoint.params import (
    EMBEDDING,
    EMBEDDING_NORM,
    EMBEDDING_PROJECTION,
    FINAL_NORM,
    HEAD,
    HEAD_PROJECTION,
    POSITIONS,
    layer_prefix,
    parameters,
)
from llmforge.model.graph import Graph, Tensor
from llmforge.model.rank import RankBuilder, Share
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
        if config.embedding_size:
            hidden = g.linear(hidden, g.weight(EMBEDDING_PROJECTION))
        if config.learned_positions:
            hidden = g.add(hidden, g.embed(g.inputs["positions"], g.weight(POSITIONS)))
        return self._norm(hidden, EMBEDDING_NORM) if config.embedding_norm else hidden

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        g, config, prefix = self.builder, self.config, layer_prefix(layer)
        normed = self._norm(x, f"{prefix}attention_norm") if config.pre_norm else x
        attention = self._attention if config.latent is None else self._latent_attention
        attended = attention(normed, layer)
        if config.sum_norm:
            total = g.add(x, self._branch(attended, f"{prefix}attention_post_norm"))
            total = self._norm(total, f"{prefix}attention_norm")
            given = self._branch(self._feed_forward(total, layer), f"{prefix}mlp_post_norm")
            return self._norm(g.add(total, given), f"{prefix}mlp_norm")
        if config.parallel_block and not config.post_norm and self.topology.tensor_parallel > 1:
            # Nothing stands between the two branches and their sum: ranks meet once for both.
            read = normed if config.shared_norm else self._norm(x, f"{prefix}mlp_norm")
            both = g.total(attended, self._feed_forward(read, layer))
            return g.add(x, self._scaled(both, config.residual_scale))
        total = g.add(x, self._branch(attended, f"{prefix}attention_post_norm"))
        read = x if config.parallel_block else total  # what the MLP reads
        if config.shared_norm:
            read = normed
        elif config.pre_norm:
            read = self._norm(read, f"{prefix}mlp_norm")
        return g.add(total, self._branch(self._feed_forward(read, layer), f"{prefix}mlp_post_norm"))

    def _branch(self, share: Share, norm: str) -> Tensor:
        """What attention or MLP gives, as it is added to the residual."""
        x = self.builder.total(share)
        return self._scaled(
            self._norm(x, norm) if self.config.post_norm else x, self.config.residual_scale
        )

    def _attention(self, x: Tensor, layer: int) -> Share:
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        head_dim = config.head_dim
        q, k, v = (g.column_linear(x, prefix + name) for name in ("q", "k", "v"))
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
        sinks = g.weight(f"{prefix}sinks") if config.attention_sinks else None
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
        return g.row_linear(attended, f"{prefix}o")

    def _latent_attention(self, x: Tensor, layer: int) -> Share:
        """The products by which keys and values are made of the latents stand on the other side:
        before the scores on the queries, behind the weighted sum on the result."""
        g, config, prefix = self.builder, self.config, f"{layer_prefix(layer)}attention."
        sizes = config.latent
        assert sizes is not None

        def normed(t: Tensor, name: str) -> Tensor:
            return g.rms_norm(t, g.weight(f"{prefix}{name}.weight"), eps=sizes.norm_eps)

        source = x
        if sizes.q_rank is not None:
            source = normed(g.column_linear(x, f"{prefix}q_a"), "q_a_norm")
        q, q_rope = (g.column_linear(source, prefix + name) for name in ("q", "q_rope"))
        latent, k_rope = (g.column_linear(x, prefix + name) for name in ("latent", "k_rope"))
        if rope := config.layer_rope(layer):
            q_rope, k_rope = (
                g.rope(t, self.tables[rope], head_dim=sizes.rope_dim) for t in (q_rope, k_rope)
            )
        cache = g.latent_cache(layer, sizes.kv_rank + sizes.rope_dim, config.dtype)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        attended = g.latent_attention(
            g.head_linear(q, g.weight(f"{prefix}k_up")),
            q_rope,
            normed(latent, "latent_norm"),
            k_rope,
            cache,
            scale=scale,
        )
        values = g.head_linear(attended, g.weight(f"{prefix}v_up"))
        return g.row_linear(values, f"{prefix}o")

    def _slopes(self) -> tuple[float, ...]:
        """The ALiBi slopes of this rank's query heads."""
        local = len(self.config.alibi_slopes) // self.topology.tensor_parallel
        return self.config.alibi_slopes[self.builder.tensor_rank * local :][:local]

    def _feed_forward(self, x: Tensor, layer: int) -> Share:
        """The MLP of a layer, or its mixture of experts."""
        g, prefix = self.builder, layer_prefix(layer)
        if (moe := self.config.layer_moe(layer)) is None:
            return g.row_linear(self._activated(x, f"{prefix}mlp."), f"{prefix}mlp.down")
        return self._moe(x, moe, f"{prefix}moe.")

    def _activated(self, x: Tensor, prefix: str) -> Tensor:
        """What the last product of an MLP reads."""
        g, activation = self.builder, self.config.activation
        if not self.config.gated_mlp:
            return g.activation(g.column_linear(x, f"{prefix}up"), activation=activation)
        gate, up = g.column_linear(x, f"{prefix}gate"), g.column_linear(x, f"{prefix}up")
        return g.gated_activation(gate, up, activation=activation)

    def _moe(self, x: Tensor, moe: MoeConfig, prefix: str) -> Share:
        """This rank's share of the chosen experts and of the shared one."""
        g, config, topology = self.builder, self.config, self.topology
        correction = g.weight(f"{prefix}router.correction") if moe.correction else None
        ids, weights = g.route(
            x,
            g.weight(f"{prefix}router.weight"),
            g.bias(f"{prefix}router"),
            correction,
            top_k=moe.top_k,
            score=moe.score,
            groups=moe.groups,
            kept_groups=moe.kept_groups,
            group_top=moe.group_top,
            normalize=moe.normalize,
            scale=moe.scale,
        )
        group, index = divmod(g.tensor_rank, topology.tensor_parallel // topology.expert_parallel)
        # The ranks of a group sum parts of the same experts: one of them adds the bias.
        down_bias = g.bias(f"{prefix}experts.down") if index == 0 else None
        total = g.experts(
            x,
            ids,
            weights,
            g.weight(f"{prefix}experts.gate_up.weight"),
            g.weight(f"{prefix}experts.down.weight"),
            g.bias(f"{prefix}experts.gate_up"),
            down_bias,
            first=group * (moe.num_experts // topology.expert_parallel),
            activation=config.activation,
            alpha=moe.alpha,
            limit=moe.limit,
        )
        if moe.shared_size:
            down = g.weight(f"{prefix}shared.down.weight")
            shared = g.linear(self._activated(x, f"{prefix}shared."), down)
            if moe.shared_gate:
                shared = g.token_gate(shared, x, g.weight(f"{prefix}shared_gate.weight"))
            total = g.add(total, shared)
        return Share(total)

    def _head(self, hidden: Tensor) -> Tensor:
        """The logits of the rank's share of the vocabulary."""
        g, config = self.builder, self.config
        hidden = g.select_rows(hidden, g.inputs["logit_rows"])
        if config.final_norm:
            hidden = self._norm(hidden, FINAL_NORM)
        if config.embedding_size:
            hidden = g.linear(hidden, g.weight(HEAD_PROJECTION))
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
