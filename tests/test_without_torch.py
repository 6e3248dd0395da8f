"""What needs no torch works where it is not installed, and the rest says so in a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmforge.checkpoint import dtypes

EXAMPLE = Path(__file__).parents[1] / "examples/drama-3m"
# Makes `import torch` fail as where it is not installed.
BLOCKED = """
import sys
sys.modules["torch"] = None
from llmforge.cli.main import main
sys.argv[0] = "llmforge"
main()
"""


def llmforge(*arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, arguments)], capture_output=True, text=True
    )


def test_the_example_converts_but_does_not_build_for_the_cpu(tmp_path):
    done = llmforge("convert", EXAMPLE, "-o", tmp_path / "checkpoint", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    done = llmforge("build", tmp_path / "checkpoint", "-o", tmp_path / "engine")
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert "target cpu cannot be used here: torch is not installed" in message
    assert "pip install 'llmforge[torch]'" in message and "Traceback" not in message


def test_tensorrt_modules_import_no_torch():
    code = """
import importlib, pkgutil, sys
import llmforge.engine.tensorrt as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
import llmforge.engine.build, llmforge.runtime.generate, llmforge.runtime.bench
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("to", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
def test_numpy_converts_to_the_bits_that_torch_does(source, to, monkeypatch):
    kinds = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    source, to = (kinds.get(name) or np.dtype(name) for name in (source, to))
    random = np.random.default_rng(0)
    values = (random.standard_normal(4096) * 10.0 ** random.integers(-8, 9, 4096)).astype("f4")
    values = np.concatenate([values, np.array([0.0, -0.0, 65504.0, 65520.0, 1e-8], "f4")])
    with np.errstate(over="ignore"):
        values = values.astype(source)
    with_torch, with_numpy = np.empty(len(values), to), np.empty(len(values), to)
    dtypes.convert_into(values, with_torch)
    monkeypatch.setattr(dtypes, "_torch", lambda: None)
    dtypes.convert_into(values, with_numpy)
    bits = f"u{to.itemsize}"
    assert (with_torch.view(bits) == with_numpy.view(bits)).all()
