"""A transformers model's tensors under neutral names, taken apart and turned upright: what the
writers of other layouts put together in their ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]

LLAMA = {
    "prefix": "model.layers.{i}.",
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GEMMA2 = {
    **LLAMA,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
PHI3 = {**LLAMA, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
STARCODER2 = {**LLAMA, "up": "mlp.c_fc", "down": "mlp.c_proj"}
PHI = {
    **LLAMA,
    "o": "self_attn.dense",
    "final_norm": "model.final_layernorm",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
GPT2 = {
    "prefix": "transformer.h.{i}.",
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "qkv": "attn.c_attn",
    "o": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
GPTJ = {
    **GPT2,
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "o": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}
NEOX = {
    "prefix": "gpt_neox.layers.{i}.",
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "grouped": "attention.query_key_value",
    "o": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
FALCON = {
    **NEOX,
    "prefix": "transformer.h.{i}.",
    "embed": "transformer.word_embeddings",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "grouped": "self_attention.query_key_value",
    "o": "self_attention.dense",
}
FALCON_40B = {**FALCON, "attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
OPT = {
    **LLAMA,
    "prefix": "model.decoder.layers.{i}.",
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "attention_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
BLOOM = {**FALCON, "embed_norm": "transformer.word_embeddings_layernorm"}
MPT = {
    **GPT2,
    "prefix": "transformer.blocks.{i}.",
    "final_norm": "transformer.norm_f",
    "attention_norm": "norm_1",
    "mlp_norm": "norm_2",
    "qkv": "attn.Wqkv",
    "o": "attn.out_proj",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
}
INTERNLM2 = {
    **LLAMA,
    "embed": "model.tok_embeddings",
    "head": "output",
    "attention_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
    "grouped": "attention.wqkv",
    "o": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
CHATGLM = {
    "prefix": "transformer.encoder.layers.{i}.",
    "embed": "transformer.embedding.word_embeddings",
    "final_norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": "self_attention.query_key_value",
    "o": "self_attention.dense",
    "gate_up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
EXAONE = {
    **GPT2,
    "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj",
    "v": "attn.attention.v_proj",
    "o": "attn.attention.out_proj",
    "gate": "mlp.c_fc_0",
    "up": "mlp.c_fc_1",
    "down": "mlp.c_proj",
}
# Experts are put together by who writes them.
MIXTRAL = {**LLAMA, "router": "block_sparse_moe.gate"}
QWEN_MOE = {
    **LLAMA,
    "router": "mlp.gate",
    "shared_gate": "mlp.shared_expert_gate",
    "shared_gate_proj": "mlp.shared_expert.gate_proj",
    "shared_up_proj": "mlp.shared_expert.up_proj",
    "shared_down_proj": "mlp.shared_expert.down_proj",
}
NAMES = {
    "gemma2": GEMMA2,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "phi": PHI,
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, "grouped": GPT2["qkv"], "qkv": "none"},
    "gptj": GPTJ,
    "gpt_neox": NEOX,
    "falcon": FALCON,
    "opt": OPT,
    "bloom": BLOOM,
    "mpt": MPT,
    "internlm2": INTERNLM2,
    "baichuan": {**LLAMA, "qkv": "self_attn.W_pack"},
    "chatglm": CHATGLM,
    "exaone": EXAONE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": QWEN_MOE,
}
OUTER = ("embed", "positions", "embed_norm", "final_norm", "head")
# These have as many kv heads as heads, or say it in another way.
WITHOUT_GROUPS = ("gpt2", "gpt_bigcode", "gptj", "gpt_neox", "falcon", "opt", "bloom", "mpt")
STORED_LESS_ONE = ("gemma", "gemma2", "nemotron")


@dataclass
class Parts:
    """`outer` and each of `layers`: "q.weight", "mlp_norm.bias", … → tensor."""

    outer: State
    layers: list[State]
    heads: int
    kv_heads: int
    head_dim: int


def _first(config: dict[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def model_parts(config: dict[str, Any], state: State, *, norms_whole: bool = True) -> Parts:
    """`norms_whole`: norms' weights that are stored less one have it added."""
    kind = config["model_type"]
    names = NAMES.get(kind, LLAMA)
    if kind == "falcon" and config["new_decoder_architecture"]:
        names = FALCON_40B
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = heads
    if kind not in WITHOUT_GROUPS:
        kv_heads = _first(config, "num_key_value_heads", "multi_query_group_num") or heads
    if kind == "falcon" and config["new_decoder_architecture"]:
        kv_heads = config["num_kv_heads"]
    elif config.get("multi_query"):
        kv_heads = 1
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    count = _first(config, "num_hidden_layers", "num_layers", "n_layer", "n_layers")
    parts = Parts({}, [], heads, kv_heads, config.get("head_dim") or hidden // heads)

    def take(template: str) -> State:
        found = {x: state.get(f"{template}.{x}") for x in ("weight", "bias")}
        return {x: tensor for x, tensor in found.items() if tensor is not None}

    for ours in OUTER:
        for x, tensor in take(names.get(ours, "none")).items():
            skip = 2 if kind == "opt" and ours == "positions" else 0
            parts.outer[f"{ours}.{x}"] = tensor[skip:]
    for i in range(count):
        layer: State = {}
        prefix = names["prefix"].replace("{i}", str(i))
        for ours, theirs in names.items():
            if ours in OUTER or ours == "prefix":
                continue
            for x, tensor in take(prefix + theirs).items():
                if kind == "gpt2" and tensor.ndim == 2:
                    tensor = tensor.T
                layer |= _taken_apart(ours, x, tensor, parts)
        parts.layers.append(layer)
    if norms_whole and kind in STORED_LESS_ONE:
        for tensors in (parts.outer, *parts.layers):
            for name in tensors:
                if name.endswith("norm.weight"):
                    tensors[name] = (tensors[name].float() + 1).to(tensors[name].dtype)
    return parts


def _taken_apart(ours: str, x: str, tensor: torch.Tensor, parts: Parts) -> State:
    q, kv = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    if ours == "qkv":
        split = tensor.split([q, kv, kv])
        return {f"{part}.{x}": t for part, t in zip("qkv", split, strict=True)}
    if ours == "grouped":
        each = q // parts.kv_heads
        groups = [
            group.split([each, parts.head_dim, parts.head_dim])
            for group in tensor.chunk(parts.kv_heads)
        ]
        return {
            f"{part}.{x}": torch.cat(ts)
            for part, ts in zip("qkv", zip(*groups, strict=True), strict=True)
        }
    if ours == "gate_up":
        return {f"{part}.{x}": t for part, t in zip(("gate", "up"), tensor.chunk(2), strict=True)}
    return {f"{ours}.{x}": tensor}
