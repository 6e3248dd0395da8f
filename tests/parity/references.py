"""Families whose code is not in transformers, in plain torch: written from their public
definitions, apart from llmforge's rules, and reading the weights as those models store them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from case import LAYERS, MAX_POSITION, VOCABULARY
from safetensors.torch import save_file
from torch.nn import functional as F

Tensor = torch.Tensor
HIDDEN, HEADS, MLP = 48, 4, 88
HEAD_DIM = HIDDEN // HEADS
BAICHUAN2_VOCABULARY = 125696


@dataclass
class Reference:
    """A model of a family: its config.json, and its tensors by name."""

    name: str
    config: dict[str, Any]
    vocabulary: int = VOCABULARY
    kv_heads: int = HEADS
    weights: dict[str, Tensor] = field(default_factory=dict)

    # What a family's class says: names of tensors, and eps.
    names: ClassVar = {
        "embed": "model.embed_tokens.weight",
        "norm_1": "model.layers.{i}.input_layernorm.weight",
        "norm_2": "model.layers.{i}.post_attention_layernorm.weight",
        "o": "model.layers.{i}.self_attn.o_proj.weight",
        "gate": "model.layers.{i}.mlp.gate_proj.weight",
        "up": "model.layers.{i}.mlp.up_proj.weight",
        "down": "model.layers.{i}.mlp.down_proj.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
    eps = 1e-6

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the tensors that `names` has, and of the family's own (`layer_shapes`)."""
        common: dict[str, tuple[int, ...]] = {
            "embed": (self.vocabulary, HIDDEN),
            "norm_1": (HIDDEN,),
            "norm_2": (HIDDEN,),
            "o": (HIDDEN, HIDDEN),
            "gate": (MLP, HIDDEN),
            "up": (MLP, HIDDEN),
            "down": (HIDDEN, MLP),
            "norm": (HIDDEN,),
            "head": (self.vocabulary, HIDDEN),
        }
        named = {self.names[key]: shape for key, shape in common.items() if key in self.names}
        result: dict[str, tuple[int, ...]] = {}
        for name, shape in {**named, **self.layer_shapes()}.items():
            for i in range(LAYERS if "{i}" in name else 1):
                result[name.replace("{i}", str(i))] = shape
        return result

    def save(self, directory: Path, dtype: torch.dtype) -> Reference:
        generator = torch.Generator().manual_seed(7)
        for name, shape in self.shapes().items():
            drawn = torch.randn(shape, generator=generator) * 0.15
            norm = len(shape) == 1 and "bias" not in name
            self.weights[name] = (drawn + norm).to(dtype)
        directory.mkdir()
        config = {"dtype": str(dtype).removeprefix("torch."), **self.config}
        (directory / "config.json").write_text(json.dumps(config))
        save_file(self.weights, directory / "model.safetensors")
        return self

    def tensor(self, key: str, layer: int = 0) -> Tensor:
        return self.weights[self.names.get(key, key).replace("{i}", str(layer))]

    def logits(self, tokens: list[int]) -> Tensor:
        """[tokens, vocabulary]"""
        x = self.tensor("embed")[tokens]
        mask = torch.ones(len(tokens), len(tokens)).tril().bool()
        for i in range(LAYERS):
            q, k, v = self.qkv(i, self.normed(x, "norm_1", i))
            group = q.shape[0] // k.shape[0]
            k, v = (t.repeat_interleave(group, dim=0) for t in (k, v))
            scores = (q @ k.transpose(1, 2)).float() / math.sqrt(HEAD_DIM) + self.bias(len(tokens))
            shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
            x = x + (shares @ v).transpose(0, 1).flatten(1) @ self.tensor("o", i).T
            gate, up = self.gate_and_up(i, self.normed(x, "norm_2", i))
            x = x + (F.silu(gate) * up) @ self.tensor("down", i).T
        return self.normed(x, "norm") @ self.head().T

    def normed(self, x: Tensor, key: str, layer: int = 0) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.tensor(key, layer)

    # -- what families do differently ------------------------------------------------------------

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [heads, tokens, head_dim], rotated."""
        raise NotImplementedError

    def gate_and_up(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.tensor("gate", layer).T, x @ self.tensor("up", layer).T

    def bias(self, length: int) -> Tensor | float:
        """What is added to the scores."""
        return 0.0

    def head(self) -> Tensor:
        return self.tensor("head")


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)


def angles(length: int, dim: int, theta: float = 10000.0) -> Tensor:
    return torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Halves of [heads, tokens, head_dim]."""
    turns = angles(x.shape[1], x.shape[2], theta)
    both = torch.cat((turns, turns), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * both.cos() + turned * both.sin()).to(x.dtype)


class InternLM2(Reference):
    names: ClassVar = {
        "embed": "model.tok_embeddings.weight",
        "norm_1": "model.layers.{i}.attention_norm.weight",
        "norm_2": "model.layers.{i}.ffn_norm.weight",
        "o": "model.layers.{i}.attention.wo.weight",
        "gate": "model.layers.{i}.feed_forward.w1.weight",
        "up": "model.layers.{i}.feed_forward.w3.weight",
        "down": "model.layers.{i}.feed_forward.w2.weight",
        "norm": "model.norm.weight",
        "head": "output.weight",
    }

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (HEADS + 2 * self.kv_heads) * HEAD_DIM
        return {"model.layers.{i}.attention.wqkv.weight": (rows, HIDDEN)}

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        merged = x @ self.tensor("model.layers.{i}.attention.wqkv.weight", layer).T
        # For each kv head its q heads, then k, then v.
        groups = merged.view(len(x), self.kv_heads, HEADS // self.kv_heads + 2, HEAD_DIM)
        q = groups[:, :, :-2].flatten(1, 2).transpose(0, 1)
        k, v = (groups[:, :, at].transpose(0, 1) for at in (-2, -1))
        theta = self.config["rope_theta"]
        return rotated(q, theta), rotated(k, theta), v


class Baichuan(Reference):
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"model.layers.{i}.self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN)}

    @property
    def alibi(self) -> bool:
        return "max_position_embeddings" not in self.config

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        merged = x @ self.tensor("model.layers.{i}.self_attn.W_pack.weight", layer).T
        q, k, v = map(by_head, merged.chunk(3, dim=-1))
        return (q, k, v) if self.alibi else (rotated(q), rotated(k), v)

    def bias(self, length: int) -> Tensor | float:
        if not self.alibi:
            return 0.0
        slopes = torch.tensor([2 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
        return slopes[:, None, None] * torch.arange(length)

    def head(self) -> Tensor:
        head = self.tensor("head")
        return F.normalize(head) if self.vocabulary == BAICHUAN2_VOCABULARY else head


class ChatGLM(Reference):
    names: ClassVar = {
        "embed": "transformer.embedding.word_embeddings.weight",
        "norm_1": "transformer.encoder.layers.{i}.input_layernorm.weight",
        "norm_2": "transformer.encoder.layers.{i}.post_attention_layernorm.weight",
        "o": "transformer.encoder.layers.{i}.self_attention.dense.weight",
        "down": "transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight",
        "norm": "transformer.encoder.final_layernorm.weight",
        "head": "transformer.output_layer.weight",
    }
    eps = 1e-5
    merged = "transformer.encoder.layers.{i}.self_attention.query_key_value."
    gate_up = "transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight"

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (HEADS + 2 * self.kv_heads) * HEAD_DIM
        return {
            f"{self.merged}weight": (rows, HIDDEN),
            f"{self.merged}bias": (rows,),
            self.gate_up: (2 * MLP, HIDDEN),
        }

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        weight, bias = (self.tensor(f"{self.merged}{x}", layer) for x in ("weight", "bias"))
        kv = self.kv_heads * HEAD_DIM
        q, k, v = map(by_head, (x @ weight.T + bias).split([HIDDEN, kv, kv], dim=-1))
        return self.half_rotated(q), self.half_rotated(k), v

    def half_rotated(self, x: Tensor) -> Tensor:
        """Pairs of neighbours in the first half of each head."""
        pairs = x[..., : HEAD_DIM // 2].float().unflatten(-1, (-1, 2))
        ratio = self.config.get("rope_ratio", 1)
        second = "chatglm2" in self.config.get("_name_or_path", "")
        turns = angles(x.shape[1], HEAD_DIM // 2, 10000.0 * (1 if second else ratio))
        if second:
            turns = turns / ratio
        turned = torch.stack(
            (
                pairs[..., 0] * turns.cos() - pairs[..., 1] * turns.sin(),
                pairs[..., 1] * turns.cos() + pairs[..., 0] * turns.sin(),
            ),
            dim=-1,
        )
        return torch.cat((turned.flatten(-2).to(x.dtype), x[..., HEAD_DIM // 2 :]), dim=-1)

    def gate_and_up(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x @ self.tensor(self.gate_up, layer).T).chunk(2, dim=-1)
        return gate, up


class Exaone(Reference):
    names: ClassVar = {
        "embed": "transformer.wte.weight",
        "norm_1": "transformer.h.{i}.ln_1.weight",
        "norm_2": "transformer.h.{i}.ln_2.weight",
        "o": "transformer.h.{i}.attn.attention.out_proj.weight",
        "gate": "transformer.h.{i}.mlp.c_fc_0.weight",
        "up": "transformer.h.{i}.mlp.c_fc_1.weight",
        "down": "transformer.h.{i}.mlp.c_proj.weight",
        "norm": "transformer.ln_f.weight",
        "head": "lm_head.weight",
    }
    eps = 1e-5
    projection = "transformer.h.{{i}}.attn.attention.{}_proj.weight"

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        heads = {"q": HEADS, "k": self.kv_heads, "v": self.kv_heads}
        return {self.projection.format(x): (n * HEAD_DIM, HIDDEN) for x, n in heads.items()}

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (by_head(x @ self.tensor(self.projection.format(n), layer).T) for n in "qkv")
        return rotated(q), rotated(k), v


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
}
_BAICHUAN = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], **_SIZES}
_BAICHUAN_13B = {
    **{key: value for key, value in _BAICHUAN.items() if key != "max_position_embeddings"},
    "model_max_length": MAX_POSITION,
}
_SECOND = {"vocab_size": BAICHUAN2_VOCABULARY}
_CHATGLM = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "padded_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": MLP,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": HEAD_DIM,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "quantization_bit": 0,
    "layernorm_epsilon": 1e-5,
    "seq_length": MAX_POSITION,
    "eos_token_id": None,
}

REFERENCES: list[Reference] = [
    InternLM2(
        "internlm2",
        {
            **_SIZES,
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            "num_key_value_heads": 2,
            "bias": False,
            "rope_theta": 1e6,
        },
        kv_heads=2,
    ),
    Baichuan("baichuan-7b", {**_BAICHUAN, "architectures": ["BaiChuanForCausalLM"]}),
    Baichuan("baichuan-13b", _BAICHUAN_13B),
    Baichuan("baichuan2-7b", {**_BAICHUAN, **_SECOND}, BAICHUAN2_VOCABULARY),
    Baichuan("baichuan2-13b", {**_BAICHUAN_13B, **_SECOND}, BAICHUAN2_VOCABULARY),
    ChatGLM("chatglm3", _CHATGLM, kv_heads=2),
    ChatGLM(
        "chatglm2-32k",
        {**_CHATGLM, "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16},
        kv_heads=2,
    ),
    ChatGLM("glm-4-9b-chat", {**_CHATGLM, "rope_ratio": 500}, kv_heads=2),
    Exaone(
        "exaone3",
        {
            **_SIZES,
            "model_type": "exaone",
            "architectures": ["ExaoneForCausalLM"],
            "num_layers": LAYERS,
            "num_key_value_heads": 2,
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-5,
        },
        kv_heads=2,
    ),
]
BY_REFERENCE = {reference.name: reference for reference in REFERENCES}
