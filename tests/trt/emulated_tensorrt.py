"""An emulation of TensorRT: what package.py, the builder and the executable use of its Python
module, on CPU memory, over the interpreter.

A network is made by the real tensorrt_rtx. "Building" it writes down the program that is read back
from it, with its profiles; the "engine" is that program, evaluated with torch when its turn on the
emulated stream comes. Mistakes that TensorRT reports with False, or not at all, are errors here.
"""

from __future__ import annotations

import ctypes
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import published
import tensorrt_rtx
import torch
from emulated_device import EmulatedDevice, EmulationError
from interpreter import Interpreter
from network_reader import Program, Value, read

MAGIC = b"EMULATED ENGINE\n"
ACTIVATION_BYTES = 4096  # what every context of every emulated engine wants
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Blueprint:
    """What an emulated engine file holds. profiles: (least, usual, most) by input, each."""

    version: str
    program: Program
    profiles: tuple[Mapping[str, Shapes], ...]


class HostMemory(bytes):
    """What building gives, where it is not written to a stream."""

    @property
    def nbytes(self) -> int:
        return len(self)


class Machine:
    """Where emulated engines run: devices by their stream, communicators by their address."""

    def __init__(self) -> None:
        self.devices: dict[int, EmulatedDevice] = {}
        self.communicators: dict[int, Any] = {}
        self.lock = threading.Lock()


class Module:
    """A TensorRT module whose builder and runtime are emulated. `version` of `tensorrt`, or None
    for tensorrt_rtx with all that it has."""

    def __init__(self, machine: Machine, version: str | None = None) -> None:
        self.machine = machine
        self._shown = tensorrt_rtx if version is None else published.Module(version)
        self.api = None if version is None else self._shown.api
        self.__version__ = str(self._shown.__version__)

        self.Builder = _Constructor(self, EmulatedBuilder, self._shown.Builder)
        self.Runtime = _Constructor(self, EmulatedRuntime, self._shown.Runtime)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)

    def show(self, value: Any) -> Any:
        return value if self.api is None else published.shown(self.api, value)


class _Constructor:
    """An emulated class of a module: called, and asked for what it has."""

    def __init__(self, module: Module, emulated: type, published: Any) -> None:
        self._module, self._emulated, self._published = module, emulated, published

    def __call__(self, logger: Any) -> Any:
        return self._module.show(self._emulated(self._module, logger))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._published, name)


class EmulatedBuilder:
    published_as = "Builder"

    def __init__(self, module: Module, logger: Any) -> None:
        self._module = module
        self._real = tensorrt_rtx.Builder(logger)

    def create_network(self, flags: int = 0) -> Any:
        flag = tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return self._module.show(self._real.create_network(1 << int(flag)))

    def create_builder_config(self) -> Any:
        return EmulatedConfig(self._module.show(self._real.create_builder_config()))

    def create_optimization_profile(self) -> EmulatedProfile:
        return EmulatedProfile()

    def build_serialized_network(self, network: Any, config: Any) -> HostMemory:
        program = read(published.bare(network), tensorrt_rtx)
        names = {value.name for value in program.inputs if -1 in value.shape}
        for profile in config.profiles:
            if missing := names - set(profile):
                raise EmulationError(f"a profile has no shapes of {sorted(missing)}")
        blueprint = Blueprint(self._module.__version__, program, tuple(config.profiles))
        return HostMemory(MAGIC + pickle.dumps(blueprint))

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
        data = self.build_serialized_network(network, config)
        for start in range(0, len(data), 1 << 16):
            piece = data[start : start + (1 << 16)]
            if writer.write(piece) != len(piece):
                return False
        return True


class EmulatedProfile:
    """Shapes by input."""

    published_as = "IOptimizationProfile"

    def __init__(self) -> None:
        self.shapes: dict[str, Shapes] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class EmulatedConfig:
    """A real configuration, which also keeps the profiles."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "profiles", [])

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(published.bare(profile).shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> EmulatedTimingCache:
        return EmulatedTimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: EmulatedTimingCache, ignore_mismatch: bool) -> bool:
        """False for what is no timing cache, or is another version's."""
        object.__setattr__(self, "_cache", cache)
        return cache.data in (b"", EmulatedTimingCache.MAGIC)

    def get_timing_cache(self) -> EmulatedTimingCache:
        return EmulatedTimingCache(EmulatedTimingCache.MAGIC)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


class EmulatedTimingCache:
    MAGIC = b"EMULATED TIMINGS\n"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class EmulatedRuntime:
    published_as = "Runtime"

    def __init__(self, module: Module, logger: Any) -> None:
        self._module = module
        self._logger = logger

    def deserialize_cuda_engine(self, data: Any) -> EmulatedEngine | None:
        """None, and a word in the log, for what this version did not build."""
        raw = bytes(data)
        error = tensorrt_rtx.ILogger.ERROR
        if not raw.startswith(MAGIC):
            self._logger.log(error, "the magic tag of the engine does not match")
            return None
        try:
            blueprint = pickle.loads(raw[len(MAGIC) :])
        except (pickle.UnpicklingError, EOFError, ValueError):
            self._logger.log(error, "the engine is truncated")
            return None
        if blueprint.version != self._module.__version__:
            self._logger.log(error, f"the engine is of version {blueprint.version}")
            return None
        return EmulatedEngine(self._module.machine, blueprint)


class EmulatedEngine:
    published_as = "ICudaEngine"
    device_memory_size = device_memory_size_v2 = ACTIVATION_BYTES

    def __init__(self, machine: Machine, blueprint: Blueprint) -> None:
        self.machine = machine
        self.blueprint = blueprint
        program = blueprint.program
        self.values: dict[str, Value] = {v.name: v for v in (*program.inputs, *program.outputs)}
        self.inputs = {value.name for value in program.inputs}
        self.fixed = {v.name: v.shape for v in program.inputs if -1 not in v.shape}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.blueprint.profiles)

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.blueprint.program.aliases.get(name)

    def create_runtime_config(self) -> EmulatedRuntimeConfig:
        return EmulatedRuntimeConfig()

    def create_execution_context(self, strategy: Any = None) -> EmulatedContext:
        """`strategy`: how memory is allocated, or an EmulatedRuntimeConfig."""
        allocation = tensorrt_rtx.ExecutionContextAllocationStrategy
        if isinstance(strategy, EmulatedRuntimeConfig):
            if strategy.cache is None:
                raise EmulationError("a context of tensorrt_rtx compiles anew at every start")
            strategy.cache.compiled += 1
            strategy = strategy.strategy
        return EmulatedContext(self, owns_memory=strategy in (None, allocation.STATIC))

    def create_execution_context_without_device_memory(self) -> EmulatedContext:
        return EmulatedContext(self, owns_memory=False)


class EmulatedRuntimeConfig:
    published_as = "IRuntimeConfig"

    def __init__(self) -> None:
        self.strategy: Any = None
        self.cache: EmulatedRuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def create_runtime_cache(self) -> EmulatedRuntimeCache:
        return EmulatedRuntimeCache()

    def set_runtime_cache(self, cache: EmulatedRuntimeCache) -> None:
        self.cache = cache

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class EmulatedRuntimeCache:
    """Holds how many contexts were made with it."""

    published_as = "IRuntimeCache"

    def __init__(self) -> None:
        self.compiled = 0

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(MAGIC):
            return False
        self.compiled = int(data[len(MAGIC) :])
        return True

    def serialize(self) -> bytes:
        return MAGIC + str(self.compiled).encode()


class EmulatedContext:
    """Shapes and addresses for one call at a time. Once a call is captured its shapes stay."""

    published_as = "IExecutionContext"

    def __init__(self, engine: EmulatedEngine, *, owns_memory: bool) -> None:
        self.engine = engine
        self._profile: Mapping[str, Shapes] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._has_memory = owns_memory
        self._group: Any = None
        self._frozen: dict[str, tuple[int, ...]] | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._device(stream)
        self._profile = self.engine.blueprint.profiles[index]
        self._shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < ACTIVATION_BYTES:
            raise EmulationError(f"{size} bytes of activation memory are too few")
        self._activations = (memory, size)
        self._has_memory = True

    @property
    def device_memory(self) -> int:
        return self._activations[0]

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self.set_device_memory(memory, ACTIVATION_BYTES)

    def set_communicator(self, capsule: Any) -> bool:
        if not self.engine.blueprint.program.collectives:
            return False
        self._group = self.engine.machine.communicators[_address_of(capsule)]
        self._group.barrier()  # it is collective
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if name not in self.engine.inputs:
            raise EmulationError(f"{name} is not an input of the engine")
        if self._profile is None:
            raise EmulationError("shapes are set before the profile is")
        least, _, most = self._profile[name]
        chosen = tuple(int(size) for size in shape)
        fits = len(chosen) == len(least) and all(
            a <= size <= b for a, size, b in zip(least, chosen, most, strict=True)
        )
        if not fits:
            raise EmulationError(f"{name} {chosen} is outside its profile, {least} to {most}")
        if self._frozen is not None and self._frozen[name] != chosen:
            raise EmulationError("a context of a captured graph gets another shape")
        self._shapes[name] = chosen
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.values:
            raise EmulationError(f"{name} is not a tensor of the engine")
        if address % 16:
            raise EmulationError(f"{name} at {address:#x} is not aligned")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device = self._device(stream)
        if not self._has_memory:
            raise EmulationError("the context has no activation memory")
        shapes = {**self.engine.fixed, **self._shapes}
        if missing := [n for n in self.engine.inputs if n not in shapes]:
            raise EmulationError(f"the shapes of {missing} are not set")
        if missing := [n for n in self.engine.values if n not in self._addresses]:
            raise EmulationError(f"the addresses of {missing} are not set")
        program = self.engine.blueprint.program
        for output, source in program.aliases.items():
            if self._addresses[output] != self._addresses[source]:
                raise EmulationError(f"{output} is not in the memory of {source}")
        if program.collectives and self._group is None:
            raise EmulationError("an engine with collectives runs without a communicator")
        addresses = dict(self._addresses)
        interpreter = Interpreter(program, self._group)
        # Memory is looked up now: what is not device memory fails where it was given.
        inputs = {
            name: _view(device, addresses[name], self.engine.values[name].dtype, shapes[name])
            for name in self.engine.inputs
        }

        def run() -> None:
            with torch.inference_mode():
                outputs = interpreter.run(inputs)
                for name, value in outputs.items():
                    if name not in program.aliases:
                        shape = tuple(value.shape)
                        _view(device, addresses[name], value.dtype, shape).copy_(value)

        if device.capturing:
            self._frozen = shapes
        device.enqueue(run, stream)
        return True

    def _device(self, stream: int) -> EmulatedDevice:
        if stream not in self.engine.machine.devices:
            raise EmulationError(f"{stream:#x} is not a stream")
        return self.engine.machine.devices[stream]


def _view(
    device: EmulatedDevice, address: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Device memory as a tensor."""
    count = 1
    for size in shape:
        count *= size
    raw = device.memory.bytes_at(address, count * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _address_of(capsule: Any) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, b"ncclComm_t"))
