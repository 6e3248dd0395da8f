"""benchmarks/tensorrt_gpu.py from end to end on the emulated machine: its times mean nothing there,
but a machine with a GPU is too dear to find its mistakes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

PROGRAM = Path(__file__).with_name("emulated_gpu_benchmark.py")
JOBS = ("speed", "example.float32", "ranks.pipeline_parallel", "tiny.olmoe", "half.mixtral",
        "tiny_ranks.mixtral", "variant.older-shapes")  # fmt: skip


def benchmark(directory: Path, *arguments: object) -> None:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(directory)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def found(path: Path) -> Any:
    return json.loads((path / "tensorrt_gpu.json").read_text())


def test_of_several_formats_the_plain_one_of_two_bytes_is_taken() -> None:
    sys.path.append(str(PROGRAM.parents[2] / "benchmarks"))
    from tensorrt_variants import plain

    def choice(*edges: tuple[str, int]) -> Any:
        infos = [SimpleNamespace(dtype=dtype, vectorized_dim=dim) for dtype, dim in edges]
        return SimpleNamespace(get_algorithm_io_info=infos.__getitem__)

    ids = ("int32", -1)
    wide, half, eights = (choice(ids, edge) for edge in (("f", -1), ("h", -1), ("h", 1)))
    assert plain([wide, half, eights], 2, "h") == [1]
    assert plain([wide, eights], 2, "h") == [0, 1]


@pytest.mark.slow
def test_every_part_is_measured_and_adds_to_what_was_found_before(tmp_path: Path) -> None:
    benchmark(tmp_path, "prepare", tmp_path / "data")
    first, second = tmp_path / "first", tmp_path / "second"
    benchmark(tmp_path, "measure", tmp_path / "data", first, *JOBS)
    results = found(first)
    parts = results["parts"]
    assert results["errors"] == {}
    assert parts["example"]["float32"]["same_tokens"] == 6
    assert parts["ranks"]["pipeline_parallel"]["same_tokens"] == 6
    assert parts["tiny"]["olmoe"]["same"]
    assert parts["tiny_ranks"]["mixtral"]["same_tokens"] == 6
    logits = parts["half"]["mixtral"]["logits"]
    assert logits["max_difference"] <= logits["tolerance"]
    assert parts["variant"]["older-shapes"]["engine_bytes"] > 0
    assert parts["speed"].keys() == {"default", "weights-apart"}
    for speed in parts["speed"].values():
        assert {report["batch_size"] for report in speed["bench"]["latency"]} == {1, 8}
        assert speed["floor_ms"].keys() == {"1", "8"}

    before = first / "tensorrt_gpu.json"
    benchmark(tmp_path, "measure", tmp_path / "data", second, "level.3", "--results", before)
    level = found(second)["parts"].pop("level")
    assert level["3"]["build_s"] > 0 and "bench" in level["3"]
    assert found(second)["parts"] == {**parts, "level": level}
