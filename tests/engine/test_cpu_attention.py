"""The cpu target's attention against the op's plain meaning, over random paged layouts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.comm import LocalComm
from llmforge.engine.cpu.kernels import KERNELS, StepContext
from llmforge.model.reference import REFERENCE

HEAD_DIM = 8
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def step_inputs(
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    block_size: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """A step over sequences of (new tokens, tokens before them). Slots that belong to nobody hold
    NaN, so that reading one shows."""
    total = [new + before for new, before in lengths]
    blocks = [-(-n // block_size) for n in total]
    ids = rng.permutation(sum(blocks) + 2)
    table = np.zeros((len(lengths), max(blocks)), np.int32)
    shape = (len(ids), block_size, kv_heads, HEAD_DIM)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    for row, count in enumerate(blocks):
        table[row, :count], ids = ids[:count], ids[count:]
        new, before = lengths[row]
        for position in range(before):
            block = table[row, position // block_size]
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


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(
        st.one_of(
            st.tuples(st.just(1), st.integers(0, 40)), st.tuples(st.integers(1, 20), st.integers(0, 20))
        ),
        min_size=1,
        max_size=5,
    ),
    block_size=st.sampled_from([1, 4, 16]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    window=st.sampled_from([None, 1, 5, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_is_the_ops_meaning(
    seed: int,
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    attrs = {"head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, "window": window}
    outputs = []
    for table in (REFERENCE, KERNELS):
        rng = np.random.default_rng(seed)
        inputs = step_inputs(rng, lengths, block_size, kv_heads * group, kv_heads, dtype)
        context = StepContext(LocalComm(), LocalComm(), {})
        outputs.append((table["attention"](inputs, attrs, context)[0], inputs[3], inputs[4]))
    (expected, *expected_caches), (got, *got_caches) = outputs
    # Values are of order one, a row sums at most 60 of them with weights that sum to one.
    tolerance = 8 * UNIT_ROUNDOFF[dtype] * expected.float().abs().max().clamp(min=1)
    assert (got.float() - expected.float()).abs().max() <= tolerance
    for a, b in zip(expected_caches, got_caches, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", sorted(set(KERNELS) - {"attention"}))
def test_other_kernels_are_the_reference_itself_or_are_compared_elsewhere(op: str) -> None:
    assert KERNELS[op] is REFERENCE[op]
