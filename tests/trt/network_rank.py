"""A rank's networks evaluated by the interpreter, call by call, as its plan says: what the
executable does with engines, without devices, streams or kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from interpreter import Interpreter
from network_reader import Program

from llmforge.comm import Comm, LocalComm
from llmforge.engine.tensorrt.io import (
    LOGIT_ROWS,
    PAST_LENS,
    POSITIONS,
    PROMPT_LENS,
    TOKEN_IDS,
    engine_shape,
    weight_input,
)
from llmforge.engine.tensorrt.plan import CachePlan, RankPlan, Step
from llmforge.model.reference import DTYPES, REFERENCE, Context

Tensor = torch.Tensor
GARBAGE = 1000.0  # what lies in slots that nobody has written: any finite number will do


class NetworkRank:
    """One rank. `programs` are its networks by file; `comm` holds all ranks, `group` those that
    share its layers."""

    def __init__(
        self,
        plan: RankPlan,
        programs: Mapping[str, Program],
        comm: Comm | None = None,
        group: Comm | None = None,
        weights: bytes = b"",
    ) -> None:
        self.plan = plan
        self._context = Context(comm or LocalComm(), group or LocalComm(), {})
        self._interpreters = {
            file: Interpreter(program, group) for file, program in programs.items()
        }
        self._weights = {
            weight.name: weights[weight.offset : weight.offset + weight.nbytes]
            for weight in plan.weights
        }
        self._programs = programs
        rng = torch.Generator().manual_seed(3)
        self.caches = {
            cache.name: self._new_cache(cache).uniform_(-GARBAGE, GARBAGE, generator=rng)
            for cache in plan.caches
        }

    def call(self, first_slot: int, **inputs: np.ndarray[Any, Any]) -> Tensor | None:
        """The logits of a call on rows of neighbouring slots (None on ranks that have none). The
        inputs are those of io.py."""
        batch, tokens = inputs[TOKEN_IDS].shape
        given = {name: torch.from_numpy(inputs[name].astype(np.int32)) for name in inputs}
        hidden: dict[str, Tensor] = {}
        sizes = {"B": batch, "S": tokens, "R": len(inputs[LOGIT_ROWS])}
        rows = slice(first_slot, first_slot + batch)
        fresh: list[tuple[CachePlan, Tensor]] = []
        with torch.inference_mode():
            for step in self.plan.steps:
                if step.kind != "engine":
                    self._exchange(step, hidden, sizes)
                    continue
                values = {
                    name: self.caches[name][rows] if name in self.caches else found
                    for name in step.inputs
                    if (found := given.get(name, hidden.get(name))) is not None
                    or name in self.caches
                }
                outputs = self._run(step, values)
                assert set(outputs) == set(step.outputs), "the plan's outputs are the network's"
                for cache in self.plan.caches:
                    if not self.plan.native_cache and cache.output in outputs:
                        fresh.append((cache, outputs.pop(cache.output)))
                hidden.update(outputs)
            for cache, new in fresh:  # as the kernel does, once the engines have run
                self._write(self.caches[cache.name][rows], new, inputs[PAST_LENS])
        return hidden[self.plan.logits] if self.plan.logits is not None else None

    def _run(self, step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its engine, which may have names of its own."""
        names = (*step.inputs, *step.outputs)
        local = dict(zip(names, step.local or names, strict=True))
        given = {local[name]: value for name, value in values.items()}
        declared = {value.name: value for value in self._programs[step.file].inputs}
        for index, name in enumerate(step.weights):
            weight = declared[weight_input(index)]
            flat = torch.frombuffer(bytearray(self._weights[name]), dtype=weight.dtype)
            given[weight.name] = flat.view(weight.shape)
        found = self._interpreters[step.file].run(given)
        back = {local[name]: name for name in step.outputs}
        return {back[name]: value for name, value in found.items()}

    def _new_cache(self, cache: CachePlan) -> Tensor:
        shape = (self.plan.slots, cache.heads, self.plan.capacity, cache.size)
        return torch.empty(shape, dtype=DTYPES[cache.dtype])

    def _exchange(self, step: Step, hidden: dict[str, Tensor], sizes: Mapping[str, int]) -> None:
        context = self._context
        if step.kind == "send":
            REFERENCE["send"]([hidden[step.x]], {"to": step.peer}, context)
        elif step.kind == "recv":
            tensor = self.plan.tensors[step.out]
            shape = [sizes.get(d, d) for d in engine_shape(tensor)]  # type: ignore[call-overload]
            attrs = {"source": step.peer, "shape": shape, "dtype": tensor.dtype}
            (hidden[step.out],) = REFERENCE["recv"]([], attrs, context)
        else:
            attrs = {"ranks": step.ranks}
            if step.kind == "all_gather":
                attrs["size"] = step.size
            (hidden[step.out],) = REFERENCE[step.kind]([hidden[step.x]], attrs, context)

    @staticmethod
    def _write(cache: Tensor, new: Tensor, past_lens: np.ndarray[Any, Any]) -> None:
        for row, past in enumerate(past_lens.tolist()):
            count = max(0, min(new.shape[2], cache.shape[2] - past))
            cache[row, :, past : past + count] = new[row, :, :count]


def call_inputs(
    tokens: np.ndarray[Any, Any],
    past_lens: np.ndarray[Any, Any],
    prompt_lens: np.ndarray[Any, Any],
    logit_rows: np.ndarray[Any, Any],
    capacity: int,
) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of a call for tokens [B, S] that follow past_lens [B] others."""
    positions = past_lens[:, None] + np.arange(tokens.shape[1])
    return {
        TOKEN_IDS: tokens,
        POSITIONS: np.minimum(positions, capacity - 1),
        PAST_LENS: past_lens,
        PROMPT_LENS: prompt_lens,
        LOGIT_ROWS: logit_rows,
    }
