"""The cuda target's executable on an emulated GPU: all of its own code but the calls to CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emulation.build import libraries
from emulation.device import PROCESSORS, Device, EmulatedLaunch, EmulatedMemory, EmulatedModule
from llmforge.comm import Comm, LocalComm
from llmforge.engine.cuda import buffers, executable, ranks
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import engine_kernels
from llmforge.engine.step import Limits
from llmforge.kernels.compile import KernelSpec
from llmforge.model.graph import Graph
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology


@dataclasses.dataclass(frozen=True)
class _Replayed:
    """A CUDA graph that computes what was captured anew."""

    launch_all: Any

    def replay(self) -> None:
        self.launch_all()


class _Torch:
    """torch, with the processor's memory for that of a GPU of `arch`."""

    def __init__(self, arch: str) -> None:
        stream = SimpleNamespace(
            synchronize=lambda: None, wait_stream=lambda other: None, cuda_stream=0
        )
        self.cuda = SimpleNamespace(
            current_device=lambda: 0,
            Stream=lambda device: stream,
            Event=lambda enable_timing=False: SimpleNamespace(
                record=lambda: None, synchronize=lambda: None, elapsed_time=lambda stop: 2.0
            ),
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda: stream,
            get_device_properties=lambda device: SimpleNamespace(multi_processor_count=PROCESSORS),
            get_device_capability=lambda device: (int(arch.removeprefix("sm_")) // 10, 0),
            empty_cache=lambda: None,
            CUDAGraph=torch.cuda.CUDAGraph,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, kind: str, index: int) -> torch.device:
        return torch.device("cpu")

    def zeros(self, *shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*shape, **options)


def _capture(runner: Any) -> None:
    runner.graph = _Replayed(runner._launch_all)


@contextlib.contextmanager
def emulated_gpu(arch: str = "sm_90") -> Iterator[None]:
    """Within it, executables run on emulated GPUs, and torch on one thread: its products are tiny,
    and others that test at the same time want their processors."""
    fake, threads = _Torch(arch), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (executable, buffers):
            patch.setattr(module, "torch", fake)
        patch.setattr(executable, "BoundLaunch", EmulatedLaunch)
        patch.setattr(executable._Runner, "capture", _capture)
        patch.setattr(ranks, "DriverMemory", EmulatedMemory)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


class _Modules(Mapping[str, EmulatedModule]):
    """An engine's kernels on a device of its own, loaded where they are first wanted."""

    def __init__(self, specs: Mapping[str, KernelSpec], arch: str, seed: int) -> None:
        self._specs, self._arch, self.device = specs, arch, Device(seed)

    def __getitem__(self, key: str) -> EmulatedModule:
        return self.device.module(self._specs[key], self._arch)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def emulated(
    graph: Graph,
    weights: Any,
    limits: Limits,
    arch: str = "sm_90",
    comm: Comm | None = None,
    topology: Topology | None = None,
    seed: int = 0,
    choice: KernelChoice = MEASURED,
) -> executable.CudaExecutable:
    """The executable of a prepared graph. Wants `emulated_gpu(arch)` around it and its steps."""
    torch.set_num_threads(1)  # for the thread of a rank too
    tensors = {p.name: _tensor(weights.read(p), p.dtype) for p in graph.parameters}
    specs = engine_kernels(graph, limits, arch, choice)
    libraries(list(specs.values()), arch)
    joined = ranks.Ranks(comm or LocalComm(), topology or Topology(), torch.device("cpu"))
    modules: Any = _Modules(specs, arch, seed)
    made = executable.CudaExecutable(graph, tensors, modules, arch, limits, joined, choice)
    # Not the caches: what earlier steps wrote there may be read at once.
    scratch = [t for name, t in made.memory.tensors.items() if name.startswith("scratch.")]
    modules.device.hide([made.memory.arena, *scratch])
    modules.device.watch(made.memory.arena)
    return made


def _tensor(array: Any, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.astype("float32")).to(DTYPES[dtype])
