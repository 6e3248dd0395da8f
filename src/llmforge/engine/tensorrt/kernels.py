"""The kernels of ours that run beside a rank's engines: which, on what, and their sizes."""

from __future__ import annotations

from llmforge.engine.tensorrt.io import PAST_LENS
from llmforge.engine.tensorrt.plan import CachePlan, RankPlan
from llmforge.kernels import launch as kernels
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.launch import Launch, Operand, Size
from llmforge.kernels.linear_cache import cache_write

# The sizes of a call that launches read: B, S, B * S, R, and the first of its slots.
SEQUENCES, NEW_TOKENS, TOKENS, ROWS, FIRST_SLOT = (
    "sequences", "new_tokens", "tokens", "rows", "first_slot",
)  # fmt: skip
SIZES = (SEQUENCES, NEW_TOKENS, TOKENS, ROWS, FIRST_SLOT)

# Buffers besides the plan's tensors.
DRAWN, LARGEST, HISTORY, SEEN, SAMPLING = (
    "sample.tokens", "sample.largest", "sample.history", "sample.seen", "sampling",
)  # fmt: skip


def cache_groups(plan: RankPlan) -> dict[str, list[CachePlan]]:
    """The caches that our kernel writes, those of one shape together, by the name of the buffer
    that holds their addresses."""
    groups: dict[str, list[CachePlan]] = {}
    for cache in () if plan.native_cache else plan.caches:
        groups.setdefault(f"caches.{cache.heads}x{cache.size}.{cache.dtype}", []).append(cache)
    return groups


def cache_launches(plan: RankPlan) -> list[Launch]:
    """The launches that write a call's keys and values into the caches."""
    return [
        cache_write(
            Operand(name, (2 * len(caches),), "int32", 1),
            Operand(PAST_LENS, (SEQUENCES,), "int32", 1),
            caches=len(caches),
            heads=caches[0].heads,
            size=caches[0].size,
            capacity=plan.capacity,
            dtype=caches[0].dtype,
            first_row=Size(FIRST_SLOT),
            tokens=Size(NEW_TOKENS),
        )
        for name, caches in cache_groups(plan).items()
    ]


def sample_launch(plan: RankPlan) -> Launch | None:
    """The launch that draws a token for each row of logits, on a rank that has them."""
    if plan.logits is None:
        return None
    logits = plan.tensors[plan.logits]
    vocab = logits.shape[-1]
    assert isinstance(vocab, int)
    scratch = {name: Operand(name, (1,), "int32", 1) for name in (DRAWN, HISTORY, SEEN, SAMPLING)}
    return kernels.sample(
        scratch[DRAWN],
        Operand(LARGEST, (1,), "float32", 1),
        Operand(logits.name, (ROWS, vocab), logits.dtype, vocab),
        scratch[SAMPLING],
        scratch[HISTORY],
        scratch[SEEN],
    )


def engine_kernels(plan: RankPlan) -> list[KernelSpec]:
    """Every kernel that running the plan may launch."""
    launches = [*cache_launches(plan), sample_launch(plan)]
    return list({launch.kernel.key: launch.kernel for launch in launches if launch}.values())
