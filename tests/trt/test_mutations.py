"""The comparison of networks with the reference sees a wrong lowering: each test puts it wrong in
one way, and the logits are then further off than rounding explains, or the interpreter refuses the
network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from interpreter import Mismatch
from parity import Difference, compare, lower, network_logits, reference_logits
from tiny_models import MemoryCheckpoint, config_of

from llmforge.engine.tensorrt.io import LOGIT_ROWS, PAST_LENS
from llmforge.engine.tensorrt.lowering import attention, basic
from llmforge.engine.tensorrt.lowering.context import Lowering, Rotation
from llmforge.engine.tensorrt.lowering.table import TABLE
from llmforge.parallel import Topology

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
BOTH = (False, True)


def wrap(patch: Patch, op: str, change: Callable[..., Any]) -> None:
    """``change(row, g, *inputs, **attrs)`` in place of both columns of an op's row."""
    for column in ("primitives", "native"):
        row = getattr(TABLE[op], column)
        if row is not None:
            wrapped = lambda *given, row=row, **attrs: change(row, *given, **attrs)  # noqa: E731
            patch.setattr(TABLE[op], column, wrapped)


def attribute(op: str, **changes: Callable[[Any], Any]) -> Mutation:
    """An op with attributes that are not its own."""

    def change(row: Any, *given: Any, **attrs: Any) -> Any:
        return row(*given, **{k: changes.get(k, lambda v: v)(v) for k, v in attrs.items()})

    return lambda patch: wrap(patch, op, change)


def inputs(op: str, *order: int) -> Mutation:
    """An op with its inputs in another order."""

    def change(row: Any, g: Any, *given: Any, **attrs: Any) -> Any:
        return row(g, *(given[i] for i in order), *given[len(order) :], **attrs)

    return lambda patch: wrap(patch, op, change)


def output(op: str, change: Callable[..., Any]) -> Mutation:
    """An op that gives something else: ``change(g, right, *inputs)``."""

    def changed(row: Any, g: Any, *given: Any, **attrs: Any) -> Any:
        return change(g, row(g, *given, **attrs), *given)

    return lambda patch: wrap(patch, op, changed)


def sees(offset: int) -> Mutation:
    """Queries see keys up to `offset` positions further."""

    def mutate(patch: Patch) -> None:
        right = attention._positions

        def positions(g: Lowering, which: str, *, groups: bool) -> Any:
            queries, keys = right(g, which, groups=groups)
            return g.net.add(queries, offset), keys

        patch.setattr(attention, "_positions", positions)

    return mutate


def step_input_off_by_one(name: str) -> Mutation:
    def mutate(patch: Patch) -> None:
        right = Lowering.step_input

        def step_input(self: Lowering, wanted: str) -> Any:
            value = right(self, wanted)
            return self.net.add(value, 1) if wanted == name else value

        patch.setattr(Lowering, "step_input", step_input)

    return mutate


def turned(change: Callable[[Lowering, Rotation], Rotation]) -> Mutation:
    return output("rope_table", lambda g, table, *_: change(g, table))


def other_sign(g: Lowering, table: Rotation) -> Rotation:
    return dataclasses.replace(table, sin=g.net.mul(table.sin, -1.0))


def exchanged(g: Lowering, table: Rotation) -> Rotation:
    return dataclasses.replace(table, cos=table.sin, sin=table.cos)


def without_mean(patch: Patch) -> None:
    """A LayerNorm that does not take the mean off."""

    def row(g: Lowering, x: Any, weight: Any, bias: Any, *, eps: float, run: int) -> Any:
        return basic.rms_norm(g, x, weight, eps=eps)

    patch.setattr(TABLE["layer_norm"], "primitives", row)


def without_sinks(patch: Patch) -> None:
    def change(row: Any, g: Any, *given: Any, **attrs: Any) -> Any:
        return row(g, *given[:-1], None, **attrs)

    wrap(patch, "scored_attention", change)


def relu_for_silu(patch: Patch) -> None:
    patch.setitem(basic.ACTIVATIONS, "silu", basic.ACTIVATIONS["relu"])


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "no scale": ("llama", attribute("attention", scale=lambda _: 1.0)),
    "scale of the square": ("llama", attribute("attention", scale=lambda s: s * s)),
    "no window": ("mistral-window", attribute("attention", window=lambda _: None)),
    "window one too wide": ("mistral-window", attribute("attention", window=lambda w: w and w + 1)),
    "window one too narrow": (
        "mistral-window",
        attribute("attention", window=lambda w: w and w - 1),
    ),
    "sees one token ahead": ("llama", sees(+1)),
    "does not see itself": ("llama", sees(-1)),
    "k and v exchanged": ("llama", inputs("attention", 0, 2, 1)),
    "caches exchanged": ("qwen2", inputs("attention", 0, 2, 1, 4, 3)),
    "past_lens off by one": ("llama", step_input_off_by_one(PAST_LENS)),
    "logit rows off by one": ("llama", step_input_off_by_one(LOGIT_ROWS)),
    "rope turns back": ("llama", turned(other_sign)),
    "cosines and sines exchanged": ("llama", turned(exchanged)),
    "positions off by one": ("gpt2", step_input_off_by_one("positions")),
    "rope of another base": ("llama", attribute("rope_table", rope=lambda r: {**r, "theta": 5e3})),
    "rope of the other kind": (
        "phi3-longrope",
        attribute("rope_table", rope=lambda r: {**r, "original_max_position": 64}),
    ),
    "rope factor missing": (
        "llama-yarn",
        attribute("rope_table", rope=lambda r: {**r, "attention_factor": 1.0}),
    ),
    "gate and up exchanged": ("llama", inputs("gated_activation", 1, 0)),
    "another activation": ("llama", relu_for_silu),
    "norm eps forgotten": ("gemma", attribute("rms_norm", eps=lambda _: 0.01)),
    "a mean that stays": ("gpt-neox", without_mean),
    "a residual that is lost": ("llama", output("add", lambda g, right, x, y: y)),
    "a bias that is lost": (
        "qwen2",
        output("linear", lambda g, right, x, w, b: g.net.matmul(x, g.weight(w), transpose=True)),
    ),
    "no soft cap of scores": ("gemma2", attribute("scored_attention", soft_cap=lambda _: None)),
    "slopes exchanged": ("bloom", attribute("scored_attention", slopes=lambda s: s[::-1])),
    "logits not capped": ("gemma2", output("soft_cap", lambda g, right, x: x)),
    "embedding not scaled": ("gemma", attribute("scale", factor=lambda _: 1.0)),
    "an expert too few": ("mixture", attribute("route", top_k=lambda k: k - 1)),
    "experts not weighed": (
        "mixture",
        output("route", lambda g, right, *_: (right[0], g.net.elementwise("MAX", right[1], 1.0))),
    ),
    "experts one off": ("mixture", attribute("experts", first=lambda f: f + 1)),
    "experts not clamped": ("mixture-clamped-sinks", attribute("experts", limit=lambda _: 1e3)),
    "no sinks": ("mixture-clamped-sinks", without_sinks),
    "latent attention of another scale": (
        "latent",
        attribute("latent_attention", scale=lambda s: s * 1.1),
    ),
}


def difference(
    name: str, patch: Patch, mutate: Mutation, primitives: bool, ranks: int = 1
) -> Difference:
    config, topology = config_of(name), Topology(ranks, 1)
    checkpoint = MemoryCheckpoint(config)
    expected = reference_logits(checkpoint)
    mutate(patch)
    try:
        lowered = lower(checkpoint, primitives=primitives, topology=topology)
        return compare(config, network_logits(config, lowered, topology), expected)
    except Mismatch:
        return Difference(math.inf, 0.0)


@pytest.mark.parametrize("primitives", BOTH, ids=["native", "primitives"])
@pytest.mark.parametrize("what", MUTATIONS)
def test_a_wrong_lowering_is_seen(what: str, primitives: bool, monkeypatch: Patch) -> None:
    name, mutate = MUTATIONS[what]
    found = difference(name, monkeypatch, mutate, primitives)
    assert not found.within, found


BETWEEN_RANKS: dict[str, tuple[bool, Mutation]] = {
    "a sum that is one rank's": (False, output("all_reduce", lambda g, right, x: x)),
    "tokens of the wrong rank": (True, attribute("embed", start=lambda s: max(0, s - 1))),
    "every rank holds all tokens": (True, attribute("embed", start=lambda _: 0)),
}


@pytest.mark.parametrize("what", BETWEEN_RANKS)
def test_a_wrong_exchange_is_seen(what: str, monkeypatch: Patch) -> None:
    primitives, mutate = BETWEEN_RANKS[what]
    found = difference("llama", monkeypatch, mutate, primitives, ranks=2)
    assert not found.within, found
