"""The cpu target's other kernels against the ops' plain meanings, and their batch invariance."""

from typing import Any

import pytest
import torch

from llmforge.engine.cpu.attention import attention
from llmforge.engine.cpu.kernels import KERNELS
from llmforge.engine.cpu.linear import linear_of
from llmforge.model.reference import LOCAL, REFERENCE

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = sorted(UNIT_ROUNDOFF, key=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor, roundings: float) -> None:
    """Within so many roundings of the dtype, each relative to the value itself (bounded below by
    the typical value, for sums that cancel)."""
    scale = torch.maximum(expected.float().abs(), expected.float().square().mean().sqrt())
    tolerance = roundings * UNIT_ROUNDOFF[expected.dtype] * scale
    assert ((got.float() - expected.float()).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_kernels_that_differ_from_the_reference(rows: int, dtype: torch.dtype) -> None:
    x, y = random(rows, 96, dtype=dtype), random(rows, 96, dtype=dtype, seed=1)
    cases: dict[str, list[Any]] = {
        "rms_norm": [
            ([x, random(96, dtype=dtype, seed=2)], {"eps": 1e-5}),
            ([x, random(24, dtype=dtype, seed=2)], {"eps": 1e-5}),
        ],
        "add_rms_norm": [([x, y, random(96, dtype=dtype, seed=2)], {"eps": 1e-5})],
        "gated_activation": [
            ([x, y], {"activation": name}) for name in ("silu", "gelu", "gelu_tanh", "relu")
        ],
    }
    own = {op for op in KERNELS if KERNELS[op] is not REFERENCE[op]}
    attentions = {"attention", "scored_attention", "latent_attention"}
    assert own == {*cases, *attentions}, "a kernel of its own is compared here"
    assert KERNELS["attention"] is attention, "compared in test_cpu_attention.py"
    for op, calls in cases.items():
        for inputs, attrs in calls:
            clones = [x.clone() for x in inputs]
            expected = REFERENCE[op](inputs, attrs, LOCAL)
            got = KERNELS[op](inputs, attrs, LOCAL)
            for a, b in zip(got, expected, strict=True):
                # The mean of 96 squares in another order, two roundings to the dtype.
                assert_close(a, b, roundings=4 if dtype != torch.float32 else 16)
            assert all(torch.equal(a, b) for a, b in zip(inputs, clones, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "terms"), [(24, 40), (7, 64), (33, 1024), (48, 2056)])
def test_packed_products_are_right(out: int, terms: int, dtype: torch.dtype) -> None:
    weight, bias = random(out, terms, dtype=dtype), random(out, dtype=dtype, seed=1)
    linear = linear_of(weight)
    for rows in (1, 2, 5, 32):
        x = random(rows, terms, dtype=dtype, seed=rows)
        for b in (bias, None):
            exact = x.double() @ weight.double().T + (0 if b is None else b.double())
            # One rounding to the dtype, and a float32 sum over the terms.
            error = (linear(x, b).double() - exact).abs().max()
            sums = (terms / 2) ** 0.5 * UNIT_ROUNDOFF[torch.float32]
            assert error <= (UNIT_ROUNDOFF[dtype] + 6 * sums) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [64, 1024, 1032, 4864])
def test_a_row_is_the_same_to_the_bit_in_any_batch(terms: int, dtype: torch.dtype) -> None:
    linear = linear_of(random(96, terms, dtype=dtype))
    x = random(64, terms, dtype=dtype, seed=1)
    whole = linear(x, None)
    for rows in (1, 2, 3, 5, 8, 17, 33):
        for start in (0, 7, 64 - rows):
            part = linear(x[start : start + rows], None)
            assert torch.equal(part, whole[start : start + rows]), (rows, start)
