"""TensorRT-LLM checkpoints, against the same models in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MAX_POSITION, Case
from safetensors.torch import load_file, save_file
from trtllm_layout import write_trtllm

from llmforge.checkpoint.convert import convert
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]
EVEN = {"vocab_size": 104}


def llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    """As LLaMAConfig.to_dict and its like write them."""
    return {
        "architecture": config["architectures"][0],
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "norm_epsilon": config["rms_norm_eps"],
        "rotary_base": config["rope_parameters"]["rope_theta"],
        "rotary_scaling": config["rope_parameters"],
        "attn_bias": config.get("attention_bias", config["model_type"] == "qwen2"),
        "mlp_bias": config.get("mlp_bias", False),
        "qk_layernorm": config["model_type"] == "qwen3",
        "moe": {"num_experts": 0},
        "residual_mlp": False,
    }


def granite_fields(config: dict[str, Any]) -> dict[str, Any]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        **llama_fields(config),
        "embedding_multiplier": config["embedding_multiplier"],
        "attention_multiplier": config["attention_multiplier"] * head_dim**0.5,
        "residual_multiplier": config["residual_multiplier"],
        "output_multiplier_scale": 1 / config["logits_scaling"],
    }


def phi3_fields(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    fields = {
        **llama_fields(config),
        "hidden_act": "swiglu",
        "rotary_scaling": None,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
    }
    if rope["rope_type"] == "longrope":
        fields |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": config["original_max_position_embeddings"],
            "longrope_scaling_short_factors": rope["short_factor"],
            "longrope_scaling_long_factors": rope["long_factor"],
        }
    return fields


def gemma_fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = {**llama_fields({"hidden_act": "gelu_pytorch_tanh", **config})}
    fields["hidden_act"] = "gelu_pytorch_tanh"
    if config["model_type"] == "gemma2":
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            fields[name] = config[name]
    return fields


def cohere_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **llama_fields({**config, "rms_norm_eps": config["layer_norm_eps"]}),
        "position_embedding_type": "rope_gptj",
        "output_multiplier_scale": config["logit_scale"],
    }


def gpt_fields(variant: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def fields(config: dict[str, Any]) -> dict[str, Any]:
        found = {
            "architecture": "GPTForCausalLM",
            "gpt_variant": variant,
            "position_embedding_type": "learned_absolute",
            "max_position_embeddings": config.get("n_positions", MAX_POSITION),
            "bias": config.get("use_bias", variant != "nemotron"),
            "moe": {"num_experts": 0},
            "norm_epsilon": config.get("layer_norm_epsilon") or config.get("norm_epsilon"),
            "hidden_act": config.get("activation_function"),
        }
        if variant in ("starcoder2", "nemotron"):
            rope = config["rope_parameters"]
            found |= {
                "position_embedding_type": "rope_gpt_neox",
                "rotary_base": rope["rope_theta"],
                "rotary_pct": rope.get("partial_rotary_factor", 1.0),
                "hidden_act": "gelu" if variant == "starcoder2" else "squared-relu",
            }
        if variant == "nemotron":
            found["norm_epsilon"] = config["norm_eps"]
        return found

    return fields


def gptj_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "GPTJForCausalLM",
        "position_embedding_type": "rope_gptj",
        "max_position_embeddings": config["n_positions"],
        "norm_epsilon": config["layer_norm_epsilon"],
        "hidden_act": "gelu",
        "rotary_dim": config["rotary_dim"],
    }


def neox_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "GPTNeoXForCausalLM",
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_pct": config["rope_parameters"]["partial_rotary_factor"],
        "hidden_act": config["hidden_act"],
    }


def falcon_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "FalconForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "norm_epsilon": config["layer_norm_epsilon"],
        "hidden_act": "gelu",
        "bias": config["bias"],
        "parallel_attention": config["parallel_attn"],
        "new_decoder_architecture": config["new_decoder_architecture"],
    }


def phi_fields(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        "architecture": "PhiForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "rotary_base": rope["rope_theta"],
        "rotary_pct": rope["partial_rotary_factor"],
    }


def plain_fields(architecture: str, positions: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def fields(config: dict[str, Any]) -> dict[str, Any]:
        return {
            "architecture": architecture,
            "position_embedding_type": positions,
            "max_position_embeddings": config.get("max_position_embeddings"),
            "hidden_act": config.get("activation_function", "gelu"),
        }

    return fields


CASES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "llama": (llama_fields, {}),
    "llama-tied": (llama_fields, {}),
    "llama-biases": (llama_fields, {}),
    "llama-one-kv-head": (llama_fields, {}),
    "llama-head-dim-80": (llama_fields, {}),
    "llama-llama3": (llama_fields, {}),
    "llama-linear": (llama_fields, {}),
    "mistral": (llama_fields, {}),
    "granite": (granite_fields, {}),
    "qwen2": (llama_fields, {}),
    "qwen2-tied": (llama_fields, {"duplicate_head": False}),
    "qwen3": (llama_fields, {}),
    "phi3": (phi3_fields, {"fused": True}),
    "phi3-longrope": (phi3_fields, {"fused": True}),
    "gemma": (gemma_fields, {}),
    "gemma2": (
        gemma_fields,
        {
            "names": {
                "attention_post_norm": "post_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            }
        },
    ),
    "cohere": (cohere_fields, {}),
    "nemotron": (gpt_fields("nemotron"), {}),
    "starcoder2": (gpt_fields("starcoder2"), {}),
    "starcoder2-no-bias": (gpt_fields("starcoder2"), {}),
    "gpt2": (gpt_fields("gpt2"), {}),
    "gpt-bigcode": (gpt_fields("starcoder"), {}),
    "gptj": (gptj_fields, {}),
    "gpt-neox": (neox_fields, {"names": {"mlp_norm": "post_attention_layernorm"}}),
    "falcon-7b": (falcon_fields, {}),
    "falcon-40b": (falcon_fields, {"names": {"mlp_norm": "mlp_layernorm"}}),
    "falcon-sequential": (falcon_fields, {}),
    "phi": (phi_fields, {}),
    "opt": (plain_fields("OPTForCausalLM", "learned_absolute"), {}),
    "bloom": (plain_fields("BloomForCausalLM", "alibi"), {}),
    "mpt": (plain_fields("MPTForCausalLM", "alibi"), {}),
}
# What is not in TensorRT-LLM's config, or means the same in other numbers.
DIFFERING = {
    "phi3": ("sliding_window",),
    "gemma2": ("sliding_window",),
    "starcoder2": ("sliding_window",),
    "granite": ("attention_scale",),
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(hf: Hf, assert_same: Hf, tmp_path: Path, case: str, tp: int, pp: int) -> None:
    directory, config, state = hf(case)
    fields, how = CASES[case]
    theirs = write_trtllm(tmp_path / "trt", config, state, tp, pp, fields=fields(config), **how)
    assert_same(directory, theirs, *DIFFERING.get(case, ()))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_parallel_embedding(hf: Hf, assert_same: Hf, tmp_path: Path, case: str, dim: int) -> None:
    directory, config, state = hf(case)
    fields, how = CASES[case]
    theirs = write_trtllm(
        tmp_path / "trt",
        config,
        state,
        4,
        fields=fields(config),
        parallel_embedding=dim,
        **how,
    )
    assert_same(directory, theirs)


def test_older_names_of_opt(hf: Hf, assert_same: Hf, tmp_path: Path) -> None:
    directory, config, state = hf("opt")
    outer = {
        "embed": "transformer.embedding.vocab_embedding",
        "positions": "transformer.embedding.position_embedding",
    }
    theirs = write_trtllm(
        tmp_path / "trt", config, state, 2, fields=CASES["opt"][0](config), outer=outer
    )
    assert_same(directory, theirs)


def test_what_it_is_is_told_and_what_is_left_out(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("mistral")
    fields = {**llama_fields(config), "quantization": {"kv_cache_quant_algo": "FP8"}}
    write_trtllm(tmp_path / "trt", config, state, 2, fields=fields)
    for rank in range(2):
        path = tmp_path / f"trt/rank{rank}.safetensors"
        scale = {"transformer.layers.0.attention.kv_cache_scaling_factor": torch.ones(1)}
        save_file({**load_file(path), **scale}, path)
    warnings: list[str] = []
    notices: list[str] = []
    convert(
        tmp_path / "trt",
        tmp_path / "out",
        ConvertSettings(),
        warn=warnings.append,
        notice=notices.append,
    )
    [notice] = notices
    assert notice == "source: TensorRT-LLM checkpoint, MistralForCausalLM, tp_size 2, pp_size 1"
    assert any("KV cache's quantization (FP8) is left out" in warning for warning in warnings)
    assert any("full attention is taken" in warning for warning in warnings)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "T5ForConditionalGeneration"}, "architecture T5For.* is not supported; supp"),
    (
        {"architecture": "GPTForCausalLM", "gpt_variant": "jais"},
        r"GPTForCausalLM \(gpt_variant jais\) of TensorRT-LLM is not supported",
    ),
    ({"quantization": {"quant_algo": "W4A16_AWQ"}}, r"weights are quantized \(W4A16_AWQ\)"),
    (
        {"quantization": {"use_weight_only": True, "weight_only_precision": "int8"}},
        r"weights are quantized \(weight-only int8\)",
    ),
    ({"moe": {"num_experts": 8}}, r"moe\.num_experts = 8 is not supported"),
    ({"residual_mlp": True}, "residual_mlp = True is not supported"),
    ({"qk_layernorm": True}, "qk_layernorm = True is not supported"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not supported"),
    ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, not 0"),
    (
        {"mapping": {"tp_size": 4, "pp_size": 1}},
        r"asks for 4 x 1 ranks \(tp_size x pp_size\), .* \(2\): rank2\.safetensors, rank3",
    ),
    ({"mapping": {"tp_size": 1, "pp_size": 1}}, r"qkv\.weight .* has 48 rows, but .* asks for 96"),
    ({"mapping": {"tp_size": 1, "pp_size": 2}}, r"has 48 rows, but its config asks for 96"),
    ({"mapping": {"tp_size": 2, "auto_parallel": True}}, r"mapping\.auto_parallel = True is not s"),
    ({"mapping": None}, r"has 48 rows, but its config asks for 96"),
    ({"mapping": 2}, "mapping must be an object, not 2"),
    ({"quantization": "int8"}, "quantization must be an object, not 'int8'"),
    ({"num_key_value_heads": 3}, "4 heads and 3 kv heads cannot be shared by tp_size 2"),
    ({"num_hidden_layers": 2}, "unexpected tensors"),
    ({"num_hidden_layers": 4}, r"missing tensors .*transformer\.layers\.3\."),
    ({"intermediate_size": 90}, "wrong shapes"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refused_configs(hf: Hf, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _, config, state = hf(Case("llama", "Llama", EVEN))
    write_trtllm(tmp_path / "trt", config, state, 2, fields={**llama_fields(config), **change})
    with pytest.raises(SourceError, match=message) as caught:
        convert(tmp_path / "trt", tmp_path / "out", ConvertSettings())
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "trt"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"these are missing \(1\): rank1\.safetensors"),
        ("truncated", r"rank1\.safetensors is truncated"),
        ("lacking", r"ranks lack tensors that others have \(1\): .*mlp\.gate\.weight \(rank 1\)"),
        ("another dtype", r"parts of .*mlp\.proj\.weight in .* do not fit together"),
    ],
)
def test_refused_weights(hf: Hf, tmp_path: Path, what: str, message: str) -> None:
    _, config, state = hf("llama")
    write_trtllm(tmp_path / "trt", config, state, 2, fields=llama_fields(config))
    path = tmp_path / "trt/rank1.safetensors"
    tensors = load_file(path)
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "lacking":
        del tensors["transformer.layers.2.mlp.gate.weight"]
        save_file(tensors, path)
    else:
        name = "transformer.layers.2.mlp.proj.weight"
        save_file({**tensors, name: tensors[name].float()}, path)
    with pytest.raises(SourceError, match=message):
        convert(tmp_path / "trt", tmp_path / "out", ConvertSettings())
    assert json.loads((tmp_path / "trt/config.json").read_bytes())
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "trt"}


def test_the_command_line_says_what_it_found(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmforge.cli.errors import guard
    from llmforge.cli.main import cli

    _, config, state = hf("llama")
    trt = write_trtllm(tmp_path / "trt", config, state, 2, fields=llama_fields(config))

    def run(output: str) -> tuple[int, str]:
        capsys.readouterr()
        arguments = ["convert", str(trt), "-o", str(tmp_path / output)]
        status = guard(lambda: cli.main(arguments, "llmforge", standalone_mode=False))
        return status, capsys.readouterr().err

    status, said = run("out")
    assert status == 0
    assert "source: TensorRT-LLM checkpoint, LlamaForCausalLM, tp_size 2, pp_size 1" in said
    (trt / "rank1.safetensors").unlink()
    status, said = run("again")
    assert status == 1
    assert said.splitlines()[0].endswith("these are missing (1): rank1.safetensors")
    assert len(said.splitlines()) == 1
