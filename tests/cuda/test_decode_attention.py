"""decode_attention.cu on the GPU beside its plain-torch meaning and the kernels for which it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attention_cases import CASES, Case, compare, drawn, wrong  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_attention(case: Case) -> None:
    import torch
    from cuda_attention import Launcher, kernels_of

    major, minor = torch.cuda.get_device_capability()
    tensors = drawn(case, 0)
    launcher = Launcher(kernels_of(case, tensors), f"sm_{major}{minor}")
    off = compare(case, tensors, launcher.run)
    assert not wrong(case, off), off
