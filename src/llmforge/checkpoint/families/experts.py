"""What families with mixtures of experts share: tensor names and fields of routers."""

from __future__ import annotations

from typing import Any

from llmforge.checkpoint.config import ModelConfig, MoeConfig
from llmforge.checkpoint.families.base import RMS_EPS, ROTARY_AND_MASKS, Rules, rename
from llmforge.checkpoint.families.llama import ATTENTION, ENDS, MLP, PRE_NORMS
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.mapping import Ignore, Rule

EXPERT_ALIASES = {**RMS_EPS, "num_experts": "num_local_experts"}
GATE_UP = "layers.{i}.moe.experts.gate_up.weight"
DOWN = "layers.{i}.moe.experts.down.weight"


def router(theirs: str) -> Rule:
    return rename(f"{theirs}.weight", "layers.{i}.moe.router.weight")


def experts(
    prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Rules:
    """Experts by number, or stacked as transformers 5 has them."""
    one = f"{prefix}.{{e}}."
    return (
        Rule((f"{one}{gate}.weight", f"{one}{up}.weight"), (GATE_UP,)),
        rename(f"{prefix}.gate_up_proj", GATE_UP),
        Rule((f"{one}{down}.weight",), (DOWN,)),
        rename(f"{prefix}.down_proj", DOWN),
    )


def shared_expert(theirs: str) -> Rules:
    ours = "layers.{i}.moe.shared"
    return tuple(
        rename(f"{theirs}.{x}_proj.weight", f"{ours}.{x}.weight") for x in ("gate", "up", "down")
    )


def next_token_layers(config: ModelConfig) -> tuple[Ignore, ...]:
    """The layer behind the last one predicts further tokens (https://arxiv.org/abs/2412.19437,
    section 2.2)."""
    return (
        *ROTARY_AND_MASKS,
        Ignore(
            rf"model\.layers\.{config.num_layers}\..*",
            "multi-token prediction is not used",
        ),
    )


# Of dense layers and of what all layers have.
MIXTURE: Rules = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)


def read_top_k(fields: Fields, name: str, default: Any, experts: int) -> int:
    top_k = fields.integer(name, default)
    if top_k > experts:
        raise fields.bad(name, f"at most the number of experts ({experts})")
    return top_k


def read_mixture(fields: Fields, count: int, top_k: int, **own: Any) -> MoeConfig:
    """A mixture of the usual fields, on every layer. count, top_k: where the file does not say.
    own: the rest of MoeConfig."""
    count = fields.integer("num_experts", count)
    return MoeConfig(
        num_experts=count,
        top_k=read_top_k(fields, "num_experts_per_tok", top_k, count),
        expert_size=fields.integer("intermediate_size"),
        **own,
    )


def read_groups(
    fields: Fields, experts: int, top_k: int, default: tuple[int, int]
) -> tuple[int, int]:
    """How many groups the experts form, and how many of them a token may choose from."""
    groups = fields.integer("n_group", default[0])
    kept = fields.integer("topk_group", default[1])
    if experts % groups:
        raise fields.bad("n_group", f"a divisor of the number of experts ({experts})")
    if kept > groups or experts // groups * kept < top_k:
        raise fields.bad("topk_group", f"at most {groups} and enough for {top_k} experts a token")
    return groups, kept


CORRECTED_MIXTURE: Rules = (
    router("model.layers.{i}.mlp.gate"),
    rename(
        "model.layers.{i}.mlp.gate.e_score_correction_bias",
        "layers.{i}.moe.router.correction",
    ),
    *experts("model.layers.{i}.mlp.experts"),
    *shared_expert("model.layers.{i}.mlp.shared_experts"),
)
