"""wide_attention.cu on an emulated GPU beside its plain-torch meaning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from emulation.bench import Bench
from emulation.build import unavailable

from llmforge.kernels.launch import Launch

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attention_cases import TOLERANCE  # noqa: E402
from prompt_cases import PROMPTS, Prompts, compare, drawn  # noqa: E402


def check(case: Prompts, processors: int = 3, seed: int = 0) -> None:
    def run(launch: Launch, tensors: Any, tokens: int, sequences: int) -> None:
        bench = Bench(seed)
        bench.tensors = tensors
        bench.run(launch, tokens=tokens, sequences=sequences, processors=processors)

    off = compare(case, drawn(case, seed), run)
    assert off <= TOLERANCE[case.dtype], off


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_shapes(case: Prompts) -> None:
    check(case)
