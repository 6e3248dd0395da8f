"""Which layouts a model can be built for, and how the others are refused."""

from __future__ import annotations

import dataclasses

import pytest

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from llmforge.engine.build import check_topology
from llmforge.errors import BuildError
from llmforge.parallel import Topology

DENSE = ModelConfig(
    family="test",
    dtype="float32",
    vocab_size=99,
    hidden_size=48,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=64,
    max_position=128,
    norm_eps=1e-5,
    rope=RopeConfig(1e4, 12),
    sliding_window=(None,) * 3,
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(num_experts=6, top_k=2, expert_size=12))
LATENT = dataclasses.replace(
    DENSE,
    num_kv_heads=1,
    rope=RopeConfig(1e4, 4),
    latent=LatentConfig(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6),
)


@pytest.mark.parametrize(
    ("config", "topology"),
    [
        (DENSE, Topology(8, 3)),
        (MOE, Topology(4)),
        (MOE, Topology(4, 1, 2)),
        (MOE, Topology(2, 3, 2)),
        (LATENT, Topology(8)),
    ],
    ids=str,
)
def test_what_divides_is_allowed(config: ModelConfig, topology: Topology) -> None:
    check_topology(config, topology)


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        (DENSE, Topology(3), "tensor_parallel 3 does not divide .* allowed: 1, 2, 4, 8$"),
        (DENSE, Topology(16), "tensor_parallel 16 does not divide .*8 attention heads"),
        (DENSE, Topology(1, 4), "pipeline_parallel 4 is more than the model's 3 layers"),
        (DENSE, Topology(2, 1, 2), "expert_parallel 2 .* this model has no experts; leave it out"),
        (MOE, Topology(8), r"6 experts of size 12\); allowed: 1, 2, 4$"),
        (MOE, Topology(4, 1, 4), r"must divide tensor_parallel \(4\) and the model's 6 experts"),
        (MOE, Topology(4, 1, 4), "allowed: 1, 2$"),
        (MOE, Topology(2, 1, 3), "expert_parallel 3 must divide tensor_parallel"),
        (LATENT, Topology(3), "tensor_parallel 3 does not divide"),
    ],
    ids=str,
)
def test_what_does_not_divide_is_refused_in_a_line(
    config: ModelConfig, topology: Topology, message: str
) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        check_topology(config, topology)
    assert "\n" not in str(caught.value)
