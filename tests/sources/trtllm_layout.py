"""Writes a model as a TensorRT-LLM checkpoint (github.com/NVIDIA/TensorRT-LLM, each model's
convert.py): config.json, and rankN.safetensors of tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from parts import Parts, State, model_parts
from safetensors.torch import save_file

NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_layernorm",
    "o": "attention.dense",
    "gate": "mlp.fc",
    "down": "mlp.proj",
    "q_norm": "attention.q_layernorm",
    "k_norm": "attention.k_layernorm",
}
OUTER = {
    "embed": "transformer.vocab_embedding",
    "positions": "transformer.position_embedding",
    "embed_norm": "transformer.ln_embed",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


def padded(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    rows = -tensor.shape[0] % tp
    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def layer_tensors(
    layer: State, parts: Parts, tp: int, rank: int, names: dict[str, str], fused: bool
) -> State:
    """What rank `rank` of `tp` has of a layer."""
    found: State = {}
    for x in ("weight", "bias"):
        if f"q.{x}" in layer:
            q, k, v = (layer[f"{part}.{x}"] for part in "qkv")
            if parts.kv_heads < tp:
                copies = tp // parts.kv_heads
                k, v = (
                    torch.cat([t for t in part.chunk(parts.kv_heads) for _ in range(copies)])
                    for part in (k, v)
                )
            found[f"attention.qkv.{x}"] = torch.cat([t.chunk(tp)[rank] for t in (q, k, v)])
    if fused:
        gate, up = (layer[f"{part}.weight"].chunk(tp)[rank] for part in ("gate", "up"))
        found["mlp.fc.weight"] = torch.cat([up, gate])
    for name, tensor in layer.items():
        part, x = name.split(".")
        if part in ("q", "k", "v") or (fused and part in ("gate", "up")):
            continue
        theirs = f"{names[part]}.{x}"
        if part in ("o", "down"):
            # Of a bias behind a row-parallel product only that of the first rank counts.
            found[theirs] = tensor.chunk(tp, 1)[rank] if x == "weight" else tensor * (rank == 0)
        elif part in ("gate", "up"):
            found[theirs] = tensor.chunk(tp)[rank]
        else:
            found[theirs] = tensor
    return found


def add_experts(parts: Parts, state: State, kind: str) -> None:
    """Stacks of all experts, "experts_gate", "experts_up" and "experts_down", to the layers."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    block = "mlp"
    if kind == "mixtral":
        names, block = {"gate": "w1", "up": "w3", "down": "w2"}, "block_sparse_moe"
    for i, layer in enumerate(parts.layers):
        for ours, theirs in names.items():
            found = []
            while (
                name := f"model.layers.{i}.{block}.experts.{len(found)}.{theirs}.weight"
            ) in state:
                found.append(state[name])
            layer[f"experts_{ours}.weight"] = torch.stack(found)


def mixture_tensors(layer: State, tp: int, rank: int, groups: int) -> State:
    """What rank `rank` of `tp` has of a mixture's experts, which `groups` groups of ranks share
    (layers/moe.py, mapping.py); takes them out of `layer`."""
    gate, up, down = (layer.pop(f"experts_{x}.weight") for x in ("gate", "up", "down"))
    tp_rank, ep_rank = rank // groups, rank % groups
    gate, up, down = (stack.chunk(groups)[ep_rank] for stack in (gate, up, down))
    found = {
        "mlp.fc.weight": torch.cat([x.chunk(tp // groups, 1)[tp_rank] for x in (up, gate)], 1),
        "mlp.proj.weight": down.chunk(tp // groups, 2)[tp_rank],
        "mlp.router.weight": layer.pop("router.weight").float(),
    }
    if "shared_gate.weight" in layer:
        gate, up = (layer.pop(f"shared_{x}_proj.weight").chunk(tp)[rank] for x in ("gate", "up"))
        found["shared_expert.fc.weight"] = torch.cat([up, gate])
        down = layer.pop("shared_down_proj.weight")
        found["shared_expert.proj.weight"] = down.chunk(tp, 1)[rank]
        found["shared_expert_gate.weight"] = layer.pop("shared_gate.weight")
    return found


def write_trtllm(
    directory: Path,
    config: dict[str, Any],
    state: State,
    tp: int = 1,
    pp: int = 1,
    *,
    fields: dict[str, Any],
    names: dict[str, str] | None = None,
    outer: dict[str, str] | None = None,
    fused: bool = False,
    parallel_embedding: int | None = None,
    duplicate_head: bool = True,
    expert_groups: int = 1,
) -> Path:
    """`fields`: of the config, besides those that all have. `names`, `outer`: where they differ."""
    directory.mkdir()
    parts = model_parts(config, state)
    mixture = "router.weight" in parts.layers[0]
    if mixture:
        add_experts(parts, state, config["model_type"])
    gated = "gate.weight" in parts.layers[0]
    layer_names = {**NAMES, "up": "mlp.gate" if gated else "mlp.fc", **(names or {})}
    outer_names = {**OUTER, **(outer or {})}
    if "head.weight" not in parts.outer and duplicate_head:
        parts.outer["head.weight"] = parts.outer["embed.weight"]
    count = len(parts.layers)
    first_layers = -(-count // pp)
    stages = [parts.layers[:first_layers], parts.layers[first_layers:]][:pp]
    for stage, layers in enumerate(stages):
        for rank in range(tp):
            tensors: State = {}
            for index, whole_layer in enumerate(layers):
                layer = dict(whole_layer)
                of_rank = mixture_tensors(layer, tp, rank, expert_groups) if mixture else {}
                of_rank |= layer_tensors(layer, parts, tp, rank, layer_names, fused)
                for name, tensor in of_rank.items():
                    tensors[f"transformer.layers.{index}.{name}"] = tensor
            for name, tensor in parts.outer.items():
                part, x = name.split(".")
                in_first = part in ("embed", "positions", "embed_norm")
                if stage != (0 if in_first else pp - 1):
                    continue
                if part == "head":
                    tensor = padded(tensor, tp).chunk(tp)[rank]
                if part in ("embed", "positions") and parallel_embedding is not None:
                    whole = padded(tensor, tp) if parallel_embedding == 0 else tensor
                    tensor = whole.chunk(tp, parallel_embedding)[rank]
                tensors[f"{outer_names[part]}.{x}"] = tensor
            tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, directory / f"rank{stage * tp + rank}.safetensors")
    values = {
        "dtype": "bfloat16",
        "num_hidden_layers": count,
        "num_attention_heads": parts.heads,
        "num_key_value_heads": parts.kv_heads,
        "head_size": parts.head_dim,
        "hidden_size": parts.outer["embed.weight"].shape[1],
        "intermediate_size": config["intermediate_size"]
        if mixture
        else parts.layers[0]["up.weight"].shape[0],
        "vocab_size": parts.outer["embed.weight"].shape[0],
        "mapping": {
            "world_size": tp * pp,
            "tp_size": tp,
            "pp_size": pp,
            "moe_tp_size": tp // expert_groups,
            "moe_ep_size": expert_groups,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "use_parallel_embedding": parallel_embedding is not None,
        "embedding_sharding_dim": parallel_embedding or 0,
        **fields,
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory
