"""benchmarks/cuda_prompts.py from end to end on the emulated GPU, as test_emulated_benchmark.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import PROCESSORS
from test_emulated_benchmark import Torch

from llmforge.kernels.launch import Launch

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


class Launcher:
    def __init__(self, specs: Any, arch: str) -> None:
        assert arch == "sm_90"
        self._bench = Bench()

    def set_step(self, tokens: int, sequences: int, longest: int) -> None:
        sizes = {"tokens": tokens, "sequences": sequences, "longest_query": longest}
        for name, value in sizes.items():
            self._bench.sizes.set(name, value)

    def bind(self, launch: Launch, tensors: Any) -> Any:
        def run(stream: int) -> None:
            self._bench.tensors = tensors
            self._bench.run(launch, processors=PROCESSORS)

        return run

    def run(self, launch: Launch, tensors: Any, sequences: int, tokens: int) -> None:
        self.set_step(tokens, sequences, 1)
        self.bind(launch, tensors)(0)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path("benchmarks").absolute()), *sys.path])
    import cuda_prompts
    import cuda_speed

    def drawn(case: Any, seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        return dict(right(case, seed))

    right, shape = cuda_prompts.drawn, {"head_dim": 16, "kv_heads": 1}
    replaced = {
        "torch": Torch(), "Launcher": Launcher, "drawn": drawn, "SETS": 2,
        "PROMPTS": cuda_prompts.PROMPTS[:2], "flash_seconds": lambda case, sets: 3e-6,
        "STEPS": {
            "2 x 20": cuda_prompts.Prompts((20, 20), (0, 0), **shape),
            "20, 2 of 40": cuda_prompts.Prompts((20, 1, 1), (0, 39, 39), **shape),
        },
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(cuda_prompts, name, value)
    monkeypatch.setattr(cuda_speed, "torch", replaced["torch"])
    return cuda_prompts


def invoke(benchmark: ModuleType, out: Path) -> tuple[int, str, dict[str, Any]]:
    result = CliRunner().invoke(benchmark.main, ["--json", str(out)], catch_exceptions=False)
    return result.exit_code, result.output, json.loads(out.read_text())


def test_it_checks_and_times_every_step(benchmark: ModuleType, tmp_path: Path) -> None:
    code, output, report = invoke(benchmark, tmp_path / "results" / "prompts.json")
    assert code == 0 and "2 cases, wrong: 0" in output, output
    assert list(report["steps"]) == ["2 x 20", "20, 2 of 40"] and report["wrong"] == []
    first, second = report["steps"].values()
    assert first["us"] == {"wide_attention": 1e3, "others": 1e3, "torch flash": 3.0}
    assert set(second["us"]) == {"wide_attention", "others"}
    assert max(first["off"], second["off"]) < 1e-2
    assert first["tflops"] == pytest.approx(4 * 4 * 16 * 2 * 210 / 1e-3 / 1e12)


def test_what_is_wrong_is_named(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "row_distance", lambda *rows: float("nan"))
    monkeypatch.setattr(benchmark, "compare", lambda case, *rest: 0.5 * (case.group == 1))
    code, output, report = invoke(benchmark, tmp_path / "prompts.json")
    assert code == 1 and "wrong: Prompts(" in output and "3 results are wrong" in output
    assert report["wrong"][1:] == ["2 x 20", "20, 2 of 40"]
