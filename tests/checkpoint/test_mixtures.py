"""Experts become stacks, whatever the source keeps them in; quantized ones become plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.families import plan_for, read_config
from llmforge.checkpoint.params import parameters
from llmforge.checkpoint.quantized import fp8_blocks, mxfp4
from llmforge.checkpoint.store import Checkpoint
from llmforge.errors import SourceError, UnsupportedModelError
from llmforge.safetensors_io import TensorInfo
from llmforge.settings import ConvertSettings

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 41,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "hidden_size": 160,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 136,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


def saved(directory: Path, name: str, **changes: Any) -> Any:
    """A tiny random model of transformers, saved by it in bfloat16."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer)
    model = model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # as the released files have it
            module.e_score_correction_bias = module.e_score_correction_bias.float() + 1e-4
    model.save_pretrained(directory)
    return model


def converted(directory: Path, output: Path, **settings: Any) -> Checkpoint:
    warnings: list[str] = []
    convert(directory, output, ConvertSettings(**settings), warn=warnings.append)
    assert [w for w in warnings if "tokenizer" not in w] == []
    return Checkpoint.open(output)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_equal(array: Any, tensor: torch.Tensor) -> None:
    assert np.array_equal(array.view(np.int16), tensor.contiguous().view(torch.int16).numpy())


def test_experts_by_number_and_stacked_give_the_same(tmp_path: Path) -> None:
    model = saved(tmp_path / "hf", "Mixtral", num_local_experts=3)
    names = load_file(tmp_path / "hf/model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names
    by_number = converted(tmp_path / "hf", tmp_path / "by-number", shard_size_gb=0.001)
    state = model.state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "hf/model.safetensors")
    stacked = converted(tmp_path / "hf", tmp_path / "stacked")
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.mlp.", f"layers.{layer}.moe."
        for checkpoint in (by_number, stacked):
            for name in ("gate_up", "down"):
                array = checkpoint.read(f"{ours}experts.{name}.weight")
                assert_equal(array, state[f"{theirs}experts.{name}_proj"])
            assert_equal(checkpoint.read(f"{ours}router.weight"), state[f"{theirs}gate.weight"])


def test_one_expert_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """A plan's groups of stacks are an expert's, however large the stack."""
    path = tmp_path / "config.json"
    values = {**COMMON, "num_local_experts": 128, "num_experts_per_tok": 4, "head_dim": 8}
    path.write_text(json.dumps({**values, "architectures": ["GptOssForCausalLM"]}))
    family, config = read_config(path)
    tensors: dict[str, dict[str, tuple[int, ...]]] = {
        "blocks": {"gate_up": (128, 96, 1, 16), "down": (128, 32, 1, 24)},
        "scales": {"gate_up": (128, 96, 1), "down": (128, 32, 1)},
    }
    infos = {
        f"model.layers.{i}.mlp.experts.{name}_proj_{kind}": TensorInfo(
            "uint8", shape, 0, int(np.prod(shape))
        )
        for i in range(2)
        for kind, shapes in tensors.items()
        for name, shape in shapes.items()
    }
    with pytest.raises(SourceError, match="missing tensors") as caught:
        plan_for(family, config, infos, "x")
    assert "experts.gate_up_proj " not in str(caught.value), "the other form is not asked for"
    plain = {
        f"model.layers.{i}.{name}": TensorInfo("bfloat16", shape, 0, 2 * int(np.prod(shape)))
        for i in range(2)
        for name, shape in {
            "mlp.experts.gate_up_proj_bias": (128, 96),
            "mlp.experts.down_proj_bias": (128, 32),
            "mlp.router.weight": (128, 32),
            "mlp.router.bias": (128,),
            "input_layernorm.weight": (32,),
            "post_attention_layernorm.weight": (32,),
            "self_attn.sinks": (4,),
            **{f"self_attn.{x}_proj.weight": (32 if x in "qo" else 16, 32) for x in "qkvo"},
            **{f"self_attn.{x}_proj.bias": (32 if x in "qo" else 16,) for x in "qkvo"},
        }.items()
    }
    ends = {
        name: TensorInfo("bfloat16", shape, 0, 2 * int(np.prod(shape)))
        for name, shape in {
            "model.embed_tokens.weight": (41, 32),
            "lm_head.weight": (41, 32),
            "model.norm.weight": (32,),
        }.items()
    }
    plan = plan_for(family, config, {**infos, **plain, **ends}, "x")
    stacks = [g for g in plan.groups if g.part]
    assert len(stacks) == 2 * 3 * 128
    whole = sum(t.nbytes for t in infos.values()) + sum(
        t.nbytes for n, t in plain.items() if n.endswith("gate_up_proj_bias")
    )
    assert sum(g.nbytes for g in stacks) == whole
    assert max(g.nbytes for g in stacks) == 96 * 16 + 96


def test_dbrx_experts_are_taken_apart(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "hf",
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
    )
    checkpoint = converted(tmp_path / "hf", tmp_path / "out")
    state = model.state_dict()
    w1, v1, w2 = (
        state[f"transformer.blocks.1.ffn.experts.mlp.{x}"].view(3, 24, 32)
        for x in ("w1", "v1", "w2")
    )
    gate_up = checkpoint.read("layers.1.moe.experts.gate_up.weight")
    assert_equal(gate_up, torch.cat((w1, v1), dim=1))
    assert_equal(checkpoint.read("layers.1.moe.experts.down.weight"), w2.transpose(1, 2))


def test_the_correction_keeps_its_precision(tmp_path: Path) -> None:
    model = saved(tmp_path / "hf", "DeepseekV3", **DEEPSEEK)
    checkpoint = converted(tmp_path / "hf", tmp_path / "out")
    name = "layers.1.moe.router.correction"
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.tensors[name].dtype == "float32"
    theirs = model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(checkpoint.read(name), theirs.numpy())
    assert not torch.equal(theirs, theirs.bfloat16().float())


def test_the_layer_that_predicts_more_tokens_is_ignored_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "DeepseekV3", **DEEPSEEK)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(160, 320)

    edit(tmp_path / "hf", add)
    manifest = convert(tmp_path / "hf", tmp_path / "out", ConvertSettings())
    ignored = manifest.data["ignored_source_tensors"]
    assert ignored["multi-token prediction is not used"]["count"] > 10
    edit(tmp_path / "hf", lambda t: t.update({"model.layers.3.x": torch.zeros(1)}))
    with pytest.raises(SourceError, match=r"unexpected tensors \(1\): model\.layers\.3\.x"):
        convert(tmp_path / "hf", tmp_path / "other", ConvertSettings())


# -- quantized sources -----------------------------------------------------------------------------


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "DeepseekV3", **DEEPSEEK)
    generator = torch.Generator().manual_seed(1)
    expected: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if weight.ndim != 2 or not name.endswith("_proj.weight"):
                continue
            rows, columns = weight.shape
            blocks = (-(-rows // 128), -(-columns // 128))
            scales = torch.rand(blocks, generator=generator) + 0.1
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            every = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
            expected[name] = (tensors[name].float() * every).bfloat16()

    plain = converted(tmp_path / "hf", tmp_path / "plain")
    edit(tmp_path / "hf", quantize)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    edit_config(tmp_path / "hf", quantization_config=quantization)
    checkpoint = converted(tmp_path / "hf", tmp_path / "out")
    assert checkpoint.config == plain.config, "of the dtype that is not quantized"
    prefix = "model.layers.1.mlp.experts."
    gate_up = [expected[f"{prefix}{e}.{x}_proj.weight"] for e in range(4) for x in ("gate", "up")]
    stack = torch.cat(gate_up).view(4, 2 * 136, 160)
    assert_equal(checkpoint.read("layers.1.moe.experts.gate_up.weight"), stack)
    down = torch.stack([expected[f"{prefix}{e}.down_proj.weight"] for e in range(4)])
    assert_equal(checkpoint.read("layers.1.moe.experts.down.weight"), down)
    assert_equal(
        checkpoint.read("layers.0.mlp.gate.weight"),
        expected["model.layers.0.mlp.gate_proj.weight"],
    )
    queries = expected["model.layers.0.self_attn.q_b_proj.weight"].view(4, 12, 24)
    assert_equal(checkpoint.read("layers.0.attention.q.weight"), queries[:, :8].reshape(32, 24))
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    edit(tmp_path / "hf", lambda tensors: tensors.pop(name))
    with pytest.raises(SourceError, match=r"unsupported dtypes \(1\): .*2\.up_proj\.weight"):
        convert(tmp_path / "hf", tmp_path / "other", ConvertSettings())


def test_blocks_at_the_edge_are_cut_off() -> None:
    weight = np.ones((130, 257), ml_dtypes.float8_e4m3fn)
    scales = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = fp8_blocks(weight, scales)
    assert result.shape == (130, 257) and result.dtype == np.float32
    assert (result[127, 127], result[127, 128], result[129, 256]) == (0, 1, 5)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(256, size=(2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, size=(2, 6, 3), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    ours = mxfp4(blocks, scales)
    assert ours.shape == (2, 6, 96)
    # It gives [experts, in, out], which is how it multiplies.
    assert np.array_equal(ours, theirs.transpose(1, 2).float().numpy())


def test_gpt_oss_from_mxfp4(tmp_path: Path) -> None:
    """The packed source gives what the plain source of its values gives."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    saved(tmp_path / "hf", "GptOss", **{**sizes, "hidden_size": 64, "intermediate_size": 32})
    rng = np.random.default_rng(0)
    packed: dict[str, torch.Tensor] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, size_in, size_out = tensors[name].shape
            blocks = rng.integers(256, size=(experts, size_out, size_in // 32, 16), dtype=np.uint8)
            scales = rng.integers(120, 130, size=blocks.shape[:3], dtype=np.uint8)
            values = torch.from_numpy(mxfp4(blocks, scales)).transpose(1, 2)
            tensors[name] = values.bfloat16()
            packed[f"{name}_blocks"] = torch.from_numpy(blocks)
            packed[f"{name}_scales"] = torch.from_numpy(scales)

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            del tensors[name]
        tensors.update(packed)

    edit(tmp_path / "hf", pack)
    plain = converted(tmp_path / "hf", tmp_path / "plain")
    edit(tmp_path / "hf", replace)
    edit_config(tmp_path / "hf", quantization_config={"quant_method": "mxfp4"})
    unpacked = converted(tmp_path / "hf", tmp_path / "out")
    assert unpacked.config == plain.config
    for name in parameters(plain.config):
        assert np.array_equal(unpacked.read(name), plain.read(name)), name


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8"},
        {"quant_method": "gptq"},
        {"quant_method": "mxfp4"},
    ],
    ids=str,
)
def test_other_quantizations_are_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    values = {
        **COMMON,
        "architectures": ["MixtralForCausalLM"],
        "quantization_config": quantization,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=quantization["quant_method"]):
        read_config(tmp_path / "config.json")


# -- errors ----------------------------------------------------------------------------------------


def test_missing_and_left_over_experts_are_told_in_one_short_message(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "Mixtral", num_local_experts=3)
    edit_config(tmp_path / "hf", num_local_experts=200)
    with pytest.raises(SourceError) as caught:
        convert(tmp_path / "hf", tmp_path / "out", ConvertSettings())
    message = str(caught.value)
    assert f"missing tensors ({2 * 197 * 3})" in message and "and 1172 more" in message
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in message
    assert "\n" not in message and len(message) < 2500
    edit_config(tmp_path / "hf", num_local_experts=2)
    with pytest.raises(SourceError, match=r"unexpected tensors \(6\): .*experts\.2\.w1\.weight"):
        convert(tmp_path / "hf", tmp_path / "out", ConvertSettings())


def test_expert_tensors_of_wrong_shapes_are_told(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "Mixtral", num_local_experts=3)
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    edit(tmp_path / "hf", lambda tensors: tensors.update({name: torch.zeros(32, 47)}))
    with pytest.raises(SourceError, match=r"w3\.weight \(is \[32, 47\], must be \[48, 32\]\)"):
        convert(tmp_path / "hf", tmp_path / "out", ConvertSettings())
    saved(
        tmp_path / "dbrx",
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=1,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
    )
    name = "transformer.blocks.0.ffn.experts.mlp.w2"
    edit(tmp_path / "dbrx", lambda tensors: tensors.update({name: torch.zeros(71, 32)}))
    with pytest.raises(SourceError, match=r"w2 \(is \[71, 32\], which is no stack of experts\)"):
        convert(tmp_path / "dbrx", tmp_path / "out", ConvertSettings())
