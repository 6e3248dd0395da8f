"""`RankPlan`: what running a rank's engines needs to know, as plan.json in its directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.engine.tensorrt.io import Profile
from llmforge.errors import StoreError
from llmforge.model.graph import Tensor

PLAN_FILE = "plan.json"
KERNELS = "kernels"


@dataclass(frozen=True)
class CachePlan:
    """A cache [slots, heads, capacity, size] that lives from call to call.

    name: of the engine's input. output: of the engine's output: the updated cache in the same
    memory where `native_cache`, else the new positions [B, heads, S, size].
    """

    name: str
    output: str
    heads: int
    size: int
    dtype: str


@dataclass(frozen=True)
class WeightPlan:
    """Weights that engines take as an input, and where in the rank's file of them they lie."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Step:
    """One thing to do in a call. Kinds, with the fields that they have:

    engine      file, inputs, outputs: run the engine; caches are among inputs and outputs.
                local: what the engine itself calls its inputs and then its outputs; empty: the
                same. weights: what its inputs weight.0, weight.1, … (io.py) take
    all_reduce  x, out, ranks: the sum over that many tensor-parallel ranks
    all_gather  x, out, size, ranks: the ranks' x side by side in the last dimension, its first
                `size` elements
    send        x, peer: to that rank of the whole engine
    recv        out, peer: from that rank
    """

    kind: str
    file: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    x: str = ""
    out: str = ""
    size: int = 0
    peer: int = 0
    ranks: int = 0


@dataclass(frozen=True)
class RankPlan:
    """How a rank computes a call.

    package, version: what built the engines, and so has to run them. archs: the GPUs they are for;
    none: the kind of GPU they were built on, `gpu`. capacity: positions of a slot.
    native_cache: whether engines update the caches in place. in_engine_ranks: the tensor-parallel
    ranks among which engines communicate themselves (1: none does).
    inputs: the step's inputs that any engine reads. tensors: by name, the hidden states that
    stand at the edge of an engine or are exchanged; shapes are the graph's ("tokens", "rows").
    logits: the tensor [rows, vocab] float32 to draw from; None where the rank has none.
    profiles: prefill, decode. kernels: of ours, as write_images tells. weights: those that are
    inputs, in the order of their file; none: all are in the engines.
    """

    package: str
    version: str
    archs: tuple[str, ...]
    gpu: str
    primitives: bool
    dtype: str
    capacity: int
    slots: int
    native_cache: bool
    in_engine_ranks: int
    profiles: tuple[Profile, ...]
    inputs: tuple[str, ...]
    caches: tuple[CachePlan, ...]
    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor]
    logits: str | None
    kernels: Mapping[str, Mapping[str, str]]
    weights: tuple[WeightPlan, ...] = ()

    @property
    def prefill_batch(self) -> int:
        """The most rows of a prefill call."""
        return self.profiles[0].B[2]

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        values["steps"] = [_given(step) for step in values["steps"]]
        values["tensors"] = {t.name: [list(t.shape), t.dtype] for t in self.tensors.values()}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError on anything else."""
        values: dict[str, Any] = json.loads(text)
        values["archs"], values["inputs"] = tuple(values["archs"]), tuple(values["inputs"])
        values["profiles"] = tuple(
            Profile(**{name: tuple(sizes) for name, sizes in profile.items()})
            for profile in values["profiles"]
        )
        values["caches"] = tuple(CachePlan(**cache) for cache in values["caches"])
        values["weights"] = tuple(WeightPlan(**weight) for weight in values["weights"])
        values["steps"] = tuple(Step(**_with_tuples(step)) for step in values["steps"])
        values["tensors"] = {
            name: Tensor(name, tuple(shape), dtype)
            for name, (shape, dtype) in values["tensors"].items()
        }
        return cls(**values)

    @classmethod
    def read(cls, directory: Path) -> RankPlan:
        """The plan of a rank's directory. Raises StoreError where there is none to read."""
        path = directory / PLAN_FILE
        try:
            return cls.from_json(path.read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is corrupt ({error}); build the engine again with: llmforge build"
            ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _given(step: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a step of this kind has."""
    return {
        name: value for name, value in step.items() if value not in ("", (), 0) or name == "peer"
    }
