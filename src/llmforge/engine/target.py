"""What a target is: the `Target` and `Executable` protocols, and the registry of targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmforge.comm import Comm
from llmforge.engine.memory import MemoryPlan
from llmforge.engine.step import Int32, Limits, StepBatch, StepResult
from llmforge.errors import SettingsError, TargetError
from llmforge.model.graph import Graph, Parameter
from llmforge.parallel import Topology
from llmforge.settings import BuildSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Checksums = Mapping[str, tuple[int, str]]


class Weights(Protocol):
    """Where a target takes a rank's weights from while it compiles."""

    def read(self, parameter: Parameter) -> NDArray[np.generic]:
        """This rank's values of a graph parameter, contiguous, with the parameter's shape.
        bfloat16 is ml_dtypes.bfloat16. Each call reads from the checkpoint anew."""
        ...

    def map(self, parameter: Parameter) -> NDArray[np.generic]:
        """As `read`, but read-only, and not copied where the checkpoint's file has the values in
        one piece."""
        ...

    def release(self) -> None:
        """Let go of the memory of what is mapped: what is touched again is read again."""
        ...

    def report(self, fraction: float) -> None:
        """How much of its work, from 0 to 1, a target has done where reading is not most of it."""
        ...


class Executable(Protocol):
    """One rank's engine, loaded."""

    @property
    def limits(self) -> Limits: ...

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step. Called with the same batch on every rank of the engine; the result is
        complete on rank 0 and empty elsewhere."""
        ...

    def close(self) -> None:
        """Give back what the executable holds."""
        ...


@runtime_checkable
class RunsAhead(Protocol):
    """An executable that takes a step while the one before still runs. It draws on its device, so
    that the tokens need not pass through the host."""

    def begin(self, batch: StepBatch) -> Callable[[], Int32]:
        """Begin a step; the function that is returned waits for it and gives the tokens [R]. Call
        each once, in order, and before the next step but one begins. As `Executable.step`, this is
        called on every rank; the tokens are given on rank 0, and none elsewhere.

        A token id below zero stands for what the step before draws: ``~i`` for its row i. The last
        token of a row's history may be such too.
        """
        ...


class Target(Protocol):
    """A way to compile and execute graphs. Rows of `TARGETS` name its class."""

    @property
    def name(self) -> str: ...

    @property
    def linear_cache(self) -> bool:
        """Whether a sequence's keys and values lie in one piece, a slot of the cache, instead of
        in blocks: then a block is as long as a sequence and there is one for each sequence."""
        ...

    def configured(self, settings: BuildSettings) -> Target:
        """This target with those build options that it alone reads. Raises SettingsError for
        values that it cannot use."""
        ...

    @property
    def compiles_apart(self) -> bool:
        """Whether `compile` is for a process of its own: it takes long, and cannot be interrupted
        otherwise."""
        ...

    @property
    def needs_gpu(self) -> bool:
        """Whether engines run on an NVIDIA GPU alone, wherever they are built."""
        ...

    def details(self) -> dict[str, Any]:
        """What engine.yaml says of how the target built, as plain values."""
        ...

    def available(self) -> str | None:
        """None where this machine can build for the target, else the reason in a line (what is
        missing, and the command that installs it). What it lacks to run an engine, `load` says."""
        ...

    def prepare(self, graph: Graph) -> Graph:
        """The graph as this target wants it: its list of passes applied."""
        ...

    def memory(self, graph: Graph, limits: Limits) -> MemoryPlan:
        """The memory that a rank with this prepared graph will need."""
        ...

    def compile_peak(self, plan: MemoryPlan) -> int:
        """The most memory in bytes that compiling a rank with this plan takes, about."""
        ...

    def compile(self, graph: Graph, weights: Weights, limits: Limits, out: Path) -> Checksums:
        """Write a rank's artifact into the empty directory `out`. `graph` is prepared.
        Returns size and checksum of the files that were hashed as they were written."""
        ...

    def load(self, directory: Path, topology: Topology, limits: Limits, comm: Comm) -> Executable:
        """The executable of this rank from the directory that `compile` wrote.
        `comm` holds all ranks of the engine. Raises StoreError where a file is corrupt."""
        ...


TARGETS = {
    "cpu": "llmforge.engine.cpu.target:CpuTarget",
    "cuda": "llmforge.engine.cuda.target:CudaTarget",
    "tensorrt": "llmforge.engine.tensorrt.target:StandardTensorRTTarget",
    "tensorrt-rtx": "llmforge.engine.tensorrt.target:TensorRTRTXTarget",
}


def target(name: str) -> Target:
    """The target of this name. Raises SettingsError for an unknown name, TargetError for one
    that this machine cannot use."""
    if name not in TARGETS:
        raise SettingsError(f"unknown target {name!r}; allowed: {', '.join(sorted(TARGETS))}")
    module, _, cls = TARGETS[name].partition(":")
    try:
        found: Target = getattr(importlib.import_module(module), cls)()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TargetError(
            f"target {name} cannot be used here: torch is not installed; "
            "run: pip install 'llmforge[torch]'"
        ) from error
    if reason := found.available():
        raise TargetError(f"target {name} cannot be used here: {reason}")
    return found
