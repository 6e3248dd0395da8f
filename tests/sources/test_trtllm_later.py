"""TensorRT-LLM checkpoints of families whose code is not in transformers, and of mixtures of
experts, against the same models in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MAX_POSITION, Case
from trtllm_layout import write_trtllm

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.store import Checkpoint
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]


def internlm2_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "InternLM2ForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "silu",
        "norm_epsilon": config["rms_norm_eps"],
        "rotary_base": config["rope_theta"],
        "rotary_scaling": None,
        "attn_bias": config["bias"],
    }


def baichuan_fields(config: dict[str, Any]) -> dict[str, Any]:
    rope = "max_position_embeddings" in config
    return {
        "architecture": "BaichuanForCausalLM",
        "position_embedding_type": "rope_gpt_neox" if rope else "alibi",
        "max_position_embeddings": MAX_POSITION,
        "hidden_act": "silu",
        "norm_epsilon": config["rms_norm_eps"],
    }


def chatglm_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": config["architectures"][0],
        "chatglm_version": "chatglm3",
        "position_embedding_type": "rope_gptj",
        "max_position_embeddings": config["seq_length"],
        "hidden_act": "swiglu",
        "norm_epsilon": config["layernorm_epsilon"],
        "rotary_pct": 0.5,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "rmsnorm": 1.0,
    }


def exaone_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "ExaoneForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "silu",
        "norm_epsilon": config["layer_norm_epsilon"],
        "rotary_base": 10000.0,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    }


def mixture_fields(config: dict[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    return {
        "architecture": config["architectures"][0],
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "swiglu",
        "norm_epsilon": config["rms_norm_eps"],
        "rotary_base": config["rope_parameters"]["rope_theta"],
        "attn_bias": kind == "qwen2_moe",
        "qwen_type": kind,
        "moe_intermediate_size": config.get("moe_intermediate_size", 0),
        "moe_shared_expert_intermediate_size": config.get("shared_expert_intermediate_size", 0),
        "moe": {
            "num_experts": config.get("num_local_experts") or config["num_experts"],
            "top_k": config["num_experts_per_tok"],
            "normalization_mode": int(kind == "mixtral" or config["norm_topk_prob"]),
            "sparse_mixer_epsilon": 0.01,
            "tp_mode": 0,
        },
    }


DENSE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "internlm2": (internlm2_fields, {}),
    "baichuan-7b": (baichuan_fields, {}),
    "baichuan-13b": (baichuan_fields, {}),
    "chatglm3": (chatglm_fields, {"fused": True}),
    "exaone3": (exaone_fields, {}),
}
# TensorRT-LLM's Qwen has experts in every layer.
QWEN2_MOE = Case(
    "qwen2-moe-everywhere",
    "Qwen2Moe",
    {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
    },
)
MIXTURES: dict[str, str | Case] = {
    "mixtral": "mixtral",
    "qwen2-moe": QWEN2_MOE,
    "qwen3-moe": "qwen3-moe",
    "qwen3-moe-plain": "qwen3-moe-plain",
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("case", DENSE)
def test_round_trip(hf: Hf, assert_same: Hf, tmp_path: Path, case: str, tp: int, pp: int) -> None:
    directory, config, state = hf(case)
    fields, how = DENSE[case]
    theirs = write_trtllm(tmp_path / "trt", config, state, tp, pp, fields=fields(config), **how)
    assert assert_same(directory, theirs).config.max_position == MAX_POSITION


@pytest.mark.parametrize("case", ["baichuan2-7b", "baichuan2-13b"])
def test_the_normalised_head_of_baichuan_2(
    hf: Hf, assert_same: Hf, tmp_path: Path, case: str
) -> None:
    """It is not normalised again: rows in 16 bits no longer have the length one."""
    directory, config, state = hf(case)
    rows = state["lm_head.weight"].float().numpy()
    head = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).bfloat16()
    theirs = write_trtllm(
        tmp_path / "trt",
        config,
        {**state, "lm_head.weight": head},
        2,
        2,
        fields=baichuan_fields(config),
    )
    assert_same(directory, theirs)


@pytest.mark.parametrize(("tp", "pp", "groups"), [(1, 2, 1), (2, 2, 1), (2, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures(
    hf: Hf, assert_same: Hf, tmp_path: Path, case: str, tp: int, pp: int, groups: int
) -> None:
    directory, config, state = hf(MIXTURES[case])
    theirs = write_trtllm(
        tmp_path / "trt",
        config,
        state,
        tp,
        pp,
        fields=mixture_fields(config),
        expert_groups=groups,
    )
    assert_same(directory, theirs)


@pytest.mark.parametrize(
    "mapping", [{}, {"moe_tp_size": -1, "moe_ep_size": -1}, {"moe_tp_size": 2}, {"moe_ep_size": 1}]
)
def test_fields_of_early_releases(
    hf: Hf, assert_same: Hf, tmp_path: Path, mapping: dict[str, int]
) -> None:
    directory, config, state = hf("mixtral")
    fields = mixture_fields(config)
    early = {f"moe_{name}": value for name, value in fields.pop("moe").items()}
    fields |= {**early, "moe_tp_mode": 2, "mapping": {"tp_size": 2, "pp_size": 1, **mapping}}
    assert_same(directory, write_trtllm(tmp_path / "trt", config, state, 2, fields=fields))


@pytest.mark.parametrize("mode", [0, 1])
def test_shares_are_normalised_as_the_checkpoint_says(hf: Hf, tmp_path: Path, mode: int) -> None:
    _, config, state = hf("qwen3-moe")
    fields = mixture_fields(config)
    fields["moe"] = {**fields["moe"], "normalization_mode": mode}
    theirs = write_trtllm(tmp_path / "trt", config, state, fields=fields)
    convert(theirs, tmp_path / "out", ConvertSettings())
    moe = Checkpoint.open(tmp_path / "out").config.moe
    assert moe is not None and moe.normalize == bool(mode)


MOE = {"num_experts": 6, "top_k": 2, "normalization_mode": 1}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("chatglm3", {"chatglm_version": "glm4"}, "chatglm_version = 'glm4' is not supported; s"),
        ("chatglm3", {"rotary_base": 5e6}, "rotary_base = 5000000.0 is not supported"),
        ("chatglm3", {"rotary_scaling": {"type": "linear", "factor": 2}}, "rotary_scaling = .* n"),
        ("chatglm3", {"add_bias_linear": True}, "add_bias_linear = True is not supported"),
        ("chatglm3", {"position_embedding_type": "chatglm"}, "'chatglm' is not supported"),
        ("mixtral", {"moe": {**MOE, "normalization_mode": 2}}, "moe.normalization_mode = 2 is not"),
        ("mixtral", {"moe": {**MOE, "tp_mode": 1}}, "moe.tp_mode = 1 is not supported"),
        ("mixtral", {"moe": {"num_experts": 0}}, "moe.num_experts must be a whole number >= 2"),
        ("mixtral", {"moe": {**MOE, "num_experts": 8}}, r"fc\.weight .* a stack of 8 experts in 1"),
        ("mixtral", {"residual_mlp": True}, "residual_mlp = True is not supported"),
        (
            "mixtral",
            {"mapping": {"tp_size": 2, "moe_tp_size": 2, "moe_ep_size": 2}},
            r"moe_ep_size must be tp_size \(2\), not 2 x 2",
        ),
    ],
)
def test_refusals(hf: Hf, tmp_path: Path, case: str, change: dict[str, Any], message: str) -> None:
    _, config, state = hf(case)
    fields, how = DENSE.get(case, (mixture_fields, {}))
    theirs = write_trtllm(
        tmp_path / "trt", config, state, 2, fields={**fields(config), **change}, **how
    )
    with pytest.raises(SourceError, match=message) as caught:
        convert(theirs, tmp_path / "out", ConvertSettings())
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "trt"}


def test_the_router_in_float32_does_not_make_the_model_so(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("mixtral")
    theirs = write_trtllm(tmp_path / "trt", config, state, fields=mixture_fields(config))
    assert state["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16
    convert(theirs, tmp_path / "out", ConvertSettings())
    assert Checkpoint.open(tmp_path / "out").config.dtype == "bfloat16"
