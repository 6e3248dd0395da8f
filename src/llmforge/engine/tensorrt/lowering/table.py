"""The table: for each op how it is lowered with native layers and with primitives.

A row is a function (lowering, inputs..., *, attributes...) as in model/reference.py: inputs are
lowered values, parameters and states are the graph's tensors, the step's inputs are None (io.py has
what stands for them). It gives the lowered value of the op's output, or a tuple of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmforge.engine.tensorrt.package import Features

Lowered = Callable[..., Any]


@dataclass
class Row:
    """How an op is lowered. native: with layers that the package must have (`needs`, fields of
    Features); None: there is no better layer for it than primitives."""

    primitives: Lowered | None = None
    native: Lowered | None = None
    needs: tuple[str, ...] = ()
    by_runtime: bool = False  # the runtime does it between engines

    def choose(self, features: Features, primitives: bool) -> Lowered:
        """The function for a package."""
        if self.native is not None and self.uses_native(features, primitives):
            return self.native
        assert self.primitives is not None
        return self.primitives

    def uses_native(self, features: Features, primitives: bool) -> bool:
        return (
            self.native is not None
            and not primitives
            and all(getattr(features, need) for need in self.needs)
        )


TABLE: dict[str, Row] = {}


def lowers(op: str) -> Callable[[Lowered], Lowered]:
    """Registers the primitives of an op."""

    def register(function: Lowered) -> Lowered:
        TABLE.setdefault(op, Row()).primitives = function
        return function

    return register


def lowers_natively(op: str, *needs: str) -> Callable[[Lowered], Lowered]:
    """Registers the native layers of an op, which need these features of the package."""

    def register(function: Lowered) -> Lowered:
        row = TABLE.setdefault(op, Row())
        row.native, row.needs = function, needs
        return function

    return register


# Between the engines of pipeline stages only the runtime can tell when a partner is ready.
TABLE["send"] = Row(by_runtime=True)
TABLE["recv"] = Row(by_runtime=True)
