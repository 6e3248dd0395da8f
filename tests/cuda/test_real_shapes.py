"""Every instruction at the widths of real models: prompts, and decode steps of every bucket. All
layers are alike, so two are enough."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from llmforge.engine.cuda import checking
from llmforge.engine.step import Limits

pytestmark = pytest.mark.gpu
LIMITS = Limits(256, 512, 2048, 32, 256 * 16)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
def test_every_instruction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(benchmarks), *sys.path])
    import cuda_speed

    layers = 2
    config = dataclasses.replace(
        cuda_speed.MODELS[name], num_layers=layers, sliding_window=(None,) * layers
    )
    graph = cuda_speed.prepared(config)
    executable = cuda_speed.load(graph, cuda_speed.random_weights(graph), LIMITS)
    wrong = []
    for step, batch in checking.steps_to_check(executable, config.vocab_size):
        for check in checking.check_instructions(executable, batch):
            if not check.passed:
                wrong.append(f"{step}: {check}")
    executable.close()
    assert not wrong, "\n".join(wrong)
