"""Executing launches on a GPU through the CUDA driver.

A bound launch keeps its argument list in memory, prepared once: launching is one driver call. Sizes
are read through pointers into one `Sizes` block, so a step sets them once for all launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llmforge.errors import TargetError
from llmforge.kernels.launch import (
    DTYPE_BYTES,
    AnyMap,
    Double,
    Extent,
    Float,
    HeadsMap,
    Launch,
    Operand,
    Size,
    TensorMap,
)

_HANDLE_BYTES = 64


_OTHER_GPU = (
    "the kernels are damaged, or for another GPU: build the engine again on this machine, or with "
    "its --arch"
)
# What is to be done about some of the driver's errors.
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU has too little memory left: end what else uses it, or "
    "build the engine with fewer --kv-cache-tokens",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": _OTHER_GPU,
    "CUDA_ERROR_INVALID_IMAGE": _OTHER_GPU,
    "CUDA_ERROR_INVALID_PTX": _OTHER_GPU,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the engine has no kernels compiled for this GPU, and "
    "the driver is too old to compile them: update it, or build the engine with this GPU's --arch",
}


class DriverError(TargetError):
    """A call of the CUDA driver failed."""


def check(result: Any) -> Any:
    """The values of a driver call (status, *values). Raises DriverError."""
    status, *values = result
    if int(status) != 0:
        advice = f"; {_ADVICE[status.name]}" if status.name in _ADVICE else ""
        raise DriverError(f"the CUDA driver failed with {status.name}{advice}")
    return values[0] if values else None


def shared_handle(address: int) -> bytes:
    """The CUDA IPC handle of an allocation, as bytes that can be sent to another process."""
    from cuda.bindings import driver

    handle = check(driver.cuIpcGetMemHandle(address))
    return ctypes.string_at(int(handle.getPtr()), _HANDLE_BYTES)


def open_handle(handle: bytes) -> int:
    """The address here of the allocation that another process on this machine shares."""
    from cuda.bindings import driver

    # Its only field has not had the same name in all versions of the bindings.
    opened = driver.CUipcMemHandle()
    ctypes.memmove(int(opened.getPtr()), handle, _HANDLE_BYTES)
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(check(driver.cuIpcOpenMemHandle(opened, int(flag))))


class Sizes:
    """The step's sizes of symbolic dimensions, at fixed addresses."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._cells = {name: ctypes.c_int32(0) for name in names}

    def set(self, name: str, value: int) -> None:
        self._cells[name].value = value

    def get(self, name: str) -> int:
        return self._cells[name].value

    def address(self, name: str) -> int:
        return ctypes.addressof(self._cells[name])

    def extent(self, extent: Extent) -> int:
        """Blocks of a grid's dimension."""
        if isinstance(extent, int):
            return extent
        return min(-(-self.get(extent.name) * extent.times // extent.per), extent.most)


class Module:
    """A loaded cubin, or PTX that the driver compiles now."""

    def __init__(self, image: bytes, entry: str) -> None:
        from cuda.bindings import driver

        self._module = check(driver.cuModuleLoadData(image + b"\0"))
        self.function = check(driver.cuModuleGetFunction(self._module, entry.encode()))
        self._shared = 48 * 1024
        # The same split of shared memory and L1 cache for all kernels: blocks of two kernels can
        # share a multiprocessor only where both want the same, and changing it drains it.
        name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        check(driver.cuFuncSetAttribute(self.function, name, 100))

    def allow_shared(self, nbytes: int) -> None:
        """Let launches use this much dynamic shared memory."""
        from cuda.bindings import driver

        if nbytes > self._shared:
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self.function, name, nbytes))
            self._shared = nbytes


class Arguments:
    """A launch's arguments as kernels are given them: `pointers` [arguments] to their values, which
    lie where they are as long as this does."""

    def __init__(
        self,
        launch: Launch,
        address_of: Callable[[str], int],
        sizes: Sizes,
        encode: Callable[[AnyMap, int], tuple[Any, int]],
    ) -> None:
        """address_of: the address of each buffer. encode: the map of a matrix at an address: what
        keeps it in memory, and where it lies there."""
        self._keep: list[Any] = []
        self._sizes, self._encode = sizes, encode
        pointers = [self._pointer(a, address_of) for a in launch.arguments]
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)

    def _pointer(self, argument: Any, address_of: Callable[[str], int]) -> int:
        """The address of the argument's value."""
        if isinstance(argument, Size):
            assert argument.times == argument.per == 1, "an argument is a plain size"
            return self._sizes.address(argument.name)
        cell: Any
        if argument is None:
            cell = ctypes.c_void_p(0)
        elif isinstance(argument, Operand):
            offset = argument.offset * DTYPE_BYTES[argument.dtype]
            cell = ctypes.c_void_p(address_of(argument.buffer) + offset)
        elif isinstance(argument, TensorMap | HeadsMap):
            matrix = argument.matrix
            offset = matrix.offset * DTYPE_BYTES[matrix.dtype]
            encoded, address = self._encode(argument, address_of(matrix.buffer) + offset)
            self._keep.append(encoded)
            return address
        elif isinstance(argument, Float):
            cell = ctypes.c_float(argument.value)
        elif isinstance(argument, Double):
            cell = ctypes.c_double(argument.value)
        else:
            cell = ctypes.c_int32(argument)
        self._keep.append(cell)
        return ctypes.addressof(cell)


class BoundLaunch:
    """A launch with addresses: `address_of` gives that of each buffer. Call it with a stream."""

    def __init__(
        self,
        launch: Launch,
        module: Module,
        address_of: Callable[[str], int],
        sizes: Sizes,
        *,
        overlap: bool,
    ) -> None:
        """overlap: start the blocks while the kernel before is still running (see
        `let_next_start` in ptx.cuh); the GPU must have compute capability 9.0 or more."""
        from cuda.bindings import driver

        module.allow_shared(launch.shared_bytes)
        self._sizes = sizes
        self._function = module.function
        self._arguments = Arguments(launch, address_of, sizes, _encode)
        self._arguments_address = ctypes.addressof(self._arguments.pointers)
        self._grid = launch.grid
        self._fixed = all(isinstance(extent, int) for extent in launch.grid)
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        if overlap:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        else:
            config.numAttrs = 0
        self._config = config
        self._launch = driver.cuLaunchKernelEx
        if self._fixed:
            self._set_grid()

    def __call__(self, stream: int) -> None:
        if not self._fixed:
            self._set_grid()
            if not self._config.gridDimX:
                return  # a step of which no row is wanted
        self._config.hStream = stream
        check(self._launch(self._config, self._function, self._arguments_address, 0))

    def _set_grid(self) -> None:
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = map(self._sizes.extent, self._grid)


def _encode(map: AnyMap, address: int) -> tuple[Any, int]:
    """The CUtensorMap of a matrix at this address, and its own."""
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    dtype = {
        "bfloat16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "float16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[map.matrix.dtype]
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            dtype,
            4,
            address,
            [driver.cuuint64_t(size) for size in map.sizes],
            [driver.cuuint64_t(stride) for stride in map.strides],
            [driver.cuuint32_t(size) for size in reversed(map.box)],
            [driver.cuuint32_t(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return encoded, int(encoded.getPtr())
