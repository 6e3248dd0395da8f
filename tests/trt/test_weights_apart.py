"""Weights as inputs of engines: the same logits, one engine for layers that are alike, each weight
once in the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from emulated_target import Rig
from parity import LIMITS, HeldFile, Lowered, compare, lower, network_logits, reference_logits
from test_lowering import without_choice
from tiny_models import NAMES, ONE, MemoryCheckpoint, config_of

from llmforge.engine.tensorrt.alike import anonymous
from llmforge.engine.tensorrt.builder import BuildOptions
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.engine.tensorrt.segments import Segment, cut
from llmforge.engine.tensorrt.target import TensorRTTarget
from llmforge.engine.tensorrt.weight_file import WEIGHTS_FILE, WeightFile, upload_weights
from llmforge.errors import StoreError
from llmforge.model.decoder import trace
from llmforge.model.graph import Graph
from llmforge.parallel import Topology


def lowered_apart(name: str, layers: int | None = 1, topology: Topology = ONE) -> list[Lowered]:
    checkpoint = MemoryCheckpoint(config_of(name))
    return lower(checkpoint, primitives=True, apart=True, layers=layers, topology=topology)


def segments(graph: Graph, layers: int) -> list[Segment]:
    return [part for part in cut(graph, lambda node: False, layers) if isinstance(part, Segment)]


@pytest.mark.parametrize("name", NAMES)
def test_they_give_the_logits_of_the_reference(name: str) -> None:
    checkpoint = MemoryCheckpoint(config_of(name))
    expected = reference_logits(checkpoint)
    for layers, primitives in ((1, True), (None, False)):
        lowered = lower(checkpoint, primitives=primitives, apart=True, layers=layers)
        got = network_logits(checkpoint.config, lowered)
        assert compare(checkpoint.config, got, expected).within


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma2", "gpt2", "mixture"])
@pytest.mark.parametrize("topology", [Topology(2, 1), Topology(1, 2)], ids=["tensor", "pipeline"])
def test_on_two_ranks(name: str, topology: Topology) -> None:
    checkpoint = MemoryCheckpoint(config_of(name))
    got = network_logits(checkpoint.config, lowered_apart(name, 1, topology), topology)
    assert compare(checkpoint.config, got, reference_logits(checkpoint)).within


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_two_byte_types(dtype: str) -> None:
    config = without_choice(config_of("mixture", dtype))
    checkpoint = MemoryCheckpoint(config)
    lowered = lower(checkpoint, primitives=True, apart=True, layers=1)
    assert compare(config, network_logits(config, lowered), reference_logits(checkpoint)).within


def test_layers_that_are_alike_share_an_engine() -> None:
    config = dataclasses.replace(config_of("llama"), num_layers=6, sliding_window=(None,) * 6)
    [rank] = lower(MemoryCheckpoint(config), primitives=True, apart=True, layers=1)
    files = [step.file for step in rank.plan.steps]
    first, *middle, last = files
    assert len(files) == 6 and len(set(middle)) == 1 and len({first, middle[0], last}) == 3
    assert set(rank.programs) == set(files)
    assert {cache.name.split(".")[1] for cache in rank.plan.caches} == set("012345")
    assert len({step.weights for step in rank.plan.steps}) == 6


def test_layers_that_differ_do_not() -> None:
    """Every other layer of gemma2 has a window."""
    config = config_of("gemma2")
    assert len({bool(window) for window in config.sliding_window}) == 2
    graph = trace(config, ONE, 0)
    keys = [anonymous(graph, segment).key for segment in segments(graph, 1)]
    windows = [bool(window) for window in config.sliding_window]
    for i in range(1, len(keys) - 1):
        for j in range(1, len(keys) - 1):
            assert (keys[i] == keys[j]) == (windows[i] == windows[j])


def test_an_embedding_that_ranks_sum_is_not_one_that_they_do_not() -> None:
    graphs = [trace(config_of("llama"), topology, 0) for topology in (ONE, Topology(2, 1))]
    alone, summed = (
        anonymous(graph, Segment(graph.nodes[:1], (), graph.nodes[0].outputs)) for graph in graphs
    )
    assert alone.graph.nodes[0] == summed.graph.nodes[0]
    assert alone.key != summed.key


def test_a_tied_embedding_is_in_the_file_once() -> None:
    [rank] = lowered_apart("llama-tied")
    first, last = rank.plan.steps[0].weights, rank.plan.steps[-1].weights
    [table] = [name for name in first if "embed" in name]
    assert table in last
    wanted = {name for step in rank.plan.steps for name in step.weights}
    assert {weight.name for weight in rank.plan.weights} == wanted
    assert len(rank.weights) == rank.plan.weights[-1].offset + rank.plan.weights[-1].nbytes
    assert all(weight.offset % 256 == 0 for weight in rank.plan.weights)


def test_the_plan_is_read_as_it_was_written() -> None:
    [rank] = lowered_apart("llama")
    assert RankPlan.from_json(rank.plan.to_json()) == rank.plan
    assert rank.plan.weights and rank.plan.steps[0].local


def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [rank] = lowered_apart("llama")
    device = Rig(monkeypatch).device()
    with pytest.raises(StoreError, match=r"cannot be read .*llmforge build"):
        upload_weights(rank.plan, tmp_path, device)
    (tmp_path / WEIGHTS_FILE).write_bytes(rank.weights[:-1])
    with pytest.raises(StoreError, match=r"has [\d,]+ bytes"):
        upload_weights(rank.plan, tmp_path, device)
    (tmp_path / WEIGHTS_FILE).write_bytes(rank.weights)
    addresses = upload_weights(rank.plan, tmp_path, device)
    for weight in rank.plan.weights:
        found = np.empty(weight.nbytes, np.uint8)
        device.download(found, addresses[weight.name])
        device.synchronize()
        assert found.tobytes() == rank.weights[weight.offset :][: weight.nbytes]


def test_each_weight_is_written_once_and_aligned() -> None:
    held = HeldFile()
    file = WeightFile(held)  # type: ignore[arg-type]
    file.add("a", "a", np.arange(3, dtype=np.int32))
    assert file.has("a") and not file.has("b")
    file.add("b", "b", np.ones((2, 2), np.float16))
    [a, b] = file.plans
    assert (a.offset, a.nbytes, b.offset, b.nbytes) == (0, 12, 256, 8)
    assert file.name("b") == b.name != a.name
    assert held.data[256:] == np.ones(4, np.float16).tobytes()


@pytest.mark.parametrize("version", [None, "8.6", "10.13"])
@pytest.mark.parametrize("primitives", [False, True], ids=["native", "primitives"])
def test_built_engines_have_their_checksums(
    version: str | None, primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch, version)
    checkpoint = MemoryCheckpoint(config_of("llama"))
    archs = ("sm_89",) if version is None else ()
    options = BuildOptions(archs=archs, primitives=primitives, weights_apart=True)
    target = TensorRTTarget(rig.name, options, rig.package())
    graph = target.prepare(trace(checkpoint.config, ONE, 0))
    done = target.compile(graph, checkpoint.of_rank(ONE, 0), LIMITS, tmp_path)
    assert target.details()["weights"] == "apart"
    plan = RankPlan.read(tmp_path)
    assert set(done) == {WEIGHTS_FILE, *(step.file for step in plan.steps)}
    for file, (size, _) in done.items():
        assert (tmp_path / file).stat().st_size == size
