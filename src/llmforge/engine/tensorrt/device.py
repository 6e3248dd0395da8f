"""`Device`: what running an engine needs of a GPU, and `CudaDevice`, which is one.

Everything is ordered on the device's one stream, and nothing waits for it but `synchronize`.
The protocol is small so that a test can put an emulation on CPU memory in its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmforge.errors import TargetError
from llmforge.kernels.driver import BoundLaunch, Module, Sizes, check, open_handle, shared_handle
from llmforge.kernels.images import of_engine
from llmforge.kernels.launch import Launch

Bytes = NDArray[np.uint8]
Call = Callable[[], None]
Images = Mapping[str, tuple[bytes, str]]  # a kernel's (cubin or PTX, function) by its key


class Device(Protocol):
    """One GPU as this process uses it."""

    @property
    def description(self) -> str:
        """Its name, for messages: "NVIDIA H200"."""
        ...

    @property
    def identity(self) -> str:
        """The same for two processes exactly where they use the same GPU."""
        ...

    @property
    def capability(self) -> tuple[int, int]: ...

    @property
    def stream(self) -> int:
        """The handle of the stream, as TensorRT and NCCL take it."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of zeroed device memory, at a multiple of 256. Raises TargetError where
        there is not as much."""
        ...

    def free(self, address: int) -> None: ...

    def host_array(self, nbytes: int) -> Bytes:
        """Zeroed host memory that copies can run from and to while the host goes on."""
        ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device, in order of the stream. The array's bytes are read
        when the copy runs: they must not change before the device is synchronized."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous array, in order of the stream."""
        ...

    def synchronize(self) -> None:
        """Wait until everything asked for so far has run. Raises TargetError where it failed."""
        ...

    def capture(self, body: Call) -> Call | None:
        """What `body` asks of the stream, recorded: each call of the result asks for all of it
        again at once. Nothing of it has run. None where something in it cannot be recorded."""
        ...

    def load_kernels(self, images: Images) -> None:
        """Make kernels known to `bind`, by their keys."""
        ...

    def bind(self, launch: Launch, address_of: Callable[[str], int], sizes: Sizes) -> Call:
        """The launch as a function. Its buffers are at `address_of`; sizes are read from `sizes`
        at every call. Its kernel was given to `load_kernels`."""
        ...

    def share(self, address: int) -> bytes:
        """A handle with which another process on this machine opens this allocation."""
        ...

    def open_shared(self, handle: bytes) -> int:
        """The address here of memory that another process shares."""
        ...

    def close_shared(self, address: int) -> None: ...

    def close(self) -> None:
        """Give back what is still allocated."""
        ...


class CudaDevice:
    """A GPU through the CUDA driver, in the primary context that TensorRT uses too."""

    def __init__(self, index: int = 0) -> None:
        """Raises TargetError where there is no such GPU."""
        driver = _driver()
        self._driver = driver
        self._device = check(driver.cuDeviceGet(index))
        self._context = check(driver.cuDevicePrimaryCtxRetain(self._device))
        check(driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = check(driver.cuStreamCreate(int(flags)))
        self.stream = int(self._stream)
        self._modules: dict[str, Module] = {}
        self._allocated: set[int] = set()
        self._shared: set[int] = set()
        self._pinned: list[int] = []
        self._graphs: list[Any] = []

    @property
    def description(self) -> str:
        name: bytes = check(self._driver.cuDeviceGetName(100, self._device))
        return name.split(b"\0")[0].decode()

    @property
    def identity(self) -> str:
        uuid: bytes = check(self._driver.cuDeviceGetUuid(self._device)).bytes
        return uuid.hex()

    @property
    def capability(self) -> tuple[int, int]:
        names = self._driver.CUdevice_attribute
        major, minor = (
            check(self._driver.cuDeviceGetAttribute(name, self._device))
            for name in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return major, minor

    def allocate(self, nbytes: int) -> int:
        driver = self._driver
        status, address = driver.cuMemAlloc(max(nbytes, 1))
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = check(driver.cuMemGetInfo())
            raise TargetError(
                f"the GPU has {free / 1e9:.2f} of its {total / 1e9:.2f} GB free and the engine "
                f"wants {nbytes / 1e9:.2f} GB more; end what else uses it, or build the engine "
                "with smaller limits (--max-batch-size, --max-seq-len)"
            )
        check((status,))
        check(driver.cuMemsetD8Async(address, 0, max(nbytes, 1), self._stream))
        self._allocated.add(int(address))
        return int(address)

    def free(self, address: int) -> None:
        self._allocated.remove(address)
        check(self._driver.cuMemFree(address))

    def host_array(self, nbytes: int) -> Bytes:
        address = int(check(self._driver.cuMemHostAlloc(max(nbytes, 1), 0)))
        self._pinned.append(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        return array

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        check(
            self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream)
        )

    def download(self, array: NDArray[Any], address: int) -> None:
        assert array.flags.c_contiguous
        check(
            self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream)
        )

    def synchronize(self) -> None:
        check(self._driver.cuStreamSynchronize(self._stream))

    def capture(self, body: Call) -> Call | None:
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(driver.cuStreamBeginCapture(self._stream, mode))
        try:
            body()
        except TargetError:
            # Where a call may not be recorded the capture is void; the stream is usable again.
            driver.cuStreamEndCapture(self._stream)
            return None
        status, graph = driver.cuStreamEndCapture(self._stream)
        if int(status) != 0:
            return None
        executable = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        self._graphs.append(executable)
        launch, stream = driver.cuGraphLaunch, self._stream

        def replay() -> None:
            check(launch(executable, stream))

        return replay

    def load_kernels(self, images: Images) -> None:
        for key, (image, entry) in images.items():
            self._modules[key] = Module(image, entry)

    def bind(self, launch: Launch, address_of: Callable[[str], int], sizes: Sizes) -> Call:
        module = of_engine(self._modules, launch.kernel)
        bound = BoundLaunch(launch, module, address_of, sizes, overlap=False)
        stream = self._stream

        def call() -> None:
            bound(stream)

        return call

    def share(self, address: int) -> bytes:
        return shared_handle(address)

    def open_shared(self, handle: bytes) -> int:
        address = open_handle(handle)
        self._shared.add(address)
        return address

    def close_shared(self, address: int) -> None:
        self._shared.remove(address)
        check(self._driver.cuIpcCloseMemHandle(address))

    def close(self) -> None:
        driver = self._driver
        self.synchronize()
        for graph in self._graphs:
            check(driver.cuGraphExecDestroy(graph))
        for address in tuple(self._shared):
            self.close_shared(address)
        for address in tuple(self._allocated):
            self.free(address)
        for address in self._pinned:
            check(driver.cuMemFreeHost(address))
        self._graphs.clear()
        self._pinned.clear()
        self._modules.clear()


def count_gpus() -> int:
    """How many GPUs this process can use. Raises TargetError where that is none."""
    return int(check(_driver().cuDeviceGetCount()))


def _driver() -> Any:
    """The initialised CUDA driver. Raises TargetError where it cannot be had."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TargetError(
            "package cuda-bindings is not installed, and running on a GPU needs it; "
            "run: pip install 'llmforge[tensorrt]'"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # there is no libcuda
        raise TargetError(_NO_GPU) from error
    if int(status) != 0:
        raise TargetError(f"{_NO_GPU} ({status.name})")
    return driver


_NO_GPU = "there is no NVIDIA GPU here, or its driver is not loaded"
