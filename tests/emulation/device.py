"""An emulated GPU: kernels' libraries loaded, and launches on buffers in this process's memory.

Stands in for `llmforge.kernels.driver`: `EmulatedModule` for its Module, `EmulatedLaunch` for its
BoundLaunch, `EmulatedMemory` for exchange.DriverMemory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emulation.build import library
from llmforge.kernels.compile import KernelSpec
from llmforge.kernels.driver import Arguments, Sizes
from llmforge.kernels.launch import DTYPE_BYTES, AnyMap, Launch, Operand

PROCESSORS = 6
_STACKS = 1024 * (64 << 10)  # MAX_THREADS * STACK_BYTES of fibers.h


class EmulationError(Exception):
    """What a kernel did that a GPU would not have borne."""


class Device:
    """What the kernels of one rank share. Ranks are threads of this process, and a library's
    variables are those of one GPU, so each device loads copies of its own. With an odd seed blocks
    run from the last to the first; blocks of several ranks that wait for each other must run in
    the same order on all of them."""

    def __init__(self, seed: int = 0) -> None:
        self._stacks = np.empty(_STACKS + 64, np.uint8)
        self.stacks = -(-self._stacks.ctypes.data // 64) * 64
        self._seed = seed
        self._launches = 0
        self._modules: dict[tuple[KernelSpec, str | None], EmulatedModule] = {}
        self._hidden = np.zeros((0, 2), np.uint64)
        self._copy = np.zeros(0, np.uint8)
        self.watched = np.zeros(0, np.uint8)

    def watch(self, tensor: torch.Tensor) -> None:
        """Launches write nothing of it but what their operands are."""
        self.watched = tensor.reshape(-1).view(torch.uint8).numpy()

    def hide(self, tensors: Iterable[torch.Tensor]) -> None:
        """What a kernel must not touch before it has waited for those before it, which write it."""
        ranges = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        self._hidden = np.array(ranges, np.uint64)
        self._copy = np.zeros(sum(nbytes for _, nbytes in ranges), np.uint8)
        for module in self._modules.values():
            self._hide_from(module)

    def _hide_from(self, module: EmulatedModule) -> None:
        module.hide(self._hidden.ctypes.data, len(self._hidden), self._copy.ctypes.data)

    def module(
        self, spec: KernelSpec, arch: str = "sm_90", text: str | None = None
    ) -> EmulatedModule:
        """The kernel, loaded; see `build.library`."""
        if (spec, text) not in self._modules:
            loaded = _copy_of(library(spec, arch, text))
            self._modules[spec, text] = EmulatedModule(self, loaded, spec.entry)
            self._hide_from(self._modules[spec, text])
        return self._modules[spec, text]

    def next_seed(self) -> int:
        self._launches += 1
        return (self._seed << 32) + self._launches


def _copy_of(path: Path) -> ctypes.CDLL:
    descriptor, name = tempfile.mkstemp(suffix=".so")
    os.close(descriptor)
    try:
        shutil.copyfile(path, name)
        return ctypes.CDLL(name)
    finally:
        os.unlink(name)


class EmulatedModule:
    """A kernel on a device."""

    def __init__(self, device: Device, loaded: ctypes.CDLL, entry: str) -> None:
        self.device, self.entry = device, entry
        self.hide = loaded.emulated_hide
        self.hide.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self.launch = loaded.emulated_launch
        self.launch.restype = ctypes.c_char_p
        self.launch.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p,
            ctypes.c_uint64,
        ]  # fmt: skip


class EmulatedLaunch:
    """driver.BoundLaunch, emulated: call it, with any stream, to run the grid to its end. Raises
    EmulationError."""

    def __init__(
        self,
        launch: Launch,
        module: EmulatedModule,
        address_of: Callable[[str], int],
        sizes: Sizes,
        *,
        overlap: bool = False,
    ) -> None:
        self._launch, self._module, self._sizes = launch, module, sizes
        self._arguments = Arguments(launch, address_of, sizes, _encode)
        operands = [a for a in launch.arguments if isinstance(a, Operand)]
        self._operands = [(o, address_of(o.buffer)) for o in operands]

    def __call__(self, stream: int = 0) -> None:
        grid = (ctypes.c_uint * 3)(*map(self._sizes.extent, self._launch.grid))
        if not grid[0]:
            return
        device = self._module.device
        before = device.watched.copy()
        failure = self._module.launch(
            self._arguments.pointers, grid, self._launch.block, self._launch.shared_bytes,
            device.stacks, device.next_seed(),
        )  # fmt: skip
        if failure:
            raise EmulationError(f"{self._module.entry}: {failure.decode()}")
        changed = np.flatnonzero(before != device.watched)
        if len(changed):
            self._check_places(changed + device.watched.ctypes.data)

    def _check_places(self, addresses: np.ndarray[Any, Any]) -> None:
        """That each of them lies within an operand."""
        allowed = np.zeros(len(addresses), bool)
        watched = self._module.device.watched
        for operand, start in self._operands:
            if not 0 <= start - watched.ctypes.data < watched.nbytes:
                continue
            sizes = [d if isinstance(d, int) else self._sizes.get(d) for d in operand.shape]
            itemsize = DTYPE_BYTES[operand.dtype]
            first = start + operand.offset * itemsize
            row = int(np.prod(sizes[1:])) if len(sizes) > 1 else 1
            stride = operand.row_stride if len(sizes) > 1 else 1
            stop = first + ((sizes[0] - 1) * stride + row) * itemsize
            allowed |= (addresses >= first) & (addresses < stop)
        if not allowed.all():
            count = int((~allowed).sum())
            raise EmulationError(f"{self._module.entry}: writes outside its operands ({count} B)")


def _encode(map: AnyMap, address: int) -> tuple[Any, int]:
    """EncodedMap of copies.h, aligned as a TensorMap is, and its address."""
    itemsize = DTYPE_BYTES[map.matrix.dtype]
    buffer = np.zeros(128 + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    encoded = buffer[start : start + 128]
    encoded[:64].view(np.uint64)[:] = address, *map.sizes, *map.strides
    encoded[64:84].view(np.uint32)[:] = *reversed(map.box), itemsize
    return buffer, encoded.ctypes.data


class EmulatedMemory:
    """exchange.DeviceMemory between ranks that are threads of this process."""

    def __init__(self) -> None:
        self._allocations: dict[int, Any] = {}

    def allocate(self, nbytes: int) -> int:
        array = np.zeros(nbytes // 8 + 32, np.uint64)
        address = -(-array.ctypes.data // 256) * 256
        self._allocations[address] = array
        return address

    def free(self, address: int) -> None:
        del self._allocations[address]

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def synchronize(self) -> None:
        pass

    def share(self, address: int) -> bytes:
        return address.to_bytes(8, "little")

    def open_shared(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    def close_shared(self, address: int) -> None:
        pass
