"""Lowering of a decode step's attention with what precedes it to one kernel."""

from __future__ import annotations

from llmforge.engine.cuda.state import DIVISION, Lowering
from llmforge.kernels.attention import Cache, QkvSteps
from llmforge.kernels.decode_attention import (
    LEAST_ROOM,
    MAX_BLOCKS,
    DecodePlan,
    PartScratch,
    decode_attention,
    decode_plan,
    divide_keys,
    part_size,
)
from llmforge.kernels.launch import Operand
from llmforge.model.graph import Node

_ROOM = 227 << 10  # shared memory of a multiprocessor that is fit for the rings of bulk copies


def fused_attention(
    low: Lowering,
    node: Node,
    matrices: tuple[Operand, Operand, Operand],
    cache: Cache,
    steps: QkvSteps,
) -> bool:
    """Lower an attention node and what makes its inputs of the `matrices` q, k and v to
    decode_attention.cu. False, and nothing done, where that is not wanted or does not take it."""
    q, k, v = matrices
    shape = q.features // cache.head_dim, cache.kv_heads, cache.head_dim
    rope_dim = steps.table.features if steps.table else 0
    room = _ROOM if low.shape.bulk_copies else LEAST_ROOM
    tuning = low.choice.decode
    plan = decode_plan(q.dtype, *shape, rope_dim, low.shape.sequences, tuning, room)
    wanted = low.choice.attention == "fused" and low.shape.decode
    if not wanted or plan is None or node.attrs.get("slopes"):
        return False
    partial = low.temporary(
        f"{node.outputs[0]}.parts", (2 * MAX_BLOCKS, part_size(*shape)), "float32"
    )
    # What products count with, and have back at zero.
    scratch = PartScratch(partial, Operand("scratch.arrived", (1,), "int32", 1))
    call = decode_attention(
        low.new(node.outputs[0]),
        q,
        k,
        v,
        cache,
        _division(low, cache, plan, node.attrs["window"]),
        scratch,
        plan,
        steps,
        scale=node.attrs["scale"],
        window=node.attrs["window"],
        soft_cap=node.attrs.get("soft_cap"),
        sinks=low.optional(node.inputs[8]) if node.op == "scored_attention" else None,
    )
    low.emit(call, node.outputs[0])
    return True


def _division(low: Lowering, cache: Cache, plan: DecodePlan, window: int | None) -> Operand:
    """How the step's keys are divided for a plan and window, once for all layers that have them: by
    kernels that run beside the program's first, and have ended before any that reads it starts."""
    name = f"{DIVISION}{plan.warps}x{plan.blocks}.{cache.kv_heads}.{window or 0}"
    division = Operand(name, (MAX_BLOCKS, plan.block_ints), "int32", plan.block_ints)
    low.emit_beside(divide_keys(division, cache, plan, window=window))
    return division
