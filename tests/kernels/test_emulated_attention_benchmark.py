"""benchmarks/cuda_attention.py from end to end on the emulated GPU: its figures mean nothing there,
but a machine with a GPU is too dear to find its mistakes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from cuda_models import LIMITS, MODELS, RandomWeights, of_dtype
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import PROCESSORS
from emulation.executable import emulated, emulated_gpu
from test_emulated_benchmark import Graph, Torch

from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.state import KernelChoice
from llmforge.kernels.launch import Launch

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

MODEL = of_dtype(MODELS["wide"], "bfloat16")
LOADED: list[KernelChoice] = []


class Launcher:
    def __init__(self, specs: Any, arch: str) -> None:
        assert arch == "sm_90" and {s.entry for s in specs} == {
            "qkv",
            "attention",
            "decode_plan",
            "decode_attention",
        }

    def run(self, launch: Launch, tensors: Any, sequences: int) -> None:
        bench = Bench()
        bench.tensors = tensors
        bench.run(launch, tokens=sequences, sequences=sequences, processors=PROCESSORS)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path("benchmarks").absolute()), *sys.path])
    import cuda_attention
    import cuda_speed

    LOADED.clear()

    def load(graph: Any, weights: Any, limits: Any, choice: KernelChoice) -> CudaExecutable:
        LOADED.append(choice)
        weights = RandomWeights(cuda_attention.short(MODEL), seed=3)
        return emulated(graph, weights, limits, choice=choice)

    replaced = {
        "torch": Torch(), "MODELS": {"tiny": MODEL}, "LAYERS": 2, "VOCAB": 300, "LIMITS": LIMITS,
        "BATCHES": (1, 2, 4), "KEYS": (16, 40), "LONGEST": 150, "LONG": (),
        "CASES": cuda_attention.CASES[:2], "Launcher": Launcher, "load": load,
        "random_weights": lambda graph: {}, "read_bandwidth": lambda: 4e12,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(cuda_attention, name, value)
    monkeypatch.setattr(cuda_speed, "torch", replaced["torch"])
    return cuda_attention


def invoke(benchmark: ModuleType, out: Path) -> tuple[int, str, dict[str, Any]]:
    with emulated_gpu():
        arguments = ["--model", "tiny", "--json", str(out)]
        result = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    return result.exit_code, result.output, json.loads(out.read_text())


def test_it_checks_and_times_every_step(benchmark: ModuleType, tmp_path: Path) -> None:
    code, output, report = invoke(benchmark, tmp_path / "results" / "attention.json")
    assert code == 0, output
    assert "2 cases, at most" in output and "wrong: 0" in output
    steps = {row["step"]: row for row in report["steps"]}
    assert list(steps) == ["1 x 16", "1 x 40", "2 x 16", "2 x 40", "4 x 16", "4 x 40", "2 mixed"]
    for row in steps.values():
        assert set(row["us"].values()) == {0}, "every graph takes as long here"
        assert max(row["logits_off"].values()) < 2e-2 and not row["wrong"]
    assert list(benchmark.VARIANTS.values()) == LOADED and len(LOADED) == 6
    floor = 2 * 80 * MODEL.num_kv_heads * MODEL.head_dim * 2 / 4e12 * 1e6
    assert steps["2 x 40"]["floor_us"] == pytest.approx(floor)
    assert Graph.replayed and report["gpu"] == "an emulated GPU" and report["versions"]["torch"]


@pytest.mark.slow
def test_what_is_wrong_is_named(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = benchmark.compare

    def off(case: Any, *rest: Any) -> dict[str, float]:
        return right(case, *rest) | ({"out": float("nan")} if case.norm else {})

    monkeypatch.setattr(benchmark, "compare", off)
    code, output, report = invoke(benchmark, tmp_path / "attention.json")
    assert code == 1 and "wrong: Case(" in output and "1 results are wrong" in output
    assert [found["wrong"] for found in report["checks"]] == [False, True]
