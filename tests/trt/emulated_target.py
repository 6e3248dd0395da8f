"""The tensorrt targets on an emulated machine: engines built and run with no GPU, by the project's
own builder, executable and scheduler over an emulation of TensorRT and of the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from emulated_device import EmulatedDevice, EmulatedMemory
from emulated_kernels import KERNELS
from emulated_tensorrt import Machine, Module
from thread_comm import run_ranks
from tiny_models import MemoryCheckpoint

from llmforge.comm import Comm
from llmforge.engine.step import Limits
from llmforge.engine.tensorrt import executable as executables
from llmforge.engine.tensorrt import target as targets
from llmforge.engine.tensorrt.builder import BuildOptions
from llmforge.engine.tensorrt.executable import TensorRTExecutable
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.target import TensorRTTarget
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.images import Index, image_name
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request

CAPABILITY = (8, 9)
ARCHS = ("sm_89",)


def emulated_images(
    kernels: Mapping[str, Sequence[KernelSpec]], directory: Path, cache: Path | None
) -> Index:
    """Files where compiled kernels would be: an emulated device runs none of them."""
    directory.mkdir()
    for arch, specs in kernels.items():
        for spec in specs:
            (directory / image_name(spec.key, arch)).write_bytes(b"emulated")
    return {arch: {spec.key: spec.entry for spec in specs} for arch, specs in kernels.items()}


@dataclass
class EmulatedCommunicator:
    """In place of NCCL's: a group of threads, known by an address."""

    address: int
    closed: bool = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class Rig:
    """An emulated machine with one GPU, which all ranks share, and what is asked of it.

    version: of `tensorrt`; None: tensorrt_rtx.
    """

    patch: pytest.MonkeyPatch
    version: str | None = None
    capability: tuple[int, int] = CAPABILITY
    machine: Machine = field(default_factory=Machine)
    memory: EmulatedMemory = field(default_factory=EmulatedMemory)
    devices: list[EmulatedDevice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patch.setattr(targets, "write_images", emulated_images)
        self.patch.setattr(targets, "_gpu_name", lambda: EmulatedDevice.description)
        self.patch.setattr(executables, "communicator", self._communicator)

    @property
    def name(self) -> str:
        return "tensorrt-rtx" if self.version is None else "tensorrt"

    def package(self) -> Package:
        return Package(self.name, Module(self.machine, self.version))

    def device(self) -> EmulatedDevice:
        device = EmulatedDevice(self.memory, KERNELS, self.capability)
        self.machine.devices[device.stream] = device
        self.devices.append(device)
        return device

    def build(
        self,
        directory: Path,
        checkpoint: MemoryCheckpoint,
        limits: Limits,
        topology: Topology,
        *,
        primitives: bool = False,
    ) -> None:
        """The rank directories of an engine."""
        archs = ARCHS if self.version is None else ()
        for rank in range(topology.world_size):
            out = directory / f"rank{rank}"
            out.mkdir(parents=True)
            options = BuildOptions(archs=archs, primitives=primitives)
            target = TensorRTTarget(self.name, options, self.package())
            graph = target.prepare(trace(checkpoint.config, topology, rank))
            target.compile(graph, checkpoint.of_rank(topology, rank), limits, out)

    def load(
        self, directory: Path, topology: Topology, limits: Limits, comm: Comm
    ) -> TensorRTExecutable:
        where = directory / f"rank{comm.rank}"
        return TensorRTExecutable(where, topology, limits, comm, self.package(), self.device())

    def serve(
        self,
        directory: Path,
        topology: Topology,
        limits: Limits,
        requests: Sequence[Request],
        vocab_size: int,
        see: Callable[[TensorRTExecutable], None] = lambda _: None,
    ) -> list[tuple[int, ...]]:
        """The tokens of each request, ranks as threads. `see` is shown rank 0's executable after
        that; then all memory has to be given back."""

        def rank(comm: Comm) -> list[tuple[int, ...]]:
            executable = self.load(directory, topology, limits, comm)
            done: list[tuple[int, ...]] = []
            if comm.rank == 0:
                completions = generate(executable, comm, requests, vocab_size=vocab_size)
                done = [completion.token_ids for completion in completions]
                see(executable)
            else:
                follow(executable, comm)
            executable.close()
            return done

        tokens = run_ranks(topology.world_size, rank)[0]
        assert self.memory.allocated == 0, "device memory is left allocated"
        return tokens

    def _communicator(self, plan: Any, topology: Topology, comm: Comm, device: Any) -> Any:
        if plan.in_engine_ranks == 1:
            return None
        group = comm.split(topology.stage(comm.rank))
        address = id(group)
        self.machine.communicators[address] = group
        return EmulatedCommunicator(address)
