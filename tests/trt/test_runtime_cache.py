"""The file in which tensorrt_rtx's compiled kernels are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx
from emulated_tensorrt import MAGIC, EmulatedRuntimeConfig, Machine, Module

from llmforge.engine.tensorrt import cache_file
from llmforge.engine.tensorrt.io import DECODE, PREFILL
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.runtime_cache import RuntimeCache, runtime_cache_path


class Engine:
    def create_runtime_config(self) -> EmulatedRuntimeConfig:
        return EmulatedRuntimeConfig()


def cache_of(path: Path) -> RuntimeCache:
    return RuntimeCache(Package("tensorrt-rtx", Module(Machine())), path)


def test_contexts_share_what_was_kept_and_only_news_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache"
    cache = cache_of(path)
    cache.store()  # nothing was compiled
    assert not path.exists()
    first, second = cache.config(Engine(), DECODE), cache.config(Engine(), PREFILL)
    assert first.cache is second.cache
    strategies = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    assert first.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
    assert second.dynamic_shapes_kernel_specialization_strategy == strategies.NONE
    first.cache.compiled = 3
    cache.store()
    assert path.read_bytes() == MAGIC + b"3" and list(path.parent.iterdir()) == [path]

    again = cache_of(path)
    assert again.config(Engine(), DECODE).cache.compiled == 3
    before = path.stat().st_mtime_ns
    again.store()
    assert path.stat().st_mtime_ns == before


def test_a_damaged_file_counts_as_none_and_one_that_cannot_be_written_is_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"of another driver")
    cache = cache_of(path)
    assert cache.config(Engine(), DECODE).cache.compiled == 0
    cache.store()
    assert path.read_bytes() == MAGIC + b"0"
    blocked = cache_of(path / "below a file")
    blocked.config(Engine(), DECODE)
    blocked.store()


def test_each_version_and_kind_of_gpu_has_a_file_of_its_own() -> None:
    package = Package("tensorrt-rtx", Module(Machine()))
    path = runtime_cache_path(package, "NVIDIA GeForce RTX 5090")
    assert path.name == f"tensorrt_rtx-{package.version}-NVIDIA-GeForce-RTX-5090.cache"


def test_what_is_kept_lies_in_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file, "DEFAULT_CACHE", Path("~/.cache/llmforge/kernels"))
    for kind in ("runtime", "timing"):
        path = cache_file.cache_path(kind, "name")
        assert path == Path.home() / ".cache" / "llmforge" / kind / "name.cache"
