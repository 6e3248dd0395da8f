"""The network of every architecture computes the model: its logits are the reference's, in prefill,
chunked prefill and decode, with native layers and with primitives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parity import Difference, compare, lower, network_logits, reference_logits
from tiny_models import NAMES, ONE, MemoryCheckpoint, config_of

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.tensorrt.lowering import TABLE
from llmforge.model.decoder import trace
from llmforge.model.ops import OPS
from llmforge.model.passes import apply, fuse_add_norm, merge_linears
from llmforge.parallel import Topology

COLUMNS = {"native": False, "primitives": True}


def differences(
    name: str,
    dtype: str = "float32",
    topology: Topology = ONE,
    columns: tuple[str, ...] = (),
    layers: int | None = None,
) -> dict[str, Difference]:
    """By column, what the networks' logits differ from the reference's."""
    config = config_of(name, dtype)
    if dtype != "float32":
        config = without_choice(config)
    checkpoint = MemoryCheckpoint(config)
    expected = reference_logits(checkpoint)
    found = {}
    for column in columns or COLUMNS:
        primitives = COLUMNS[column]
        lowered = lower(checkpoint, primitives=primitives, topology=topology, layers=layers)
        found[column] = compare(config, network_logits(config, lowered, topology), expected)
    return found


def without_choice(config: ModelConfig) -> ModelConfig:
    """The model with all of its experts chosen for every token: a router's choice between two that
    are all but equal is either way right, and then no rounding explains the difference."""
    if config.moe is None:
        return config
    moe = replace(config.moe, top_k=config.moe.num_experts, kept_groups=config.moe.groups)
    return replace(config, moe=moe)


def check(found: dict[str, Difference]) -> None:
    assert all(difference.within for difference in found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_gives_the_logits_of_the_reference(name: str) -> None:
    check(differences(name))


@pytest.mark.parametrize("name", NAMES)
def test_two_tensor_parallel_ranks_give_them_with_their_collectives_joined(name: str) -> None:
    check(differences(name, topology=Topology(2, 1)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "phi3-longrope", "gpt2"])
def test_pipeline_stages_give_them(name: str) -> None:
    check(differences(name, topology=Topology(1, 2)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm"])
def test_rows_of_what_passes_make(name: str) -> None:
    """split and add_rms_norm, which graphs have once linears are merged and norms fused."""
    config = config_of(name)
    checkpoint = MemoryCheckpoint(config)
    lowered = lower(checkpoint, primitives=False, passes=(merge_linears, fuse_add_norm))
    got = network_logits(config, lowered)
    assert compare(config, got, reference_logits(checkpoint)).within


def test_every_row_is_interpreted() -> None:
    graphs = [
        apply(trace(config_of(name), topology, 0), passes)
        for name in NAMES
        for topology in (ONE, Topology(2, 1))
        for passes in ((), (merge_linears, fuse_add_norm))
    ]
    seen = {node.op for graph in graphs for node in graph.nodes}
    assert seen | {"send", "recv"} == set(TABLE) == set(OPS)


@pytest.mark.parametrize("name", ["mixture", "mixture-of-groups", "latent-mixture"])
def test_experts_that_ranks_share_out_give_them(name: str) -> None:
    check(differences(name, topology=Topology(2, 1, 2)))


def test_two_stages_of_two_ranks_give_them() -> None:
    check(differences("qwen3-tied-bias", topology=Topology(2, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_two_byte_types_are_within_their_rounding(name: str) -> None:
    """The primitives' engines have a layer each, as where TensorRT compiles few layers better."""
    check(differences(name, "bfloat16", columns=("native",)))
    check(differences(name, "float16", columns=("primitives",), layers=1))


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma2", "phi3-longrope", "falcon-7b", "latent-mixture"]
)
def test_engines_of_a_layer_each_give_them_exactly(name: str) -> None:
    check(differences(name, layers=1))
    check(differences(name, topology=Topology(2, 1), columns=("primitives",), layers=1))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "mpt", "stablelm"])
def test_each_two_byte_type_in_each_column(name: str) -> None:
    check(differences(name, "float16", columns=("native",)))
    check(differences(name, "bfloat16", columns=("primitives",)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["mixture", "mixture-of-groups", "latent-mixture"])
def test_experts_chosen_without_top_k_on_two_ranks(name: str, dtype: str) -> None:
    """As TensorRT 8.6 has them, a layer an engine, with collectives between engines."""
    config = config_of(name, dtype)
    if dtype != "float32":
        config = without_choice(config)
    checkpoint, topology = MemoryCheckpoint(config), Topology(2, 1)
    without = {"top_k": False}
    lowered = lower(checkpoint, primitives=True, topology=topology, layers=1, features=without)
    kinds = {
        step.kind
        for rank in lowered
        for program in rank.programs.values()
        for step in program.steps
    }
    assert "TOPK" not in kinds and "MATRIX_MULTIPLY" in kinds
    got = network_logits(config, lowered, topology)
    assert compare(config, got, reference_logits(checkpoint)).within
