"""Engines by the real builder of tensorrt_rtx, which needs no GPU. They are built and their headers
read; nothing executes them here."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx as trt
import yaml
from hand_made import Hand
from models import BY_NAME

from llmforge.checkpoint.convert import convert
from llmforge.engine.build import build
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.settings import BuildSettings, ConvertSettings

ARCHS = ("sm_80", "sm_89", "sm_120")
LIMITS = {"max_batch_size": 2, "max_seq_len": 32, "max_num_tokens": 16}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a case by name and dtype."""
    import torch

    directory = tmp_path_factory.mktemp("checkpoints")
    BY_NAME["llama"].save(directory / "hf", torch.float32)
    for dtype in ("bfloat16", "float16"):
        convert(str(directory / "hf"), directory / dtype, ConvertSettings(dtype=dtype))
    return directory


def header(engine: Path) -> bytes:
    """The part of an engine that says what it is for, checked."""
    runtime = trt.Runtime(Hand().log)
    data = engine.read_bytes()
    assert len(data) > runtime.engine_header_size
    start = data[: runtime.engine_header_size]
    # Without a GPU no engine is valid; what is asked here is that the header can be read.
    validity, reasons = runtime.get_engine_validity(start)
    assert validity in trt.EngineValidity.__members__.values(), (validity, reasons)
    return start


@pytest.mark.parametrize("primitives", [False, True], ids=["native", "primitives"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_for_three_architectures(
    ranks: int, dtype: str, primitives: bool, checkpoints: Path, tmp_path: Path
) -> None:
    settings = BuildSettings(
        target="tensorrt-rtx", arch=ARCHS, tensor_parallel=ranks, primitives=primitives, **LIMITS
    )
    build(checkpoints / dtype, tmp_path / "engine", settings)
    manifest = yaml.safe_load((tmp_path / "engine" / "engine.yaml").read_text())
    details = manifest["target_details"]
    assert details["package"] == "tensorrt_rtx" and details["version"] == trt.__version__
    assert details["archs"] == list(ARCHS)
    for rank in range(ranks):
        plan = RankPlan.read(tmp_path / "engine" / f"rank{rank}")
        files = [step.file for step in plan.steps if step.kind == "engine"]
        assert plan.archs == ARCHS and plan.primitives == primitives
        assert (len(files) > 1) == (ranks > 1 and primitives)
        for file in files:
            header(tmp_path / "engine" / f"rank{rank}" / file)
