"""The kernels of ours that run beside a rank's engines: which, on what, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping

from llmforge.engine.tensorrt.calls import decode_batches
from llmforge.engine.tensorrt.io import PAST_LENS, PREFILL, Profile
from llmforge.engine.tensorrt.plan import CachePlan, RankPlan, Step
from llmforge.kernels import collectives
from llmforge.kernels.collectives import Collective
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.launch import Launch, Operand, Size
from llmforge.kernels.linear_cache import cache_write
from llmforge.kernels.sampling import SampleScratch, sample

# The sizes of a call that launches read: B, S, B * S, R, and the first of its slots.
SEQUENCES, NEW_TOKENS, TOKENS, ROWS, FIRST_SLOT = (
    "sequences", "new_tokens", "tokens", "rows", "first_slot",
)  # fmt: skip
SIZES = (SEQUENCES, NEW_TOKENS, TOKENS, ROWS, FIRST_SLOT)

# Buffers besides the plan's tensors.
DRAWN, LARGEST, HISTORY, SEEN, BESTS, ARRIVED, SAMPLING = (
    "sample.tokens", "sample.largest", "sample.history", "sample.seen", "sample.bests",
    "sample.arrived", "sampling",
)  # fmt: skip


def largest(profile: Profile) -> dict[str, int]:
    """The largest sizes of a graph's symbolic dimensions in calls of a profile."""
    return {"tokens": profile.B[2] * profile.S[2], "rows": profile.R[2]}


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
    drawn, history, seen, bests, arrived, params = (
        Operand(name, (1,), "int32", 1) for name in (DRAWN, HISTORY, SEEN, BESTS, ARRIVED, SAMPLING)
    )
    return sample(
        drawn,
        Operand(LARGEST, (1,), "float32", 1),
        Operand(logits.name, (ROWS, vocab), logits.dtype, vocab),
        params,
        history,
        SampleScratch(seen, bests, arrived),
    )


def exchange(plan: RankPlan, step: Step, most: Mapping[str, int]) -> Collective:
    """How a step in which ranks meet is launched. `most`: the largest "tokens" and "rows" of
    the calls that it is for, the same on all ranks."""

    def operand(name: str) -> Operand:
        tensor = plan.tensors[name]
        features = tensor.shape[-1]
        assert isinstance(features, int) and len(tensor.shape) == 2
        return Operand(name, tensor.shape, tensor.dtype, features)

    rows = most[str(plan.tensors[step.x or step.out].shape[0])]
    if step.kind == "send":
        return collectives.send(operand(step.x), rows)
    if step.kind == "recv":
        return collectives.receive(operand(step.out), rows)
    x, out = operand(step.x), operand(step.out)
    group = collectives.Group(step.ranks, direct=True, rows=rows)
    if step.kind == "all_reduce":
        return collectives.all_reduce(out, x, group)
    assert step.kind == "all_gather", step
    return collectives.all_gather(out, x, group)


def engine_kernels(plan: RankPlan) -> list[KernelSpec]:
    """Every kernel that running the plan may launch."""
    launches = [*cache_launches(plan), sample_launch(plan)]
    decode_sizes = decode_batches(plan.slots)
    kinds = [largest(plan.profiles[PREFILL]), *({"tokens": n, "rows": n} for n in decode_sizes)]
    for step in plan.steps:
        if step.kind != "engine":
            launches += [exchange(plan, step, sizes).launch for sizes in kinds]
    return list({launch.kernel.key: launch.kernel for launch in launches if launch}.values())
