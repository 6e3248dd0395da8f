"""Weights that are inputs of engines: a file of them, one behind the other, as the networks want
them."""

from __future__ import annotations

import mmap
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.tensorrt.device import Device
from llmforge.engine.tensorrt.plan import RankPlan, WeightPlan
from llmforge.engine.tensorrt.written_file import WrittenFile
from llmforge.errors import StoreError

WEIGHTS_FILE = "weights.bin"
_ALIGNMENT = 256  # of the first byte of each, which is as device memory is


class WeightFile:
    """Being written, in the directory of a rank. Each weight is there once, however many engines
    take it."""

    def __init__(self, file: WrittenFile) -> None:
        self._file = file
        self._plans: dict[Hashable, WeightPlan] = {}

    @property
    def plans(self) -> tuple[WeightPlan, ...]:
        return tuple(self._plans.values())

    def has(self, key: Hashable) -> bool:
        return key in self._plans

    def add(self, key: Hashable, name: str, array: NDArray[Any]) -> None:
        """Write the weight that `key` stands for."""
        assert array.flags.c_contiguous
        if gap := -self._file.size % _ALIGNMENT:
            self._file.write(memoryview(bytes(gap)))
        self._plans[key] = WeightPlan(f"{name}.{len(self._plans)}", self._file.size, array.nbytes)
        self._file.write(memoryview(array.reshape(-1).view(np.uint8).data))

    def name(self, key: Hashable) -> str:
        """What the plan calls it."""
        return self._plans[key].name


def upload_weights(plan: RankPlan, directory: Path, device: Device) -> dict[str, int]:
    """The addresses on the device of the plan's weights. Raises StoreError where their file is not
    whole."""
    if not plan.weights:
        return {}
    path, last = directory / WEIGHTS_FILE, plan.weights[-1]
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != last.offset + last.nbytes:
            raise ValueError(f"it has {len(mapped):,} bytes")
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); build the engine again with: llmforge build"
        ) from error
    first = device.allocate(len(mapped))
    device.upload(first, np.frombuffer(mapped, np.uint8))
    device.synchronize()
    return {weight.name: first + weight.offset for weight in plan.weights}
