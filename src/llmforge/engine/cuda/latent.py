"""Lowering of latent attention."""

from __future__ import annotations

from llmforge.engine.cuda.program import HeadMatmul
from llmforge.engine.cuda.state import Lowering
from llmforge.kernels import latent as kernels
from llmforge.kernels.latent import LatentCache
from llmforge.model.graph import Node


def latent_attention(low: Lowering, node: Node) -> None:
    q, q_rope, latent, k_rope, latents, query_starts, kv_lens, block_table = (
        low.operand(name) for name in node.inputs
    )
    cache = LatentCache(
        latents,
        query_starts,
        kv_lens,
        block_table,
        rank=latent.features,
        dim=k_rope.features,
        block_size=low.limits.block_size,
        table_stride=low.layout.table_stride,
    )
    low.emit(kernels.store_latents(cache, latent, k_rope, low.operand("positions")))
    out = low.new(node.outputs[0])
    low.emit(kernels.latent_attention(out, q, q_rope, cache, **node.attrs), node.outputs[0])


def head_linear(low: Lowering, node: Node) -> None:
    x, weight = (low.operand(name) for name in node.inputs)
    low.emit(HeadMatmul(x, weight, low.new(node.outputs[0])), node.outputs[0])
