"""wide_attention.cu on the GPU beside its plain-torch meaning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attention_cases import TOLERANCE  # noqa: E402
from prompt_cases import PROMPTS, Prompts, compare, drawn, launches  # noqa: E402


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_it_is_attention(case: Prompts) -> None:
    import torch
    from cuda_attention import Launcher

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("products of warpgroups are those of compute capability 9.0")
    tensors = drawn(case, 0)
    launcher = Launcher((launch.kernel for launch in launches(case, tensors)), "sm_90")
    assert compare(case, tensors, launcher.run) <= TOLERANCE[case.dtype]
