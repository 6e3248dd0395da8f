"""Single launches on the emulated GPU, over tensors by name."""

from __future__ import annotations

import torch

from emulation.device import PROCESSORS, Device, EmulatedLaunch
from llmforge.kernels.driver import Sizes
from llmforge.kernels.launch import Launch, Operand

NAMES = ("tokens", "sequences", "rows", "longest_query", "processors")


class Bench:
    """`bench.tensors[name] = ...`, then `bench.run(launch, tokens=3)`: the launch reads and writes
    those tensors, which must be contiguous."""

    def __init__(self, seed: int = 0, extra_sizes: tuple[str, ...] = ()) -> None:
        self.device, self.sizes = Device(seed), Sizes(NAMES + extra_sizes)
        self.tensors: dict[str, torch.Tensor] = {}
        self.sizes.set("processors", PROCESSORS)

    def run(
        self, launch: Launch, arch: str = "sm_90", text: str | None = None, **sizes: int
    ) -> None:
        for name, value in sizes.items():
            self.sizes.set(name, value)
        module = self.device.module(launch.kernel, arch, text)
        EmulatedLaunch(launch, module, self.address, self.sizes)()

    def address(self, name: str) -> int:
        assert self.tensors[name].is_contiguous(), name
        return self.tensors[name].data_ptr()

    def operand(self, name: str, *dims: int | str) -> Operand:
        """The tensor of this name as an operand, its dimensions' names in place of their sizes."""
        tensor = self.tensors[name]
        shape = (*dims, *tensor.shape[len(dims) :])
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Operand(name, shape, dtype, int(tensor.shape[-1]))
