"""Evaluates a network that was read back (network_reader.py) with torch on the CPU.

Every tensor has the dtype that the network declares, as in a strongly typed engine: a layer
computes in float32 inside and rounds its output once. Layers whose inputs TensorRT would not accept
together, and tensors whose shape is not the declared one, are errors here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import layer_semantics
import torch
from network_reader import Program, Step, Value

from llmforge.model.reference import Context, all_gather, all_reduce

Tensor = torch.Tensor


class Mismatch(AssertionError):
    """A network that does not hold together: what a layer got is not what it may get."""


class Group(Protocol):
    """The ranks that a collective joins (a `Comm`)."""

    rank: int
    size: int


class Interpreter:
    """A program, ready to run again and again."""

    def __init__(self, program: Program, group: Any = None) -> None:
        self.program = program
        self._group = group
        self._constants = {
            step.outputs[0].name: step.attrs["value"]
            for step in program.steps
            if step.kind == "CONSTANT"
        }
        last: dict[str, int] = {}
        for index, step in enumerate(program.steps):
            last.update(dict.fromkeys(step.inputs, index))
        kept = {*self._constants, *(v.name for v in (*program.inputs, *program.outputs)), ""}
        self._free: list[list[str]] = [[] for _ in program.steps]
        for name, index in last.items():
            if name not in kept:
                self._free[index].append(name)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        see: Callable[[Step, Sequence[Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:
        """The network's outputs by name. The tensors of caches that it updates are written in
        place, and returned. `see` is shown each layer's outputs as they are computed."""
        program = self.program
        sizes: dict[tuple[str, int], int] = {}
        for value in program.inputs:
            if value.name not in inputs:
                raise Mismatch(f"the input {value.name} is not given")
            _agrees(value, inputs[value.name], "input")
            sizes.update({(value.name, d): n for d, n in enumerate(inputs[value.name].shape)})
        values: dict[str, Any] = {**self._constants, **inputs, "": None}
        for step, free in zip(program.steps, self._free, strict=True):
            if step.kind == "CONSTANT":
                continue
            results = self._evaluate(step, [values[name] for name in step.inputs])
            for value, result in zip(step.outputs, results, strict=True):
                _agrees(value, result, step.name)
                values[value.name] = result
            if see is not None:
                see(step, results)
            for name in free:
                del values[name]
        return {value.name: values[value.name] for value in program.outputs}

    def _evaluate(self, step: Step, inputs: list[Any]) -> tuple[Tensor, ...]:
        try:
            if step.kind == "DIST_COLLECTIVE":
                return (self._collective(inputs[0], step.attrs),)
            return layer_semantics.evaluate(step, inputs)
        except (AssertionError, RuntimeError, IndexError) as error:
            got = [None if x is None else (tuple(x.shape), x.dtype) for x in inputs]
            raise Mismatch(f"{step.kind} {step.name} of {got}: {error}") from error

    def _collective(self, x: Tensor, attrs: Mapping[str, Any]) -> Tensor:
        """As TensorRT's, which join the ranks' tensors along the first dimension."""
        group = self._group
        if group is None or group.size != attrs["num_ranks"]:
            raise AssertionError(f"a collective of {attrs['num_ranks']} ranks in another group")
        context = Context(group, group, {})
        if attrs["op"] == "all_reduce":
            assert attrs["reduce"] == "sum", attrs
            return all_reduce(context, x, ranks=group.size)
        assert attrs["op"] == "all_gather", attrs
        flat = all_gather(context, x.reshape(-1), size=x.numel() * group.size, ranks=group.size)
        return flat.view(-1, *x.shape[1:])


def _agrees(value: Value, tensor: Tensor, where: str) -> None:
    """What was computed has the dtype and, where it is declared, the shape of the network."""
    if tensor.dtype != value.dtype:
        raise Mismatch(f"{where}: {value.name} is {tensor.dtype}, declared {value.dtype}")
    fits = tensor.ndim == len(value.shape) and all(
        declared in (-1, size) for declared, size in zip(value.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise Mismatch(f"{where}: {value.name} is {tuple(tensor.shape)}, declared {value.shape}")
