"""The installed TensorRT package: the one place that knows what differs between packages and
versions. Everything else asks `Features`, or calls a method here.

Which version has what (from the binding sources of github.com/NVIDIA/TensorRT, tags v8.6.0 to
v11.1; tensorrt_rtx 1.7 and tensorrt 8.6.0 were also looked at as installed). Features are found by
the names in the last column, so a version that is not in this table is used for what it has.

    feature              tensorrt   tensorrt_rtx   shown by
    weights by pointer   10.0       1.7            STRONGLY_TYPED (both came with 10.0)
    strongly typed       10.0       1.7            NetworkDefinitionCreationFlag.STRONGLY_TYPED
    explicit batch flag  8.6-10.16  no             NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    bfloat16             10.0       1.7            DataType.BF16
    progress monitor     10.0       1.7            IProgressMonitor
    stream writer        10.13      1.7            Builder.build_serialized_network_to_stream
    attention            10.14      1.7            INetworkDefinition.add_attention
      causal kinds       11.0       1.7            INetworkDefinition.add_attention_v2
    cache update         10.15      1.7            INetworkDefinition.add_kv_cache_update
    rotary embedding     10.15      1.7            INetworkDefinition.add_rotary_embedding
    collectives          10.16      1.7            INetworkDefinition.add_dist_collective
      to be asked for    10.16      no             PreviewFeature.MULTIDEVICE_RUNTIME_10_16
    top k of experts     10.0       1.7            STRONGLY_TYPED (8.6 has TopK, and crashes on it)
    several GPU kinds    no         1.7            ComputeCapability
    timing cache         10.0       no (no effect) no ComputeCapability, and strong typing
    profile sharing      8.6        no (always)    PreviewFeature.PROFILE_SHARING_0806
    runtime cache        no         1.7            IRuntimeCache
    context memory       10.0       1.7            ExecutionContextAllocationStrategy
      with its size      10.1       1.7            IExecutionContext.set_device_memory
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from llmforge.engine.tensorrt.logger import Messages, make_logger
from llmforge.errors import BuildError, SettingsError, TargetError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")
_DTYPE_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Features:
    """What a package has; see the table above."""

    strongly_typed: bool
    bfloat16: bool
    progress_monitor: bool
    stream_writer: bool
    attention: bool
    cache_update: bool
    rotary: bool
    collective: bool
    top_k: bool
    compute_capabilities: bool
    timing_cache: bool
    profile_sharing: bool
    runtime_cache: bool

    @property
    def layers_per_engine(self) -> int | None:
        """The layers that an engine should have; None: any number. TensorRT 8.6 compiles an engine
        on one core, each profile once for each format that its inputs can have (three in float16),
        in a time that grows faster than its layers: 5 of 256 features take 40 s, 16 of 2048 more
        than six minutes. Several engines can be built side by side. Engines of one layer are not
        faster, and do not always load in float16 ("missing offset in id2offset")."""
        return None if self.strongly_typed else 2


def _features(trt: Any) -> Features:
    network = trt.INetworkDefinition
    flags = trt.NetworkDefinitionCreationFlag
    several = hasattr(trt, "ComputeCapability")
    return Features(
        strongly_typed=hasattr(flags, "STRONGLY_TYPED"),
        bfloat16=hasattr(trt.DataType, "BF16"),
        progress_monitor=hasattr(trt, "IProgressMonitor"),
        stream_writer=hasattr(trt.Builder, "build_serialized_network_to_stream"),
        attention=hasattr(network, "add_attention"),
        cache_update=hasattr(network, "add_kv_cache_update"),
        rotary=hasattr(network, "add_rotary_embedding"),
        collective=hasattr(network, "add_dist_collective"),
        # That of 8.6 ends the process in most routers: see lowering/experts.py.
        top_k=hasattr(flags, "STRONGLY_TYPED"),
        compute_capabilities=several,
        # That of 8.6 holds nothing of what Myelin measures, and a build that is given one fails.
        timing_cache=not several and hasattr(flags, "STRONGLY_TYPED"),
        profile_sharing=hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"),
        runtime_cache=hasattr(trt, "IRuntimeCache"),
    )


def unavailable(target: str) -> str | None:
    """Why the target's package cannot be used, in a line, or None. Quick: nothing is imported."""
    if importlib.util.find_spec(MODULES[target]) is None:
        return f"package not installed: pip install 'llmforge[{target}]'"
    return None


class Package:
    """A TensorRT package, imported, with a log of its own."""

    def __init__(self, target: str, module: Any) -> None:
        self.target = target
        self.name = MODULES[target]
        self.trt = module
        self.version = str(module.__version__)
        self.features = _features(module)
        self.messages = Messages()
        self.logger = make_logger(module, self.messages)

    @classmethod
    def load(cls, target: str) -> Package:
        """The package of a target. Raises TargetError where it cannot be imported."""
        if reason := unavailable(target):
            raise TargetError(f"{target}: {reason}")
        try:
            module = importlib.import_module(MODULES[target])
        except (ImportError, OSError) as error:
            raise TargetError(
                f"{target}: {MODULES[target]} is installed but cannot be loaded: {error}"
            ) from error
        return cls(target, module)

    # -- types and weights -----------------------------------------------------------------------

    def dtype(self, name: str) -> Any:
        """The package's DataType of a dtype. Raises BuildError for one it does not have."""
        if name == "bfloat16" and not self.features.bfloat16:
            raise BuildError(
                f"{self.name} {self.version} cannot compute in bfloat16; convert the model with: "
                "llmforge convert --dtype float16"
            )
        return getattr(self.trt.DataType, _DTYPE_NAMES[name])

    def weights(self, array: NDArray[Any]) -> Any:
        """The array as Weights. Nothing is copied: it must outlive the build."""
        assert array.flags.c_contiguous, "weights are contiguous"
        if self.features.strongly_typed:
            dtype = self.dtype(str(array.dtype))
            return self.trt.Weights(dtype, array.ctypes.data, array.size)
        return self.trt.Weights(array)

    # -- building --------------------------------------------------------------------------------

    def create_network(self) -> tuple[Any, Any]:
        """A builder and an empty network. Raises BuildError where the builder needs a GPU and
        there is none."""
        try:
            builder = self.trt.Builder(self.logger)
        except TypeError as error:
            if self.messages.errors:
                raise BuildError(self.messages.reason("TensorRT's builder")) from error
            raise BuildError(
                f"{self.name} builds engines only on a machine with an NVIDIA GPU, and there is "
                "none here, or its driver is not loaded"
            ) from error
        flags = self.trt.NetworkDefinitionCreationFlag
        if self.features.strongly_typed:
            network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
        else:
            network = builder.create_network(1 << int(flags.EXPLICIT_BATCH))
        return builder, network

    def default_optimization_level(self) -> int:
        return 3 if self.features.strongly_typed else 0

    def create_config(
        self,
        builder: Any,
        dtype: str,
        archs: Sequence[str],
        workspace_gb: float | None,
        optimization_level: int | None,
    ) -> Any:
        """A builder configuration for a model of this dtype."""
        trt, config = self.trt, builder.create_builder_config()
        # float32 is to mean float32: products in tf32 keep 10 of its 23 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        if optimization_level is None:
            optimization_level = self.default_optimization_level()
        config.builder_optimization_level = optimization_level
        if workspace_gb is not None:
            nbytes = int(workspace_gb * 10**9)
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, nbytes)
        if not self.features.strongly_typed:
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            if dtype == "float16":
                config.set_flag(trt.BuilderFlag.FP16)
            config.set_tactic_sources(0)  # TensorRT's own kernels: no cuBLAS, no cuDNN
        if self.features.profile_sharing:
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        if hasattr(trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16"):
            config.set_preview_feature(trt.PreviewFeature.MULTIDEVICE_RUNTIME_10_16, True)
        if self.features.compute_capabilities:
            config.num_compute_capabilities = len(archs)
            for index, arch in enumerate(archs):
                config.set_compute_capability(self._capability(arch), index)
        return config

    def build(
        self, builder: Any, network: Any, config: Any, write: Callable[[memoryview], None]
    ) -> bool:
        """Build the network and hand the serialized engine to `write`, piece by piece where the
        package can. False where it failed: the log has the reason."""
        if not self.features.stream_writer:
            blob = builder.build_serialized_network(network, config)
            if blob is None:
                return False
            write(memoryview(blob))
            return True
        trt, failures = self.trt, []

        class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                # An exception must not pass through TensorRT: it ends the build, then is raised.
                try:
                    write(memoryview(data))
                except OSError as error:
                    failures.append(error)
                    return 0
                return len(data)

        built = bool(builder.build_serialized_network_to_stream(network, config, Writer()))
        if failures:
            raise failures[0]
        return built

    def known_archs(self) -> tuple[str, ...]:
        """The architectures that one engine of this package can be made for; none where an
        engine is for the GPU that it is built on."""
        if not self.features.compute_capabilities:
            return ()
        names = self.trt.ComputeCapability.__members__
        numbers = sorted(int(n[2:]) for n in names if n.startswith("SM"))
        return tuple(f"sm_{number}" for number in numbers)

    def default_archs(self) -> tuple[str, ...]:
        """What an engine is for where nobody says: TensorRT-RTX's own choice."""
        return tuple(arch for arch in _DEFAULT_ARCHS if arch in self.known_archs())

    def check_archs(self, archs: Sequence[str]) -> None:
        """Raises SettingsError for an architecture that the package cannot build for."""
        for arch in archs:
            if arch not in self.known_archs():
                raise SettingsError(
                    f"{self.name} {self.version} cannot build for the architecture {arch!r}; "
                    f"allowed: {', '.join(self.known_archs())}"
                )

    def _capability(self, arch: str) -> Any:
        return self.trt.ComputeCapability.__members__[arch.replace("_", "").upper()]

    # -- running ---------------------------------------------------------------------------------

    def runtime(self) -> Any:
        """A Runtime. Raises TargetError where the package cannot make one."""
        try:
            return self.trt.Runtime(self.logger)
        except TypeError as error:
            raise TargetError(
                f"{self.name} cannot run here: there is no NVIDIA GPU, or its driver is not loaded"
            ) from error

    def context_memory(self, engine: Any) -> int:
        """The bytes of activation memory that any context of the engine needs."""
        if hasattr(engine, "device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)

    def create_context(
        self, engine: Any, profile: int, stream: int, memory: int | None, config: Any = None
    ) -> Any:
        """An execution context for calls of a profile, whose activations are at the address
        `memory` (None: memory of its own). `config`: an IRuntimeConfig of the engine, where the
        package has them. Raises TargetError where TensorRT refuses."""
        if config is not None:
            if memory is not None:
                config.set_execution_context_allocation_strategy(
                    self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
                )
            context = engine.create_execution_context(config)
        elif memory is None:
            context = engine.create_execution_context()
        elif hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            raise TargetError(self.messages.reason("the engine's execution context"))
        if memory is not None:
            if hasattr(context, "set_device_memory"):
                context.set_device_memory(memory, self.context_memory(engine))
            else:
                context.device_memory = memory
        if not context.set_optimization_profile_async(profile, stream):
            raise TargetError(self.messages.reason(f"profile {profile} of the engine"))
        return context

    def set_communicator(self, context: Any, communicator: int) -> None:
        """Have a context communicate through the NCCL communicator at this address. Blocks until
        all its ranks have called it. Raises TargetError where the engine does not take it: its
        collectives would then do nothing."""
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        if not context.set_communicator(new(communicator, b"ncclComm_t", None)):
            raise TargetError(
                "TensorRT did not accept the NCCL communicator for this engine, whose collectives "
                "would be skipped; build it again with --primitives"
            )
