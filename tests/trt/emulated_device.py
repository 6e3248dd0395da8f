"""An emulation of a GPU on CPU memory, for engine/tensorrt/device.py's `Device`.

What is asked of the stream waits in a queue until `synchronize`, as late as a GPU may run it: a
host that reads a download too early, or changes an upload too early, sees it. Addresses are checked
against what was allocated, so host memory, or memory beyond a buffer, is an error and not a crash.
"""

from __future__ import annotations

import bisect
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from llmforge.kernels.driver import Sizes
from llmforge.kernels.images import of_engine
from llmforge.kernels.launch import DTYPE_BYTES, Double, Float, Launch, Operand, Size
from llmforge.safetensors_io import NUMPY_DTYPES

Call = Callable[[], None]
# (memory, arguments, the macros that specialise it, grid); buffers are `Pointer`s
Kernel = Callable[["EmulatedMemory", list[Any], dict[str, Any], tuple[int, ...]], None]
ALIGNMENT = 256


class EmulationError(AssertionError):
    """Something that a GPU or TensorRT would do wrong, often without saying so."""


class EmulatedMemory:
    """The memory of one GPU, which several ranks of a process may use: allocations by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: dict[int, tuple[int, Any]] = {}  # start -> (size, what keeps it alive)
        self._lock = threading.Lock()
        self.mail: dict[Any, Any] = {}  # what kernels of several ranks leave for one another
        self.arrived = threading.Condition()

    def allocate(self, nbytes: int) -> int:
        raw = ctypes.create_string_buffer(nbytes + ALIGNMENT)  # zeroed, as the protocol says
        start = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            bisect.insort(self._starts, start)
            self._blocks[start] = (nbytes, raw)
        return start

    def free(self, address: int) -> None:
        with self._lock:
            if address not in self._blocks:
                raise EmulationError(f"{address:#x} was not allocated, or is freed already")
            self._starts.remove(address)
            del self._blocks[address]

    def owner(self, address: int) -> int:
        """The allocation that the address lies in. EmulationError where there is none."""
        with self._lock:
            index = bisect.bisect_right(self._starts, address) - 1
            if index >= 0:
                start = self._starts[index]
                if address < start + self._blocks[start][0]:
                    return start
        raise EmulationError(f"{address:#x} is not device memory")

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The device's bytes. EmulationError where they are not all of one allocation."""
        if nbytes == 0:
            return np.empty(0, np.uint8)
        start = self.owner(address)
        if address + nbytes > start + self._blocks[start][0]:
            raise EmulationError(f"{nbytes} bytes at {address:#x} reach beyond their allocation")
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def array(self, address: int, dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
        """An array in device memory."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        return self.bytes_at(address, count * kind.itemsize).view(kind).reshape(shape)

    @property
    def allocated(self) -> int:
        """Bytes that are not freed."""
        return sum(size for size, _ in self._blocks.values())


class EmulatedDevice:
    """The `Device` protocol on `EmulatedMemory`. `kernels` say what our kernels do, by entry."""

    description = "emulated GPU"
    identity = "emulated"

    def __init__(
        self, memory: EmulatedMemory, kernels: dict[str, Kernel], capability: tuple[int, int]
    ) -> None:
        self.memory = memory
        self.capability = capability
        self.stream = id(self)
        self.launches: list[str] = []  # entries of the kernels that ran
        self.captures = 0
        self._kernels = kernels
        self._loaded: dict[str, Kernel] = {}
        self._queue: list[Call] = []
        self._recording: list[Call] | None = None
        self._mine: set[int] = set()

    def enqueue(self, call: Call, stream: int) -> None:
        """Let `call` run when its turn on the stream comes."""
        if stream != self.stream:
            raise EmulationError("work for a stream that is not the device's")
        (self._queue if self._recording is None else self._recording).append(call)

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def allocate(self, nbytes: int) -> int:
        self._not_recorded("allocates memory")
        address = self.memory.allocate(max(nbytes, 1))
        self._mine.add(address)
        return address

    def free(self, address: int) -> None:
        self._not_recorded("frees memory")
        self.synchronize()
        self.memory.free(address)
        self._mine.remove(address)

    def host_array(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.zeros(nbytes, np.uint8)

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        assert array.flags.c_contiguous
        target = self.memory.bytes_at(address, array.nbytes)
        source = array.reshape(-1).view(np.uint8)

        def copy() -> None:
            target[:] = source

        self.enqueue(copy, self.stream)

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        assert array.flags.c_contiguous
        source = self.memory.bytes_at(address, array.nbytes)
        target = array.reshape(-1).view(np.uint8)

        def copy() -> None:
            target[:] = source

        self.enqueue(copy, self.stream)

    def synchronize(self) -> None:
        self._not_recorded("waits for the device")
        queue, self._queue = self._queue, []
        for call in queue:
            call()

    def capture(self, body: Call) -> Call | None:
        self._not_recorded("captures")
        self._recording = recorded = []
        try:
            body()
        finally:
            self._recording = None
        self.captures += 1

        def replay() -> None:
            for call in recorded:
                self.enqueue(call, self.stream)

        return replay

    def load_kernels(self, images: Any) -> None:
        for key, (image, entry) in images.items():
            if not image or entry not in self._kernels:
                raise EmulationError(f"the kernel {entry} has no image, or no emulation")
            self._loaded[key] = self._kernels[entry]

    def bind(self, launch: Launch, address_of: Callable[[str], int], sizes: Sizes) -> Call:
        kernel = of_engine(self._loaded, launch.kernel)

        def value(argument: Any) -> Any:
            if isinstance(argument, Operand):
                offset = argument.offset * DTYPE_BYTES[argument.dtype]
                address = address_of(argument.buffer) + offset
                return Pointer(self.memory, address, argument.dtype)
            if isinstance(argument, Size):
                return lambda: sizes.get(argument.name)
            if isinstance(argument, (Float, Double)):
                return argument.value
            return argument

        bound = [value(argument) for argument in launch.arguments]
        defines = dict(launch.kernel.defines)

        def extent(size: Any) -> int:
            if isinstance(size, Size):
                return -(-sizes.get(size.name) * size.times // size.per)
            return int(size)

        def ask() -> None:
            # A launch takes its sizes when it is asked for, and keeps them.
            now = [a() if callable(a) else a for a in bound]
            grid = tuple(map(extent, launch.grid))
            if not all(grid):
                raise EmulationError(f"{launch.kernel.entry} is launched with the grid {grid}")

            def run() -> None:
                self.launches.append(launch.kernel.entry)
                kernel(self.memory, now, defines, grid)

            self.enqueue(run, self.stream)

        return ask

    def share(self, address: int) -> bytes:
        if self.memory.owner(address) != address:
            raise EmulationError("only whole allocations are shared")
        return address.to_bytes(64, "little")

    def open_shared(self, handle: bytes) -> int:
        return self.memory.owner(int.from_bytes(handle, "little"))

    def close_shared(self, address: int) -> None:
        self.memory.owner(address)

    def close(self) -> None:
        self.synchronize()
        for address in tuple(self._mine):
            self.free(address)

    def _not_recorded(self, what: str) -> None:
        if self._recording is not None:
            raise EmulationError(f"{what} while a graph is being captured")


class Pointer:
    """A kernel's buffer."""

    def __init__(self, memory: EmulatedMemory, address: int, dtype: str) -> None:
        self.memory, self.address, self.dtype = memory, address, dtype

    def array(self, *shape: int) -> np.ndarray[Any, Any]:
        """The first elements of the buffer, of this shape."""
        return self.memory.array(self.address, NUMPY_DTYPES[self.dtype], *shape)
