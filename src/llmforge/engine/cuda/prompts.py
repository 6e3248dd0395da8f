"""Lowering of attention in steps with prompts to wide_attention.cu."""

from __future__ import annotations

from llmforge.engine.cuda.state import Lowering
from llmforge.kernels.attention import Cache
from llmforge.kernels.launch import Operand
from llmforge.kernels.wide_attention import (
    ITEM_INTS,
    AttentionPlan,
    list_items,
    wide_attention,
    wide_attention_plan,
)
from llmforge.model.graph import Node


def prompt_attention(low: Lowering, node: Node, q: Operand, cache: Cache) -> bool:
    """Lower an attention node, whose new keys and values are in the cache, to wide_attention.cu.
    False, and nothing done, where that is not wanted or does not take it."""
    heads = q.features // cache.head_dim
    plan = wide_attention_plan(q.dtype, heads, cache.kv_heads, cache.head_dim, cache.block_size)
    wanted = low.choice.prompts == "wide_attention" and low.shape.warpgroups
    if not wanted or low.shape.decode or plan is None or node.attrs.get("slopes"):
        return False
    if node.op == "scored_attention" and node.inputs[8]:  # sinks
        return False
    call = wide_attention(
        low.new(node.outputs[0]),
        q,
        cache,
        _items(low, cache, plan, node.attrs["window"]),
        plan,
        low.largest("tokens"),
        low.largest("blocks"),
        scale=node.attrs["scale"],
        window=node.attrs["window"],
        soft_cap=node.attrs.get("soft_cap"),
    )
    low.emit(call, node.outputs[0])
    return True


def _items(low: Lowering, cache: Cache, plan: AttentionPlan, window: int | None) -> Operand:
    """What there is to do in a step, listed once for all layers that have this plan and window."""
    most = plan.items(low.shape.tokens, low.shape.sequences)
    name = f"items.{plan.group}.{plan.keys}.{window or 0}"
    items = low.temporary(name, (1 + most, ITEM_INTS), "int32")
    low.emit_beside(list_items(items, cache, plan, window=window))
    return items
