"""The table of the ops' meanings, and what a meaning is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmforge.comm import Comm, LocalComm

Tensor = torch.Tensor
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")}


@dataclass(frozen=True)
class Context:
    """What collectives need besides their inputs: the whole engine's ranks, those of this
    tensor-parallel group, and the step's sizes of symbolic dimensions."""

    world: Comm
    tensor_group: Comm
    sizes: Mapping[str, int]


LOCAL = Context(LocalComm(), LocalComm(), {})

Meaning = Callable[[Sequence[Any], Mapping[str, Any], Context], tuple[Tensor, ...]]
REFERENCE: dict[str, Meaning] = {}


def meaning(
    name: str, *, collective: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of (inputs..., *, attributes...); a collective's first argument is
    the context."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            inputs: Sequence[Any], attrs: Mapping[str, Any], context: Context
        ) -> tuple[Tensor, ...]:
            first = (context,) if collective else ()
            result = function(*first, *inputs, **attrs)
            return result if isinstance(result, tuple) else (result,)

        REFERENCE[name] = call
        return function

    return register
