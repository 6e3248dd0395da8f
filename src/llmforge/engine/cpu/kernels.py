"""The cpu target's lowering table: the reference meanings, faster where it pays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmforge.engine.cpu.attention import AttentionPlan, attention
from llmforge.model.reference import REFERENCE, Context, Meaning


@dataclass(frozen=True)
class StepContext(Context):
    """A step's context, with what its layers can share."""

    _plans: dict[int | None, AttentionPlan] = field(default_factory=dict)

    def plan(
        self,
        query_starts: torch.Tensor,
        kv_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        window: int | None,
    ) -> AttentionPlan:
        """The step's attention plan for layers with this window, made by the first of them."""
        if window not in self._plans:
            self._plans[window] = AttentionPlan.of(
                query_starts, kv_lens, block_table, block_size, window
            )
        return self._plans[window]


KERNELS: dict[str, Meaning] = {**REFERENCE, "attention": attention}
