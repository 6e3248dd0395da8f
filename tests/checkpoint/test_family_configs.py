"""Every family's config: transformers' defaults, its tensors, and the variants that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families import FAMILIES, Family, plan_for, read_config
from llmforge.errors import SourceError, UnsupportedModelError
from llmforge.safetensors_io import TensorInfo

REQUIRED = {
    "hidden_size": 4096,
    "intermediate_size": 24,
    "num_hidden_layers": 30,
    "num_attention_heads": 64,
    "vocab_size": 33,
}
# Tensors that transformers saves under another name than it has them in memory.
SAVED_AS = {("gpt_neox", "lm_head.weight"): "embed_out.weight"}
# Where transformers' config has no default of the number of experts a token, or another name.
MOST_CHOSEN = {"deepseek_v2": 6, "dbrx": 1}
BY_NAME = {family.name: family for family in FAMILIES}
# The rest has its code beside the weights; tests/parity/references.py has its definitions.
IN_TRANSFORMERS = [f for f in FAMILIES if f.model_types[0] in transformers.CONFIG_MAPPING]
by_name = pytest.mark.parametrize("family", IN_TRANSFORMERS, ids=lambda family: family.name)


def read(directory: Path, values: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(values))
    return read_config(directory / "config.json")[1]


def spelled(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    return {family.aliases.get(name, name): value for name, value in values.items()}


@by_name
def test_absent_fields_have_the_defaults_of_transformers(tmp_path: Path, family: Family) -> None:
    required = spelled(family, REQUIRED)
    ours = read(tmp_path, {"architectures": [family.architectures[0]], **required})
    theirs = transformers.AutoConfig.for_model(family.model_types[0], **required)

    def default(name: str) -> Any:
        return getattr(theirs, family.aliases.get(name, name), None)

    assert ours.head_dim == (default("qk_head_dim") or default("head_dim") or 64)
    assert ours.max_position == (default("max_position_embeddings") or 2048)
    assert ours.norm_eps == (default("norm_eps") or 1e-5)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (
        [] if eos is None else eos if isinstance(eos, list) else [eos]
    )
    rope = getattr(theirs, "rope_parameters", None)
    if ours.window_rope is not None:
        assert ours.window_rope.theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if ours.rope is not None and rope is not None:
        assert ours.rope.theta == rope["rope_theta"]
        rotated = ours.latent.rope_dim if ours.latent else ours.head_dim
        assert ours.rope.dim == int(rotated * rope.get("partial_rotary_factor", 1.0))
        assert ours.rope.scaling == rope["rope_type"]
    if ours.moe is not None:
        assert ours.moe.normalize == getattr(theirs, "norm_topk_prob", True)
        assert ours.moe.scale == (default("routed_scaling_factor") or 1.0)
        assert ours.moe.groups == (default("n_group") or 1)
        assert ours.moe.kept_groups == (default("topk_group") or 1)
        assert ours.moe.limit == default("swiglu_limit")
        assert ours.moe.top_k == (default("num_experts_per_tok") or MOST_CHOSEN[family.name])
    # Kv heads, biases, norms, tied heads and sizes show in the tensors.
    theirs.pad_token_id = None  # beyond this vocabulary
    if family.name == "dbrx":
        theirs.attn_config.rope_theta = 1e4  # which transformers reads and has no default of
    if getattr(theirs, "num_key_value_heads", 0) is None:
        theirs.num_key_value_heads = 64
    with torch.device("meta"):
        model = getattr(transformers, family.architectures[0])(theirs)
    tensors = {
        SAVED_AS.get((family.name, name), name): TensorInfo(
            "float32", tuple(tensor.shape), 0, 4 * tensor.numel()
        )
        for name, tensor in model.state_dict().items()
    }
    plan_for(family, ours, tensors, "transformers' model")


REFUSED = [
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma3", {"use_bidirectional_attention": True}),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt_bigcode", {"add_cross_attention": True}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("mpt", {"attn_config": {"qk_ln": True}}),
    ("mpt", {"attn_config": {"alibi": False}}),
    ("mpt", {"no_bias": False}),
    ("chatglm", {"rmsnorm": False}),
    ("chatglm", {"post_layer_norm": False}),
    ("chatglm", {"add_bias_linear": True}),
    ("chatglm", {"quantization_bit": 4}),
    ("deepseek_v2", {"norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "noaux_tc"}),
    ("deepseek_v2", {"moe_layer_freq": 2}),
    ("deepseek_v3", {"topk_method": "greedy"}),
    ("deepseek_v3", {"scoring_func": "softmax"}),
    ("deepseek_v3", {"attention_bias": True}),
    ("deepseek_v3", {"rope_interleave": False}),
    ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2}}),
]


@pytest.mark.parametrize(("name", "changes"), REFUSED, ids=str)
def test_variants_that_are_not_supported_are_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    family = BY_NAME[name]
    values = {"architectures": [family.architectures[0]], **spelled(family, REQUIRED)}
    read(tmp_path, values)
    with pytest.raises(UnsupportedModelError, match="is not supported; supported: ") as caught:
        read(tmp_path, {**values, **changes})
    field, value = list(changes.items())[-1]
    assert (next(iter(value)) if isinstance(value, dict) else field) in str(caught.value)


def test_a_rope_ratio_is_read_as_the_model_that_has_it_does(tmp_path: Path) -> None:
    family = BY_NAME["chatglm"]
    values = {"architectures": [family.architectures[0]], **spelled(family, REQUIRED)}
    values |= {"rope_ratio": 50, "padded_vocab_size": 65024}
    with pytest.raises(UnsupportedModelError, match='set "_name_or_path" in it to "chatglm2" or'):
        read(tmp_path, values)
    second = read(tmp_path, {**values, "_name_or_path": "THUDM/chatglm2-6b-32k"}).rope
    third = read(tmp_path, {**values, "_name_or_path": "THUDM/chatglm3-6b-32k"}).rope
    fourth = read(tmp_path, {**values, "padded_vocab_size": 151552}).rope
    assert second is not None and (second.theta, second.scaling, second.factor) == (
        1e4,
        "linear",
        50,
    )
    assert (
        third == fourth and third is not None and (third.theta, third.scaling) == (5e5, "default")
    )


BAD = [
    ("mixtral", {"num_experts_per_tok": 9}, "must be at most the number of experts .8., not 9"),
    ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layer numbers"),
    ("deepseek_v3", {"n_group": 7}, "n_group must be a divisor of the number of experts .256."),
    ("deepseek_v3", {"topk_group": 9}, "topk_group must be at most 8 and enough for 8 experts"),
    ("deepseek_v3", {"n_group": 64, "topk_group": 1}, "at most 64 and enough for 8 experts"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=str)
def test_routers_that_cannot_be_are_told(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    values = {"architectures": [BY_NAME[name].architectures[0]], **REQUIRED, **changes}
    with pytest.raises(SourceError, match=message):
        read(tmp_path, values)


def test_dense_layers_of_mixtures(tmp_path: Path) -> None:
    values = {**REQUIRED, "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 6}
    moe = read(tmp_path, {**values, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None and moe.dense_layers == (0, 2, 3, 4)
    values = {**values, "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 2}
    config = read(tmp_path, values)
    assert [config.layer_moe(i) is None for i in range(6)] == [True, True, *[False] * 4]


def test_deepseek_scales_scores_where_positions_are_stretched(tmp_path: Path) -> None:
    values = {**REQUIRED, "architectures": ["DeepseekV3ForCausalLM"]}
    assert read(tmp_path, values).attention_scale == 192**-0.5
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = read(tmp_path, {**values, "rope_scaling": yarn})
    # The released V3: 0.1 ln 40 + 1, for q and for k; cos and sin as they are.
    assert config.attention_scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert config.rope is not None and config.rope.attention_factor == 1.0


def test_two_ropes_as_transformers_4_spells_them(tmp_path: Path) -> None:
    values = {
        **REQUIRED,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
        "num_hidden_layers": 6,
    }
    config = read(tmp_path, values)
    assert config.rope is not None and config.window_rope is not None
    assert (config.rope.theta, config.rope.factor) == (5e5, 8.0)
    assert (config.window_rope.theta, config.window_rope.scaling) == (2e4, "default")
    assert [window is None for window in config.sliding_window] == [False, False, True] * 2
    assert config.layer_rope(1) == config.window_rope
    assert config.layer_rope(2) == config.rope


def test_the_text_of_a_model_with_vision(tmp_path: Path) -> None:
    """As the released files have it: what is Gemma's default is left out."""
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152},
    }
    config = read(tmp_path, values)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (2560, 34, 262208)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.eos_token_ids == (1, 106) and config.tied_embeddings
    assert config.sliding_window[:7] == (1024,) * 5 + (None, 1024)
    assert config.rope is not None and config.rope.factor == 8.0


def test_layers_without_windows_have_no_positions_beside_those_with(tmp_path: Path) -> None:
    values = {
        **REQUIRED,
        "architectures": ["Exaone4ForCausalLM"],
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window": 9,
        "sliding_window_pattern": "LLLG",
    }
    config = read(tmp_path, values)
    assert config.sliding_window == (9, 9, 9, None)
    assert [config.layer_rope(layer) is None for layer in range(4)] == [False] * 3 + [True]
    everywhere = read(tmp_path, {**values, "sliding_window": None})
    assert everywhere.sliding_window == (None,) * 4
    assert everywhere.layer_rope(3) == everywhere.rope


def test_configs_survive_their_manifests(tmp_path: Path) -> None:
    for family in FAMILIES:
        values = {"architectures": [family.architectures[0]], **spelled(family, REQUIRED)}
        config = read(tmp_path, values)
        plain = json.loads(json.dumps(config.to_dict()))
        assert ModelConfig.from_dict(plain) == config
