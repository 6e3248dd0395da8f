"""`Rank`: what the runners of a loaded rank share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmforge.engine.step import Limits
from llmforge.engine.tensorrt.device import Device
from llmforge.engine.tensorrt.memory import Memory
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.engine.tensorrt.runtime_cache import RuntimeCache, runtime_cache_path
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
        weights: Mapping[str, int],
    ) -> None:
        """engines: by file. draws: whether this rank draws tokens. regions: the memory in which it
        meets other ranks. communicator: NCCL's, for collectives inside engines. weights: the
        addresses of those that are inputs."""
        self.plan, self.limits, self.package, self.device = plan, limits, package, device
        self.sizes, self.draws = sizes, draws
        self.memory = Memory(plan, limits, device)
        self._engines = engines
        self._regions = regions
        self._weights = weights
        self._communicator = communicator
        self._cache = None
        if package.features.runtime_cache:
            path = runtime_cache_path(package, device.description)
            self._cache = RuntimeCache(package, path)
        # Calls run one after another, so all contexts can compute in the same memory.
        most = max((package.context_memory(engine) for engine in engines.values()), default=0)
        self._scratch = device.allocate(most)

    def context(self, file: str, profile: int) -> Any:
        """A new execution context of an engine."""
        engine = self._engines[file]
        config = self._cache.config(engine, profile) if self._cache else None
        context = self.package.create_context(
            engine, profile, self.device.stream, self._scratch, config
        )
        if self._communicator is not None:
            self.package.set_communicator(context, self._communicator)
        return context

    def compiled(self) -> None:
        """All contexts have run once: keep what was compiled for that."""
        if self._cache is not None:
            self._cache.store()

    def address(self, name: str) -> int:
        """Of a buffer that all calls share."""
        if name in self._weights:
            return self._weights[name]
        if self._regions is not None and not self.memory.knows(name):
            return self._regions.addresses[name]
        return self.memory.address(name)
