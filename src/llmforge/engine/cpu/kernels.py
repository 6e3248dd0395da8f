"""The cpu target's lowering table: the reference meanings, faster where it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from llmforge.engine.cpu.attention import (
    AttentionPlan,
    Planner,
    attention,
    latent_attention,
)
from llmforge.engine.cpu.scored_attention import scored_attention
from llmforge.model.reference import ACTIVATIONS, REFERENCE, Context, Meaning

Tensor = torch.Tensor


@dataclass(frozen=True)
class StepContext(Context):
    """A step's context, with what its layers share."""

    _plans: dict[tuple[Any, ...], AttentionPlan] = field(default_factory=dict)

    def attention_plan(
        self, query_starts: Tensor, kv_lens: Tensor, block_table: Tensor, **layer: Any
    ) -> AttentionPlan:
        """The step's plan for layers like this one (the fields of `Planner`), made by the first
        of them."""
        key = tuple(layer.values())
        if key not in self._plans:
            self._plans[key] = Planner(
                query_starts.long(), kv_lens.long(), block_table.long(), **layer
            ).plan()
        return self._plans[key]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = weight.shape[0]
    # Without its weight torch's fused norm rounds once, as the op does before the weight.
    if x.shape[-1] == size:
        return F.rms_norm(x, (size,), None, eps).mul_(weight)
    return F.rms_norm(x.unflatten(-1, (-1, size)), (size,), None, eps).mul_(weight).flatten(-2)


def _rms_norm(inputs: Sequence[Any], attrs: Mapping[str, Any], _: Context) -> tuple[Tensor]:
    x, weight = inputs
    return (rms_norm(x, weight, attrs["eps"]),)


def _add_rms_norm(
    inputs: Sequence[Any], attrs: Mapping[str, Any], _: Context
) -> tuple[Tensor, Tensor]:
    x, residual, weight = inputs
    total = x + residual
    return total, rms_norm(total, weight, attrs["eps"])


def _gated_activation(inputs: Sequence[Any], attrs: Mapping[str, Any], _: Context) -> tuple[Tensor]:
    gate, up = inputs
    return (ACTIVATIONS[attrs["activation"]](gate).mul_(up),)


KERNELS: dict[str, Meaning] = {
    **REFERENCE,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "gated_activation": _gated_activation,
    "attention": attention,
    "scored_attention": scored_attention,
    "latent_attention": latent_attention,
}
