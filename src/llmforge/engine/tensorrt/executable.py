"""A rank's TensorRT engines on the GPU: loading them, and running a step.

A step's calls are asked of the device one behind the other, and the host waits once, at its end.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmforge.comm import Comm
from llmforge.engine.device_sampling import check_drawn
from llmforge.engine.step import Float32, Int32, Limits, StepBatch, StepResult
from llmforge.engine.tensorrt.calls import Call, CallShapes, decode_batches, split
from llmforge.engine.tensorrt.collectives import communicator, shared_regions
from llmforge.engine.tensorrt.device import Device
from llmforge.engine.tensorrt.kernels import SIZES
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import KERNELS, RankPlan
from llmforge.engine.tensorrt.rank import Rank
from llmforge.engine.tensorrt.runner import HostSide, Runner
from llmforge.engine.tensorrt.weight_file import upload_weights
from llmforge.errors import StoreError, TargetError
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, TENSOR_RANK
from llmforge.kernels.driver import Sizes
from llmforge.kernels.images import read_images
from llmforge.parallel import Topology

REBUILD = "llmforge build CHECKPOINT -o ENGINE --overwrite --target "


class TensorRTExecutable:
    """One rank. `device` is this rank's GPU, which the executable closes."""

    def __init__(
        self,
        directory: Path,
        topology: Topology,
        limits: Limits,
        comm: Comm,
        package: Package,
        device: Device,
    ) -> None:
        """Raises TargetError where this machine cannot run the engine, StoreError where a file of
        it is corrupt."""
        self.limits = limits
        self._comm, self._device = comm, device
        plan = RankPlan.read(directory)
        check_runnable(plan, package, device)
        _load_kernels(plan, directory, device)
        runtime = package.runtime()
        files = dict.fromkeys(step.file for step in plan.steps if step.kind == "engine")
        engines = {file: _deserialize(runtime, directory / file, package) for file in files}
        self._sizes = Sizes((*SIZES, TENSOR_RANK, GROUP_SLOT, MAIL_SLOT))
        self._regions = shared_regions(plan, topology, comm, device, self._sizes)
        self._communicator = communicator(plan, topology, comm, device)
        self._rank = Rank(
            plan,
            limits,
            package,
            engines,
            device,
            self._sizes,
            draws=comm.rank == 0,
            regions=self._regions,
            communicator=self._communicator.address if self._communicator else None,
            weights=upload_weights(plan, directory, device),
        )
        self._prefill = Runner(self._rank)
        self._prefill_hosts: list[HostSide] = []
        self._shapes = CallShapes(plan.capacity, decode_batches(plan.slots), plan.prefill_batch)
        # Graphs of engines that communicate by themselves are not safe in every NCCL version.
        record = self._communicator is None
        self._decodes: dict[int, tuple[Runner, HostSide]] = {}
        for size in reversed(self._shapes.decode_batches):
            runner = Runner(self._rank, size)
            host = runner.host_side()
            self._decodes[size] = (runner, host)
            if record:
                runner.capture(host)
        self._known = np.zeros(plan.slots, np.int32)
        device.synchronize()
        if comm.rank == 0:
            self._rank.compiled()

    def step(self, batch: StepBatch) -> StepResult:
        """Tokens where `batch` says how to draw them, else logits."""
        calls = split(batch, self._known, self._shapes)
        prefills = 0
        asked: list[tuple[Call, HostSide, Float32 | None]] = []
        for call in calls:
            if call.decode:
                runner, host = self._decodes[call.shape[0]]
            else:
                runner, host = self._prefill, self._prefill_host(prefills)
                prefills += 1
            runner.run(call, batch.sampling, host)
            asked.append((call, host, None if batch.sampling else self._logits(call)))
        self._device.synchronize()
        if self._comm.rank != 0:
            return StepResult()
        if not batch.sampling and len(batch.logit_rows):
            return StepResult(logits=_joined_logits(asked, len(batch.logit_rows)))
        return StepResult(tokens=_joined_tokens(asked, batch))

    def close(self) -> None:
        # Engines and their contexts go before the memory that they were given.
        self._decodes.clear()
        del self._prefill, self._rank
        if self._regions is not None:
            self._regions.close()
        if self._communicator is not None:
            self._communicator.close()
        self._device.close()

    def _prefill_host(self, index: int) -> HostSide:
        """Memory for the step's prefill call number `index`."""
        while len(self._prefill_hosts) <= index:
            self._prefill_hosts.append(self._prefill.host_side())
        return self._prefill_hosts[index]

    def _logits(self, call: Call) -> Float32 | None:
        """Where the logits of a call that was asked for will be, on rank 0."""
        plan = self._rank.plan
        if plan.logits is None or self._comm.rank != 0:
            return None
        tensor = plan.tensors[plan.logits]
        assert tensor.dtype == "float32", tensor
        vocab = tensor.shape[-1]
        assert isinstance(vocab, int)
        logits = np.empty((len(call.logit_rows), vocab), np.float32)
        self._device.download(logits, self._rank.address(tensor.name))
        return logits


def check_runnable(plan: RankPlan, package: Package, device: Device) -> None:
    """Raises TargetError where this package on this GPU cannot run the engine, before TensorRT
    says so in its own words."""
    rebuild = f"build it again here with: {REBUILD}{package.target}"
    if (plan.package, plan.version) != (package.name, package.version):
        raise TargetError(
            f"this engine was built by {plan.package} {plan.version} and {package.name} "
            f"{package.version} is installed, which cannot read it; {rebuild}"
        )
    major, minor = device.capability
    if plan.archs and f"sm_{major}{minor}" not in plan.archs:
        here = f"this machine's {device.description} has compute capability {major}.{minor}"
        if f"sm_{major}{minor}" not in package.known_archs():
            raise TargetError(
                f"{here}, which {package.name} {package.version} does not run on (it runs on "
                f"{', '.join(package.known_archs())}); build for another target: {REBUILD}cuda"
            )
        raise TargetError(
            f"{here}, and this engine was built for {', '.join(plan.archs)}; "
            f"{rebuild} --arch sm_{major}{minor}"
        )
    if not plan.archs and plan.gpu != device.description:
        raise TargetError(
            f"this engine was built on a {plan.gpu} and runs on no other kind of GPU; this "
            f"machine has a {device.description}: {rebuild}"
        )


def _load_kernels(plan: RankPlan, directory: Path, device: Device) -> None:
    try:
        images, _ = read_images(plan.kernels, directory / KERNELS, device.capability)
    except (OSError, KeyError) as error:
        raise StoreError(
            f"{directory / KERNELS} is not whole ({error}); build the engine again with: "
            "llmforge build"
        ) from error
    device.load_kernels(images)


def _deserialize(runtime: Any, path: Path, package: Package) -> Any:
    """The engine in a file, which is mapped: TensorRT reads what it needs of it."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise StoreError(
            f"{path} cannot be read ({error}); build the engine again with: llmforge build"
        ) from error
    engine = runtime.deserialize_cuda_engine(memoryview(mapped))
    if engine is None:
        raise TargetError(package.messages.reason(f"loading {path.name}"))
    return engine


def _joined_tokens(
    asked: Sequence[tuple[Call, HostSide, Float32 | None]], batch: StepBatch
) -> Int32:
    """The tokens of all calls in the order of the batch."""
    tokens = np.zeros(len(batch.logit_rows), np.int32)
    largest = np.zeros(len(batch.logit_rows), np.float32)
    for call, host, _ in asked:
        drawn, highest = host.results(len(call.results))
        wanted = call.results >= 0
        tokens[call.results[wanted]] = drawn[wanted]
        largest[call.results[wanted]] = highest[wanted]
    check_drawn(largest, batch.sampling)
    return tokens


def _joined_logits(asked: Sequence[tuple[Call, HostSide, Float32 | None]], rows: int) -> Float32:
    """The logits of all calls in the order of the batch."""
    joined = None
    for call, _, logits in asked:
        assert logits is not None, "rank 0 has the logits"
        if joined is None:
            joined = np.empty((rows, logits.shape[1]), np.float32)
        wanted = call.results >= 0
        joined[call.results[wanted]] = logits[wanted]
    assert joined is not None
    return joined
