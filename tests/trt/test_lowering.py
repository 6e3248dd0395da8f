"""The network of every architecture computes the model: its logits are the reference's, in prefill,
chunked prefill and decode, with native layers and with primitives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parity import Difference, compare, lower, network_logits, reference_logits
from tiny_models import NAMES, ONE, MemoryCheckpoint, config_of

from llmforge.checkpoint.config import ModelConfig
from llmforge.parallel import Topology

COLUMNS = {"native": False, "primitives": True}


def differences(
    name: str, dtype: str = "float32", topology: Topology = ONE, columns: tuple[str, ...] = ()
) -> dict[str, Difference]:
    """By column, what the networks' logits differ from the reference's."""
    config = config_of(name, dtype)
    if dtype != "float32":
        config = without_choice(config)
    checkpoint = MemoryCheckpoint(config)
    expected = reference_logits(checkpoint)
    found = {}
    for column in columns or COLUMNS:
        lowered = lower(checkpoint, primitives=COLUMNS[column], topology=topology)
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


@pytest.mark.parametrize("name", ["mixture", "mixture-of-groups", "latent-mixture"])
def test_experts_that_ranks_share_out_give_them(name: str) -> None:
    check(differences(name, topology=Topology(2, 1, 2)))


def test_two_stages_of_two_ranks_give_them() -> None:
    check(differences("qwen3-tied-bias", topology=Topology(2, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_two_byte_types_are_within_their_rounding(name: str) -> None:
    check(differences(name, "bfloat16", columns=("native",)))
    check(differences(name, "float16", columns=("primitives",)))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "mpt", "stablelm"])
def test_each_two_byte_type_in_each_column(name: str) -> None:
    check(differences(name, "float16", columns=("native",)))
    check(differences(name, "bfloat16", columns=("primitives",)))
