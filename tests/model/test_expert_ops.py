"""The ops of mixtures of experts: their meaning against plain loops, and the calls refused."""

import math
from typing import Any

import pytest
import torch

from llmforge.model.builder import GraphBuilder
from llmforge.model.reference import LOCAL, REFERENCE

TOP_3 = {
    "top_k": 3,
    "score": "softmax",
    "groups": 1,
    "kept_groups": 1,
    "group_top": 1,
    "normalize": False,
    "scale": 1.0,
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(logits: list[float], correction: list[float], attrs: dict[str, Any]) -> dict[int, float]:
    """Expert → weight of one token, the slow and plain way."""
    if attrs["score"] == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + c for s, c in zip(scores, correction, strict=True)]
    size = len(logits) // attrs["groups"]

    def value(group: int) -> float:
        members = sorted(choice[group * size : (group + 1) * size])
        return sum(members[-attrs["group_top"] :])

    groups = sorted(range(attrs["groups"]), key=lambda g: (-value(g), g))[: attrs["kept_groups"]]
    allowed = [e for e in range(len(logits)) if e // size in groups]
    ids = sorted(allowed, key=lambda e: (-choice[e], e))[: attrs["top_k"]]
    total = sum(scores[e] for e in ids) if attrs["normalize"] else 1.0
    return {e: scores[e] / total * attrs["scale"] for e in ids}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize": True},
        {"score": "sigmoid", "normalize": True, "scale": 2.5},
        {"score": "sigmoid", "groups": 4, "kept_groups": 2, "group_top": 2, "normalize": True},
        {"groups": 6, "kept_groups": 2, "scale": 16.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("corrected", [False, True])
def test_route_chooses_and_weighs(changes: dict[str, Any], corrected: bool) -> None:
    attrs = {**TOP_3, **changes}
    x, weight, bias = random(20, 8, seed=0), random(12, 8, seed=1), random(12, seed=2)
    correction = random(12, seed=3) if corrected else None
    ids, weights = REFERENCE["route"]([x, weight, bias, correction], attrs, LOCAL)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    logits = x.double() @ weight.double().T + bias.double()
    corrections = [0.0] * 12 if correction is None else correction.tolist()
    for token in range(20):
        expected = chosen(logits[token].tolist(), corrections, attrs)
        assert ids[token].tolist() == list(expected)
        got = weights[token].tolist()
        assert got == pytest.approx(list(expected.values()), rel=1e-5)


def test_route_takes_the_lower_of_equal_experts() -> None:
    inputs = [torch.ones(2, 4), torch.ones(12, 4), None, None]
    assert REFERENCE["route"](inputs, TOP_3, LOCAL)[0].tolist() == [[0, 1, 2]] * 2
    grouped = {**TOP_3, "groups": 4, "kept_groups": 1}
    assert REFERENCE["route"](inputs, grouped, LOCAL)[0].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_sum_what_is_held_here(limit: float | None, biases: bool) -> None:
    x, gate_up, down = random(7, 6, seed=0), random(5, 8, 6, seed=1), random(5, 6, 4, seed=2)
    up_bias, down_bias = random(5, 8, seed=3), random(5, 6, seed=4)
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(7)]).int()
    weights = random(7, 3, seed=6).abs()
    attrs = {"first": 2, "activation": "silu", "alpha": 1.702, "limit": limit}
    inputs = [x, ids, weights, gate_up, down, *((up_bias, down_bias) if biases else (None, None))]
    [got] = REFERENCE["experts"](inputs, attrs, LOCAL)
    expected = torch.zeros(7, 6)
    for token, choice in ((t, c) for t in range(7) for c in range(3)):
        expert = int(ids[token, choice]) - 2
        if not 0 <= expert < 5:
            continue
        both = gate_up[expert] @ x[token] + (up_bias[expert] if biases else 0)
        gate, up = both[:4], both[4:]
        if limit is None:
            activated = gate * gate.sigmoid() * up
        else:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            activated = gate * (1.702 * gate).sigmoid() * (up + 1)
        out = down[expert] @ activated + (down_bias[expert] if biases else 0)
        expected[token] += weights[token, choice] * out
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_token_gate_head_linear_and_clamp() -> None:
    x, by, weight = random(5, 12, seed=0), random(5, 7, seed=1), random(1, 7, seed=2)
    [gated] = REFERENCE["token_gate"]([x, by, weight], {}, LOCAL)
    torch.testing.assert_close(gated, x * (by @ weight[0]).sigmoid()[:, None])
    heads = random(3, 2, 4, seed=3)
    [projected] = REFERENCE["head_linear"]([x, heads], {}, LOCAL)
    expected = [x[:, 4 * h : 4 * h + 4] @ heads[h].T for h in range(3)]
    torch.testing.assert_close(projected, torch.cat(expected, dim=-1))
    [clamped] = REFERENCE["clamp"]([x], {"limit": 0.5}, LOCAL)
    assert torch.equal(clamped, x.clip(-0.5, 0.5))


def test_calls_of_the_wrong_form_are_refused() -> None:
    g = GraphBuilder()

    def weight(name: str, *shape: int) -> Any:
        return g.parameter(name, shape, "float32")

    x = g.embed(g.inputs["token_ids"], weight("embed", 10, 6))
    router = weight("router", 12, 6)
    ids, weights = g.route(x, router, top_k=2)
    assert (ids.shape, ids.dtype) == (("tokens", 2), "int32")
    assert (weights.shape, weights.dtype) == (("tokens", 2), "float32")
    with pytest.raises(ValueError, match="3 of 12 experts in 6 groups"):
        g.route(x, router, top_k=3, groups=6, kept_groups=1)
    with pytest.raises(ValueError, match="score 'relu' is not"):
        g.route(x, router, top_k=3, score="relu")
    with pytest.raises(ValueError, match=r"experts: \(11,\) and \(12,\) differ"):
        g.route(x, router, weight("bias", 11), top_k=3)
    gate_up, down = weight("gate_up", 4, 16, 6), weight("down", 4, 6, 8)
    assert g.experts(x, ids, weights, gate_up, down, first=8).shape == x.shape
    with pytest.raises(ValueError, match="gate, up and down"):
        g.experts(x, ids, weights, gate_up, weight("down2", 4, 6, 9))
    with pytest.raises(ValueError, match="experts: bias"):
        g.experts(x, ids, weights, gate_up, down, weight("bias2", 4, 15))
    with pytest.raises(ValueError, match="token_gate: weight"):
        g.token_gate(x, x, weight("gate", 1, 5))
    with pytest.raises(ValueError, match="head_linear: features"):
        g.head_linear(x, weight("heads", 2, 5, 4))
    cache = g.latent_cache(0, 6, "float32")
    k_rope, q_rope = (g.linear(x, weight(f"rope{n}", n, 6)) for n in (2, 4))
    latent, q = (g.linear(x, weight(f"latent{n}", n, 6)) for n in (4, 8))
    out = g.latent_attention(q, q_rope, latent, k_rope, cache, scale=1.0)
    assert out.shape == ("tokens", 8)
    with pytest.raises(ValueError, match="latent_attention: cache"):
        g.latent_attention(q, q_rope, k_rope, k_rope, cache, scale=1.0)
    with pytest.raises(ValueError, match="features of q_rope"):
        g.latent_attention(q, k_rope, latent, k_rope, cache, scale=1.0)
