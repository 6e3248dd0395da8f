"""A step's instructions beside the ops' plain-torch meanings."""

from __future__ import annotations

from typing import Any

from llmforge.engine.cuda import checking
from llmforge.engine.step import StepBatch
from llmforge.model.reference import LOCAL, Context


def check_instructions(cuda: Any, batch: StepBatch, context: Context = LOCAL) -> None:
    """All agree; the first that does not is the one named."""
    checks = list(checking.check_instructions(cuda, batch, context, device="cpu"))
    wrong = [check for check in checks if not check.passed]
    assert checks and not wrong, wrong[0]
