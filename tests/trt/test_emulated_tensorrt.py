"""The emulated device and runtime themselves: what TensorRT would do wrong, they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
from emulated_device import EmulatedDevice, EmulatedMemory, EmulationError
from emulated_kernels import KERNELS
from emulated_tensorrt import Machine, Module

from llmforge.engine.tensorrt.package import Package
from llmforge.errors import StoreError

CACHE = (-1, 1, 4, 2)
PROFILE = {"x": (1, 2, 3), "cache": (1, 2, 3), "at": (1, 2, 3)}


class Rig:
    """An emulated engine that adds 1 to x [B, 1, 1, 2] and puts it into a cache."""

    def __init__(self, version: str | None = None) -> None:
        self.machine = Machine()
        self.device = self.new_device()
        module = Module(self.machine, version)
        self.package = Package("tensorrt-rtx" if version is None else "tensorrt", module)
        self.data = self._build()
        self.engine = self.package.runtime().deserialize_cuda_engine(self.data)

    def new_device(self) -> EmulatedDevice:
        device = EmulatedDevice(EmulatedMemory(), KERNELS, (8, 9))
        self.machine.devices[device.stream] = device
        return device

    def _build(self) -> bytes:
        builder, net = self.package.create_network()
        x = net.add_input("x", trt.float32, (-1, 1, 1, 2))
        cache, at = (
            net.add_input("cache", trt.float32, CACHE),
            net.add_input("at", trt.int32, (-1,)),
        )
        one = net.add_constant((1, 1, 1, 1), trt.Weights(np.ones(1, np.float32))).get_output(0)
        y = net.add_elementwise(x, one, trt.ElementWiseOperation.SUM).get_output(0)
        out = net.add_kv_cache_update(cache, y, at, trt.KVCacheMode.LINEAR).get_output(0)
        y.name, out.name = "y", "cache.out"
        net.mark_output(y)
        net.mark_output(out)
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for name, sizes in PROFILE.items():
            rest = {"x": (1, 1, 2), "cache": (1, 4, 2), "at": ()}[name]
            profile.set_shape(name, *((size, *rest) for size in sizes))
        config.add_optimization_profile(profile)
        return builder.build_serialized_network(net, config)

    def context(self) -> Any:
        memory = self.device.allocate(self.package.context_memory(self.engine))
        return self.package.create_context(self.engine, 0, self.device.stream, memory)

    def ready(self, batch: int = 2) -> tuple[Any, dict[str, int]]:
        """A context with everything set, and the addresses."""
        context = self.context()
        shapes = {"x": (batch, 1, 1, 2), "cache": (batch, 1, 4, 2), "at": (batch,)}
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        places = {name: self.device.allocate(256) for name in ("x", "cache", "at", "y")}
        places["cache.out"] = places["cache"]
        for name, address in places.items():
            context.set_tensor_address(name, address)
        return context, places


def test_an_engine_computes_when_the_device_is_synchronized() -> None:
    rig = Rig()
    context, places = rig.ready()
    x = np.arange(4, dtype=np.float32)
    at = np.array([3, 1], np.int32)
    got, cache = np.full(4, -1, np.float32), np.zeros((2, 4, 2), np.float32)
    rig.device.upload(places["x"], x)
    rig.device.upload(places["at"], at)
    context.execute_async_v3(rig.device.stream)
    rig.device.download(got, places["y"])
    rig.device.download(cache, places["cache"])
    assert (got == -1).all(), "nothing has run yet"
    rig.device.synchronize()
    assert got.tolist() == [1, 2, 3, 4]
    assert cache[0, 3].tolist() == [1, 2] and cache[1, 1].tolist() == [3, 4] and cache.sum() == 10


def test_an_upload_that_is_changed_before_it_runs_is_changed() -> None:
    device = Rig().device
    address, x, got = device.allocate(4), np.array([1.0], np.float32), np.empty(1, np.float32)
    device.upload(address, x)
    x[0] = 2.0
    device.download(got, address)
    device.synchronize()
    assert got[0] == 2.0


def test_a_captured_call_is_repeated_with_what_the_memory_then_holds() -> None:
    rig = Rig()
    context, places = rig.ready()
    x, got = np.zeros(4, np.float32), np.zeros(4, np.float32)

    def body() -> None:
        rig.device.upload(places["x"], x)
        context.execute_async_v3(rig.device.stream)
        rig.device.download(got, places["y"])

    replay = rig.device.capture(body)
    rig.device.synchronize()
    assert replay is not None and not got.any(), "capturing runs nothing"
    x[:] = 7
    replay()
    rig.device.synchronize()
    assert (got == 8).all()
    with pytest.raises(EmulationError, match="captured graph gets another shape"):
        context.set_input_shape("x", (1, 1, 1, 2))
    with pytest.raises(EmulationError, match="while a graph is being captured"):
        rig.device.capture(rig.device.synchronize)


def refused(change: Callable[[Rig, Any, dict[str, int]], None], match: str) -> None:
    rig = Rig()
    context, places = rig.ready()
    with pytest.raises(EmulationError, match=match):
        change(rig, context, places)
        context.execute_async_v3(rig.device.stream)
        rig.device.synchronize()


def test_what_tensorrt_would_do_wrong_is_refused() -> None:
    host = np.zeros(64, np.float32)
    address = (host.ctypes.data + 15) // 16 * 16
    refused(lambda r, c, p: c.set_tensor_address("x", address), "not device memory")
    refused(lambda r, c, p: c.set_tensor_address("x", p["x"] + 248), "not aligned")
    refused(lambda r, c, p: c.set_tensor_address("x", p["x"] + 240 + 16), "not device memory")
    refused(lambda r, c, p: c.set_tensor_address("cache", p["y"] + 224), "reach beyond|not in the")
    refused(lambda r, c, p: c.set_tensor_address("cache.out", p["y"]), "not in the memory of cache")
    refused(lambda r, c, p: c.set_input_shape("x", (4, 1, 1, 2)), "outside its profile")
    refused(lambda r, c, p: c.set_input_shape("x", (2, 1, 2)), "outside its profile")
    refused(lambda r, c, p: c.set_input_shape("z", (2,)), "not an input")
    refused(lambda r, c, p: c.set_tensor_address("z", p["x"]), "not a tensor")
    refused(lambda r, c, p: c.execute_async_v3(r.device.stream + 1), "not a stream")
    refused(lambda r, c, p: r.device.free(p["y"]), "not device memory")
    refused(lambda r, c, p: c.set_device_memory(p["y"], 256), "too few")


def test_a_context_that_is_not_ready_is_refused() -> None:
    rig = Rig()
    allocation = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    bare = rig.engine.create_execution_context(allocation)
    with pytest.raises(EmulationError, match="before the profile"):
        bare.set_input_shape("x", (1, 1, 1, 2))
    with pytest.raises(EmulationError, match="no activation memory"):
        bare.execute_async_v3(rig.device.stream)
    fresh = rig.context()
    with pytest.raises(EmulationError, match="shapes of"):
        fresh.execute_async_v3(rig.device.stream)
    for name, rest in (("x", (1, 1, 2)), ("cache", (1, 4, 2)), ("at", ())):
        fresh.set_input_shape(name, (1, *rest))
    with pytest.raises(EmulationError, match="addresses of"):
        fresh.execute_async_v3(rig.device.stream)


def test_engines_of_another_version_and_broken_ones_are_not_opened() -> None:
    rig = Rig()
    runtime = rig.package.runtime()
    for broken in (b"", b"\0" * 100, rig.data[:200], b"x" + rig.data):
        assert runtime.deserialize_cuda_engine(broken) is None
        assert rig.package.messages.errors
    other = Rig("11.1")
    assert other.package.runtime().deserialize_cuda_engine(rig.data) is None


def test_kernels_are_known_by_their_image_and_need_a_grid() -> None:
    from llmforge.kernels.driver import Sizes
    from llmforge.kernels.launch import Operand, Size
    from llmforge.kernels.linear_cache import cache_write

    device = Rig().device
    sizes = Sizes(("rows", "tokens", "first"))
    launch = cache_write(
        Operand("table", (2,), "int32", 1),
        Operand("past", ("rows",), "int32", 1),
        caches=1, heads=2, size=4, capacity=5, dtype="float16",
        first_row=Size("first"), tokens=Size("tokens"),
    )  # fmt: skip
    cache, new = device.allocate(3 * 2 * 5 * 4 * 2), device.allocate(2 * 2 * 3 * 4 * 2)
    places = {"table": device.allocate(16), "past": device.allocate(8)}
    with pytest.raises(StoreError, match="does not have the cache_write that llmforge"):
        device.bind(launch, places.__getitem__, sizes)
    device.load_kernels({launch.kernel.key: (b"image", launch.kernel.entry)})
    call = device.bind(launch, places.__getitem__, sizes)
    with pytest.raises(EmulationError, match="grid"):
        call()
    values = np.arange(48, dtype=np.float16)
    for address, array in (
        (places["table"], np.array([cache, new], np.uint64)),
        (places["past"], np.array([1, 4], np.int32)),
        (new, values),
    ):
        device.upload(address, array)
        device.synchronize()
    for name, size in (("rows", 2), ("tokens", 3), ("first", 1)):
        sizes.set(name, size)
    call()
    sizes.set("rows", 1)  # what was asked for keeps its sizes
    got = np.zeros((3, 2, 5, 4), np.float16)
    device.download(got, cache)
    device.synchronize()
    expected = np.zeros((3, 2, 5, 4), np.float16)
    added = values.reshape(2, 2, 3, 4)
    expected[1, :, 1:4], expected[2, :, 4:] = added[0], added[1, :, :1]
    assert np.array_equal(got, expected)
