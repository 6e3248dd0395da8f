"""Experts of TensorRT-LLM's mixtures: what a config says of them, which rank has which of them, and
how they are joined.

Layout: MixtureOfExperts in https://github.com/NVIDIA/TensorRT-LLM (tensorrt_llm/layers/moe.py),
Mapping (tensorrt_llm/mapping.py), and tensorrt_llm/models/llama/convert.py and qwen/convert.py.
A rank of a stage is number ep_rank = rank % moe_ep_size of those that share the experts, each
having a run of them, and number tp_rank = rank // moe_ep_size of those that share each expert's
intermediate size. Its `mlp.fc` is [experts, 2 size, hidden], of each expert up and then gate, its
`mlp.proj` [experts, hidden, size].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmforge.checkpoint.families.base import refuse
from llmforge.checkpoint.hf_config import Fields
from llmforge.checkpoint.sources.blocks import Pieced, cut, unstacked
from llmforge.checkpoint.sources.pieced import join_ranks
from llmforge.errors import SourceError

EXPERTS = re.compile(r".*\.mlp\.(fc|proj)\.weight")
# MoeConfig.ExpertScaleNormalizationMode: whether the chosen experts' shares are made to sum to one.
AS_THEY_ARE, NORMALISED = 0, 1


def read_moe(fields: Fields) -> Fields:
    """What the config says about experts, in an object or, in early releases, in fields of its
    own."""
    if fields.has("moe") or "moe_num_experts" not in fields.data:
        return fields.table("moe") or Fields(fields.path, {}, "moe")
    prefix = "moe_"
    early = {n.removeprefix(prefix): v for n, v in fields.data.items() if n.startswith(prefix)}
    return Fields(fields.path, early, "moe")


def read_router(fields: Fields, *modes: int) -> dict[str, Any]:
    """The fields of the router. `modes`: what the family knows, the class's default first."""
    moe = read_moe(fields)
    refuse(moe, "normalization_mode", *modes)
    # 1 once meant experts that are whole on ranks; then moe_ep_size came to say so.
    refuse(moe, "tp_mode", 0, 2)
    mode = moe.data.get("normalization_mode")
    return {
        "num_experts": moe.integer("num_experts", minimum=2),
        "num_experts_per_tok": moe.integer("top_k"),
        "norm_topk_prob": (modes[0] if mode is None else mode) == NORMALISED,
    }


def expert_groups(fields: Fields, tp: int) -> int:
    """In how many groups the ranks of a stage share the experts (`moe_ep_size`)."""
    mapping = fields.table("mapping") or Fields(fields.path, {}, "mapping")
    # -1 means that the other one of the two tells.
    given = {n: v for n, v in mapping.data.items() if v != -1}
    mapping = Fields(fields.path, given, "mapping")
    if mapping.has("moe_ep_size"):
        groups = mapping.integer("moe_ep_size")
    else:
        groups = max(tp // mapping.integer("moe_tp_size", tp), 1)
    each = mapping.integer("moe_tp_size", max(tp // groups, 1))
    if groups * each != tp:
        raise SourceError(
            f"{fields.path}: mapping.moe_tp_size x mapping.moe_ep_size must be tp_size ({tp}), "
            f"not {each} x {groups}"
        )
    return groups


def join_experts(
    name: str, parts: Sequence[Pieced], count: int, groups: int, where: str
) -> dict[str, Pieced]:
    """The matrices of all `count` experts: `NAME[e.up]` and `NAME[e.gate]`, or `NAME[e]`. Raises
    SourceError where the ranks' stacks are not such."""
    for rank, part in enumerate(parts):
        if len(part.shape) != 3 or part.shape[0] * groups != count:
            raise SourceError(
                f"{name} (rank {rank} of its stage) of {where} is {list(part.shape)}, but its "
                f"config asks for a stack of {count} experts in {groups} groups of ranks"
            )
    stacks = [unstacked(part) for part in parts]
    each = count // groups
    joined: dict[str, Pieced] = {}
    for expert in range(count):
        of_ranks = [stack[expert % each] for stack in stacks[expert // each :: groups]]
        if name.endswith(".proj.weight"):
            joined[f"{name}[{expert}]"] = join_ranks(name, of_ranks, True, where)
        else:
            joined |= join_up_and_gate(name, of_ranks, where, f"{expert}.")
    return joined


def join_up_and_gate(
    name: str, parts: Sequence[Pieced], where: str, prefix: str = ""
) -> dict[str, Pieced]:
    """A product that gives both, of which each rank has its part of up, then its part of gate:
    `NAME[up]` and `NAME[gate]`, with `prefix` before the words."""
    if odd := [part for part in parts if part.shape[0] % 2]:
        raise SourceError(
            f"{name} of {where} has {odd[0].shape[0]} rows, which are not those of up and gate"
        )
    halves = [cut(part, [part.shape[0] // 2] * 2) for part in parts]
    return {
        f"{name}[{prefix}up]": join_ranks(name, [up for up, _ in halves], False, where),
        f"{name}[{prefix}gate]": join_ranks(name, [gate for _, gate in halves], False, where),
    }
