"""The cpu target's attention against the op's plain meaning, over random paged layouts."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.comm import LocalComm
from llmforge.engine.cpu.attention import KEY_RUN, new_cache
from llmforge.engine.cpu.kernels import KERNELS, StepContext
from llmforge.model.reference import REFERENCE

HEAD_DIM = 8


@dataclass(frozen=True)
class Variant:
    op: str
    soft_cap: float | None = None
    slopes: bool = False
    sinks: bool = False


VARIANTS = [
    Variant("attention"),
    Variant("scored_attention", soft_cap=3.0),
    Variant("scored_attention", slopes=True),
    Variant("scored_attention", sinks=True),
    Variant("scored_attention", soft_cap=2.0, slopes=True, sinks=True),
]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def attributes(variant: Variant, heads: int, window: int | None) -> dict[str, object]:
    attrs = {"head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, "window": window}
    if variant.op == "attention":
        return attrs
    slopes = [2.0 ** -(head / 2 + 1) for head in range(heads)] if variant.slopes else []
    return {**attrs, "soft_cap": variant.soft_cap, "slopes": slopes}


def more_inputs(variant: Variant, heads: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """What scored_attention has besides the inputs of attention."""
    if variant.op == "attention":
        return []
    return [torch.linspace(-2, 3, heads).to(dtype) if variant.sinks else None]


def step_inputs(
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    block_size: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """A step over sequences of (new tokens, tokens before them). Blocks that no sequence has begun
    hold NaN, so that reading one shows; of the others what is not written is zero, as the step
    that began them left it."""
    total = [new + before for new, before in lengths]
    blocks = [-(-n // block_size) for n in total]
    ids = rng.permutation(sum(blocks) + 2)
    table = np.zeros((len(lengths), max(blocks)), np.int32)
    shape = (len(ids), block_size, kv_heads, HEAD_DIM)
    caches = [new_cache(shape, dtype) for _ in range(2)]
    for cache in caches:
        cache[:-1] = torch.nan
    for row, count in enumerate(blocks):
        table[row, :count], ids = ids[:count], ids[count:]
        for position in range(lengths[row][1]):
            block = table[row, position // block_size]
            if position % block_size == 0:
                for cache in caches:
                    cache[block] = 0
            for cache in caches:
                value = rng.standard_normal((kv_heads, HEAD_DIM))
                cache[block, position % block_size] = torch.from_numpy(value).to(dtype)
    tokens = sum(new for new, _ in lengths)

    def rows(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((tokens, count * HEAD_DIM))).to(dtype)

    starts = np.cumsum([0, *(new for new, _ in lengths)]).astype(np.int32)
    return [
        rows(heads),
        rows(kv_heads),
        rows(kv_heads),
        *caches,
        torch.from_numpy(starts),
        torch.tensor(total, dtype=torch.int32),
        torch.from_numpy(table),
    ]


SHORT = st.one_of(
    st.tuples(st.just(1), st.integers(0, 40)), st.tuples(st.integers(1, 20), st.integers(0, 20))
)
# Beyond one run of keys, and beyond one chunk of queries.
LONG = st.one_of(
    st.tuples(st.just(1), st.integers(KEY_RUN - 2, 3 * KEY_RUN)),
    st.tuples(st.integers(100, 300), st.integers(KEY_RUN - 150, KEY_RUN + 10)),
)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.one_of(
        st.lists(SHORT, min_size=1, max_size=5), st.lists(LONG, min_size=1, max_size=2)
    ),
    block_size=st.sampled_from([1, 4, 16]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    window=st.sampled_from([None, 1, 5, 16, KEY_RUN + 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    variant=st.sampled_from(VARIANTS),
)
def test_attention_is_the_ops_meaning(
    seed: int,
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    window: int | None,
    dtype: torch.dtype,
    variant: Variant,
) -> None:
    op, attrs = variant.op, attributes(variant, kv_heads * group, window)
    outputs = []
    for table in (REFERENCE, KERNELS):
        rng = np.random.default_rng(seed)
        inputs = step_inputs(rng, lengths, block_size, kv_heads * group, kv_heads, dtype)
        inputs += more_inputs(variant, kv_heads * group, dtype)
        context = StepContext(LocalComm(), LocalComm(), {})
        outputs.append((table[op](inputs, attrs, context)[0], inputs[3], inputs[4]))
    (expected, *expected_caches), (got, *got_caches) = outputs
    # The output, the weights and (in float32) a sum of at most 2000 of them are rounded; weights
    # sum to one and values are of order one, so each rounding is at most one unit of the largest.
    roundings = 3 + 2000**0.5 * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[dtype]
    tolerance = roundings * UNIT_ROUNDOFF[dtype] * expected.float().abs().max().clamp(min=1)
    assert (got.float() - expected.float()).abs().max() <= tolerance
    for a, b in zip(expected_caches, got_caches, strict=True):
        written = ~a.isnan()
        assert torch.equal(a[written], b[written])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(2, 1100),
    data=st.data(),
    window=st.sampled_from([None, 7, KEY_RUN + 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    variant=st.sampled_from(VARIANTS),
)
def test_a_query_attends_alike_to_the_bit_however_its_prompt_was_cut(
    seed: int,
    total: int,
    data: st.DataObject,
    window: int | None,
    dtype: torch.dtype,
    variant: Variant,
) -> None:
    """Prefilled whole, in two chunks, or by a last step of one token: the same bits."""
    group, block_size = 7, 16
    op, attrs = variant.op, attributes(variant, 2 * group, window)
    more = more_inputs(variant, 2 * group, dtype)
    rng = np.random.default_rng(seed)
    whole = step_inputs(rng, [(total, 0)], block_size, 2 * group, 2, dtype)
    expected = KERNELS[op]([*whole, *more], attrs, StepContext(LocalComm(), LocalComm(), {}))[0]
    cut = data.draw(st.one_of(st.just(total - 1), st.integers(1, total - 1)))
    caches = [new_cache((whole[3].shape[0] - 1, *whole[3].shape[1:]), dtype) for _ in range(2)]
    parts = []
    for start, stop in ((0, cut), (cut, total)):
        step = [
            *(x[start:stop] for x in whole[:3]),
            *caches,
            torch.tensor([0, stop - start], dtype=torch.int32),
            torch.tensor([stop], dtype=torch.int32),
            whole[7],
        ]
        context = StepContext(LocalComm(), LocalComm(), {})
        parts.append(KERNELS[op]([*step, *more], attrs, context)[0])
    assert torch.equal(torch.cat(parts), expected)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(2, 1100),
    cut=st.floats(0, 1),
    heads=st.sampled_from([1, 4, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_latent_attention_is_its_meaning_however_a_prompt_was_cut(
    seed: int, total: int, cut: float, heads: int, dtype: torch.dtype
) -> None:
    rank, dim, block_size = 24, 8, 16
    rng = np.random.default_rng(seed)
    rows = [
        torch.from_numpy(rng.standard_normal((total, size))).to(dtype)
        for size in (heads * rank, heads * dim, rank, dim)
    ]
    blocks = -(-total // block_size)
    table = torch.from_numpy(rng.permutation(blocks + 1)[None, :blocks].astype(np.int32))
    attrs = {"scale": (rank + dim) ** -0.5}
    middle = min(max(int(cut * total), 1), total - 1)

    def run(kernels: dict[str, Any], bounds: list[int]) -> torch.Tensor:
        cache = new_cache((blocks + 1, block_size, 1, rank + dim), dtype)
        cache[:-1] = torch.nan
        parts = []
        for start, stop in itertools.pairwise(bounds):
            step = [
                torch.tensor([0, stop - start], dtype=torch.int32),
                torch.tensor([stop], dtype=torch.int32),
                table,
            ]
            context = StepContext(LocalComm(), LocalComm(), {})
            inputs = [*(x[start:stop] for x in rows), cache, *step]
            parts += kernels["latent_attention"](inputs, attrs, context)
        return torch.cat(parts)

    got = run(KERNELS, [0, total])
    assert torch.equal(run(KERNELS, [0, middle, total]), got)
    assert torch.equal(run(KERNELS, [0, total - 1, total]), got)
    expected = run(REFERENCE, [0, total]).float()
    roundings = 3 + 1100**0.5 * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[dtype]
    tolerance = roundings * UNIT_ROUNDOFF[dtype] * expected.abs().max().clamp(min=1)
    assert (got.float() - expected).abs().max() <= tolerance
