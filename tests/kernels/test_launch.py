"""Launch descriptions: what the launchers check, and how buffers are laid out."""

from __future__ import annotations

import pytest

from llmforge.kernels import launch, stream
from llmforge.kernels.launch import Operand


def matrix(name: str, features: int, dtype: str = "bfloat16", stride: int = 0, offset: int = 0):
    return Operand(name, ("tokens", features), dtype, stride or features, offset)


def vector(name: str, size: int, dtype: str = "bfloat16"):
    return Operand(name, (size,), dtype, size)


def define(call: launch.Launch, name: str):
    return dict(call.kernel.defines)[name]


def test_wide_loads_only_where_every_row_is_aligned():
    out, weight = matrix("out", 64), vector("w", 64)
    assert define(launch.rms_norm(out, matrix("x", 64), weight, eps=1e-5), "WIDTH") == 8
    shifted = matrix("x", 64, stride=100, offset=4)
    assert define(launch.rms_norm(out, shifted, weight, eps=1e-5), "WIDTH") == 1
    odd = [matrix(name, 6) for name in "oxy"]
    assert define(launch.add(*odd), "WIDTH") == 1


def test_shapes_and_dtypes_are_checked():
    with pytest.raises(ValueError, match="several dtypes"):
        launch.add(matrix("o", 8), matrix("x", 8), matrix("y", 8, "float16"))
    with pytest.raises(ValueError, match="shapes differ"):
        launch.add(matrix("o", 8), matrix("x", 8), matrix("y", 16))
    with pytest.raises(ValueError, match="runs of 7"):
        launch.rms_norm(matrix("o", 8), matrix("x", 8), vector("w", 7), eps=1e-5)


@pytest.mark.parametrize("k", [256, 512, 2048, 3072, 4096, 8192, 14336])
def test_a_stream_plan_divides_k(k):
    plan = stream.stream_plan("bfloat16", k)
    assert plan is not None
    per_warp = k // plan.split // 4
    assert per_warp * plan.split * 4 == k and per_warp % plan.chunk == 0 and plan.chunk % 64 == 0
    assert per_warp <= 1024
    assert 2 * (plan.stages * 4 * plan.stage_bytes + 1024) <= 227 << 10


@pytest.mark.parametrize(("dtype", "k"), [("float32", 4096), ("bfloat16", 100), ("bfloat16", 64)])
def test_what_streams_not(dtype, k):
    assert stream.stream_plan(dtype, k) is None


def test_columns_of_a_matrix_keep_its_stride():
    part = matrix("x", 96).columns(32, 64)
    assert (part.features, part.row_stride, part.offset) == (32, 96, 32)
    assert not part.contiguous
