"""Engines by the real builder of tensorrt_rtx, which needs no GPU, of networks that test_build.py's
are not like. They are built; nothing executes them here."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated_target import emulated_images
from tiny_models import ONE, MemoryCheckpoint, config_of

from llmforge.engine.step import Limits
from llmforge.engine.tensorrt import target as targets
from llmforge.engine.tensorrt.builder import BuildOptions
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.engine.tensorrt.target import TensorRTTarget
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

ARCHS = ("sm_80", "sm_89", "sm_120")
LIMITS = Limits(max_batch_size=2, max_seq_len=32, max_num_tokens=16, block_size=32, num_blocks=2)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are compiled by tests/kernels."""
    monkeypatch.setattr(targets, "write_images", emulated_images)


def built(
    name: str,
    dtype: str,
    topology: Topology,
    directory: Path,
    *,
    primitives: bool,
    weights_apart: bool = False,
) -> list[Path]:
    """The engines of the last rank, which has a head, a part of the vocabulary and every layer."""
    checkpoint = MemoryCheckpoint(config_of(name, dtype))
    rank = topology.world_size - 1
    options = BuildOptions(archs=ARCHS, primitives=primitives, weights_apart=weights_apart)
    target = TensorRTTarget("tensorrt-rtx", options)
    graph = target.prepare(trace(checkpoint.config, topology, rank))
    target.compile(graph, checkpoint.of_rank(topology, rank), LIMITS, directory)
    steps = RankPlan.read(directory).steps
    engines = [directory / step.file for step in steps if step.kind == "engine"]
    assert all(engine.stat().st_size for engine in engines)
    return engines


# Of each family of networks one: between them every row of the lowering table is built.
NAMES = (
    "gemma2", "bloom", "phi3-longrope", "llama-dynamic", "olmo2",
    "mixture-of-groups", "mixture-clamped-sinks", "latent-mixture",
)  # fmt: skip


@pytest.mark.parametrize("primitives", [False, True], ids=["native", "primitives"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_table_is_built(name: str, primitives: bool, tmp_path: Path) -> None:
    assert built(name, "float16", ONE, tmp_path, primitives=primitives)


@pytest.mark.parametrize("name", NAMES)
def test_with_weights_as_inputs(name: str, tmp_path: Path) -> None:
    for dtype, primitives in (("bfloat16", False), ("float16", True)):
        directory = tmp_path / dtype
        directory.mkdir()
        made = built(name, dtype, ONE, directory, primitives=primitives, weights_apart=True)
        assert made and (directory / "weights.bin").stat().st_size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments_of_two_ranks(dtype: str, tmp_path: Path) -> None:
    assert len(built("olmo2", dtype, Topology(2, 1), tmp_path, primitives=True)) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_collectives_in_the_engine(dtype: str, tmp_path: Path) -> None:
    assert len(built("olmo2", dtype, Topology(2, 1), tmp_path, primitives=False)) == 1
