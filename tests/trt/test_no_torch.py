"""Building an engine, and loading one up to the GPU, where torch cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"
MODEL = Path(__file__).parents[2] / "examples" / "drama-3m"
NO_TORCH = 'raise ModuleNotFoundError("No module named \'torch\'", name="torch")\n'

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the example model is not here")


def llmforge(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; its workers cannot import torch either."""
    path = os.pathsep.join((str(directory / "blocked"), str(SOURCES)))
    return subprocess.run(
        [sys.executable, "-m", "llmforge", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_build_and_the_way_to_the_gpu_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text(NO_TORCH)
    converted = llmforge(tmp_path, "convert", MODEL, "-o", "checkpoint", "--dtype", "float16")
    assert converted.returncode == 0, converted.stderr
    limits = ("--max-batch-size", 2, "--max-seq-len", 64)
    options = ("--target", "tensorrt-rtx", "--arch", "sm_89", *limits)
    built = llmforge(tmp_path, "build", "checkpoint", "-o", "engine", *options)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "engine" / "engine.yaml").is_file()
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("with a GPU it would run")
    ran = llmforge(tmp_path, "run", "engine", "--prompt", "ROMEO:")
    said = " ".join(ran.stderr.split())
    assert ran.returncode == 1 and "no NVIDIA GPU" in said, said
    assert "torch" not in said and "Traceback" not in said
