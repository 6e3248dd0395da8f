"""benchmarks/cuda_products.py from end to end on the emulated GPU: its figures mean nothing there,
but a machine with a GPU is too dear to find its mistakes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cuda_models import MODELS, RandomWeights, of_dtype
from emulation.build import unavailable
from emulation.device import PROCESSORS, Device, EmulatedLaunch
from emulation.executable import emulated, emulated_gpu

from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.state import KernelChoice
from llmforge.kernels.gemv import GemvTuning
from llmforge.kernels.rows import RowsTuning

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

MODEL = dataclasses.replace(
    of_dtype(MODELS["wide"], "bfloat16"), num_layers=1, sliding_window=(None,)
)
VARIANTS = {
    "stream_gemm": KernelChoice("stream_gemm"),
    "torch": KernelChoice("torch"),
    "gemv": KernelChoice("gemv"),
    "4 warps": KernelChoice("gemv", GemvTuning(warps=4, piece=1024)),
}
FEW_ROWS = {
    "stream_gemm": KernelChoice(few_rows="stream_gemm"),
    "torch": KernelChoice(few_rows="torch"),
    "small pieces": KernelChoice(few_rows="rows_gemm", rows=RowsTuning(piece=512)),
}


class Graph:
    replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 2.0


class Torch:
    """torch, as the benchmark sees it on a machine with a GPU."""

    def __init__(self) -> None:
        stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            get_device_capability=lambda: (9, 0),
            get_device_name=lambda: "an emulated GPU",
            get_device_properties=lambda device: SimpleNamespace(multi_processor_count=PROCESSORS),
            current_stream=lambda: stream,
            Stream=lambda: stream,
            CUDAGraph=Graph,
            Event=Event,
            stream=lambda stream: contextlib.nullcontext(),
            graph=lambda graph, stream: contextlib.nullcontext(),
            empty_cache=lambda: None,
            synchronize=lambda: None,
        )
        self.version = SimpleNamespace(cuda="13.0")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        return torch.empty(*shape, dtype=dtype)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path("benchmarks").absolute()), *sys.path])
    import cuda_products
    import cuda_speed
    from product_studies import Study

    device = Device()

    def load(graph: Any, weights: Any, limits: Any, choice: KernelChoice) -> CudaExecutable:
        return emulated(graph, RandomWeights(MODEL, seed=3), limits, choice=choice)

    def time_decode(self: CudaExecutable, step: Any, repeat: int) -> float:
        assert self._runner_of(step).graph is not None
        return 1e-3

    def kernel_ends(run: Any) -> list[float]:
        """Of five steps of 12 kernels: the i-th takes 2 i - 1 us from the end of the one before."""
        run()
        return [1000.0 * step + i * i for step in range(5) for i in range(12)]

    def study_of(rows: int) -> Study:
        if rows == 1:
            return Study("gemv", VARIANTS)
        return Study("rows_gemm", FEW_ROWS, rows)

    replaced = {
        "torch": Torch(), "MODELS": {"tiny": MODEL}, "study_of": study_of, "load": load,
        "random_weights": lambda graph: {}, "read_bandwidth": lambda: 4e12,
        "BoundLaunch": EmulatedLaunch,
        "compiled": lambda launches, arch: [device.module(call.kernel) for call in launches],
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(cuda_products, name, value)
    monkeypatch.setattr(cuda_speed, "torch", replaced["torch"])
    monkeypatch.setattr(CudaExecutable, "time_decode", time_decode)
    monkeypatch.setattr(cuda_products, "kernel_ends", kernel_ends)
    return cuda_products


def test_it_checks_and_times_every_variant(benchmark: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "results" / "products.json"
    with emulated_gpu():
        arguments = ["--model", "tiny", "--json", str(out)]
        result = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # Five of each tuning, plain and with biases.
    assert "20 products, at most" in result.output and "wrong: none" in result.output
    report = json.loads(out.read_text())
    assert [case["variant"] for case in report["cases"]] == list(VARIANTS)
    for case in report["cases"]:
        assert case["device_step_ms"] == 1.0 and case["products_ms"] == 2.0
        assert case["over_floor"] == pytest.approx(1.0 / case["floor_ms"])
        assert case["logits_off"] < 2e-2 and not case["wrong"]
    ends = {case["variant"]: case["us_between_ends"] for case in report["cases"]}
    assert ends["gemv"]["gemv 768 x 512"] == [1, 7.0]  # the fifth kernel
    assert (
        ends["stream_gemm"]["stream_gemm 1000 x 512"] == [1, 17.0] and "sample" not in ends["gemv"]
    )
    assert ends["torch"] == {}, "the library's kernels are not known"
    assert Graph.replayed and report["gpu"] == "an emulated GPU"


def test_it_does_so_for_more_rows(benchmark: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "products.json"
    with emulated_gpu():
        arguments = ["--model", "tiny", "--rows", "3", "--json", str(out)]
        result = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "10 products, at most" in result.output and "wrong: none" in result.output
    report = json.loads(out.read_text())
    cases = [(case["batch"], case["variant"]) for case in report["cases"]]
    assert cases == [(batch, variant) for batch in (2, 3) for variant in FEW_ROWS]
    assert not any(case["wrong"] for case in report["cases"])
    floors = [case["floor_ms"] for case in report["cases"]]
    assert floors[0] < floors[-1], "more sequences have more keys and values"
    profiled = [case["us_between_ends"] for case in report["cases"] if case["batch"] == 3]
    assert profiled[-1]["rows_gemm 768 x 512"] == [1, 7.0] and report["rows"] == 3


def test_a_variant_with_a_wrong_product_is_named_and_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = benchmark.relative_error

    def wrong(launch: Any, *rest: Any) -> float:
        return right(launch, *rest) + (dict(launch.kernel.defines)["WARPS"] == 4)

    monkeypatch.setattr(benchmark, "relative_error", wrong)
    out = tmp_path / "products.json"
    with emulated_gpu():
        result = CliRunner().invoke(benchmark.main, ["--model", "tiny", "--json", str(out)])
    assert result.exit_code == 1 and "wrong: ['4 warps']" in result.output
    report = json.loads(out.read_text())
    assert [case["variant"] for case in report["cases"]] == ["stream_gemm", "torch", "gemv"]
    assert sum(check["wrong"] for check in report["checks"]) == 10
