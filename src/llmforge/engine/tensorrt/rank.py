"""`Rank`: what the runners of a loaded rank share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmforge.engine.step import Limits
from llmforge.engine.tensorrt.device import Device
from llmforge.engine.tensorrt.memory import Memory
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.kernels.driver import Sizes
from llmforge.kernels.exchange import SharedRegions


class Rank:
    """A rank's engines, their memory and its device."""

    def __init__(
        self,
        plan: RankPlan,
        limits: Limits,
        package: Package,
        engines: Mapping[str, Any],
        device: Device,
        sizes: Sizes,
        *,
        draws: bool,
        regions: SharedRegions | None,
        communicator: int | None,
    ) -> None:
        """engines: by file. draws: whether this rank draws tokens. regions: the memory in which it
        meets other ranks. communicator: NCCL's, for collectives inside engines."""
        self.plan, self.limits, self.package, self.device = plan, limits, package, device
        self.sizes, self.draws = sizes, draws
        self.memory = Memory(plan, limits, device)
        self._engines = engines
        self._regions = regions
        self._communicator = communicator
        # Calls run one after another, so all contexts can compute in the same memory.
        most = max((package.context_memory(engine) for engine in engines.values()), default=0)
        self._scratch = device.allocate(most)

    def context(self, file: str, profile: int) -> Any:
        """A new execution context of an engine."""
        context = self.package.create_context(
            self._engines[file], profile, self.device.stream, self._scratch
        )
        if self._communicator is not None:
            self.package.set_communicator(context, self._communicator)
        return context

    def address(self, name: str) -> int:
        """Of a buffer that all calls share."""
        if self._regions is not None and not self.memory.knows(name):
            return self._regions.addresses[name]
        return self.memory.address(name)
