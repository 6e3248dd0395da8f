"""The cpu target's packed kernels of mixtures against the ops' plain meanings, bit for bit alike
in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmforge.engine.cpu.executor import PACKED
from llmforge.engine.cpu.linear import linear_of
from llmforge.model.ops import OPS
from llmforge.model.reference import LOCAL, REFERENCE

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TOKENS, HIDDEN, SIZE, EXPERTS, TOP_K = 37, 48, 24, 6, 3
ROUTE = {"top_k": TOP_K, "score": "sigmoid", "groups": 3, "kept_groups": 2, "group_top": 2}
ROUTE |= {"normalize": True, "scale": 1.5}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(op: str, inputs: list[Any], attrs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    positions, pack = PACKED[op]
    kernel = pack(*(inputs[i] for i in positions))
    rest = [x for i, x in enumerate(inputs) if i not in positions]
    return kernel(rest, attrs, LOCAL)


def expert_inputs(dtype: torch.dtype, biases: bool) -> list[Any]:
    scores = random(TOKENS, 2 * EXPERTS, seed=0)
    return [
        random(TOKENS, HIDDEN, seed=1, dtype=dtype),
        scores.topk(TOP_K).indices.int(),
        scores.topk(TOP_K).values.softmax(-1),
        random(EXPERTS, 2 * SIZE, HIDDEN, seed=2, dtype=dtype) * HIDDEN**-0.5,
        random(EXPERTS, HIDDEN, SIZE, seed=3, dtype=dtype) * SIZE**-0.5,
        random(EXPERTS, 2 * SIZE, seed=4, dtype=dtype) if biases else None,
        random(EXPERTS, HIDDEN, seed=5, dtype=dtype) if biases else None,
    ]


def test_the_weights_that_are_packed_are_inputs_of_their_ops() -> None:
    for op, (positions, _) in PACKED.items():
        names = [OPS[op].inputs[i] for i in positions]
        assert all(name in ("weight", "gate_up", "down") for name in names)


@pytest.mark.parametrize("dtype", sorted(UNIT_ROUNDOFF, key=str), ids=str)
@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("first", [0, 3, EXPERTS])
def test_experts(dtype: torch.dtype, limit: float | None, biases: bool, first: int) -> None:
    """Of twice as many experts as are held here, those from `first` on are."""
    inputs = expert_inputs(dtype, biases)
    attrs = {"first": first, "activation": "silu", "alpha": 1.7, "limit": limit}
    [expected] = REFERENCE["experts"](inputs, attrs, LOCAL)
    [got] = packed("experts", inputs, attrs)
    # Gate, up, their product, down: each rounds values of order one, which then are summed.
    tolerance = 8 * UNIT_ROUNDOFF[dtype] + 48 * UNIT_ROUNDOFF[torch.float32]
    error = (got.float() - expected.float()).abs().max()
    assert error <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_the_same_to_the_bit_in_any_batch(dtype: torch.dtype) -> None:
    hidden = 1200  # oneDNN sums a single row of more than 1024 terms differently
    x = random(TOKENS, hidden, seed=1, dtype=dtype)
    router = random(2 * EXPERTS, hidden, seed=2, dtype=dtype)
    gate_up = random(EXPERTS, 2 * SIZE, hidden, seed=3, dtype=dtype)
    down = random(EXPERTS, hidden, SIZE, seed=4, dtype=dtype)
    heads = random(4, 20, hidden // 4, seed=5, dtype=dtype)
    attrs = {"first": 2, "activation": "silu", "alpha": 1.0, "limit": None}

    def run(rows: slice) -> list[torch.Tensor]:
        ids, weights = packed("route", [x[rows], router, None, None], ROUTE)
        [out] = packed("experts", [x[rows], ids, weights, gate_up, down, None, None], attrs)
        return [ids, weights, out, *packed("head_linear", [x[rows], heads], {})]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(20, TOKENS)):
        for part, all_rows in zip(run(rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows])


def test_route_and_head_linear() -> None:
    x, weight, bias = random(9, 48, seed=0), random(12, 48, seed=1), random(12, seed=2)
    inputs = [x, weight, bias, random(12, seed=3)]
    ids, weights = packed("route", inputs, ROUTE)
    expected, values = REFERENCE["route"](inputs, ROUTE, LOCAL)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, values)
    heads = random(4, 7, 12, seed=4)
    [got] = packed("head_linear", [x, heads], {})
    torch.testing.assert_close(got, REFERENCE["head_linear"]([x, heads], {}, LOCAL)[0])
    assert torch.equal(got[:, 7:14], linear_of(heads[1])(x[:, 12:24], None))
