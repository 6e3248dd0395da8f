"""config.json → ModelConfig: both spellings, transformers' defaults, bad values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families import read_config
from llmforge.errors import SourceError, UnsupportedModelError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    "yarn-attention": {"factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    "yarn-ratio": {"factor": None, "original_max_position_embeddings": 16},
}


def read(tmp_path: Path, values: dict[str, Any]) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return read_config(path)[1]


@pytest.mark.parametrize("name", SCALINGS)
def test_both_spellings_mean_the_same(
    tmp_path: Path, base_config: dict[str, Any], name: str
) -> None:
    kind = name.partition("-")[0]
    old = {**base_config, "rope_theta": 5e5, "rope_scaling": {"type": kind, **SCALINGS[name]}}
    new = {k: v for k, v in base_config.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **SCALINGS[name]}}
    new |= {"dtype": "bfloat16"}
    assert read(tmp_path, old) == read(tmp_path, new)
    assert read(tmp_path, old).rope.theta == 5e5


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "default"])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("length", [0, 50, 1000])
def test_rope_frequencies_are_those_of_transformers(
    tmp_path: Path, base_config: dict[str, Any], name: str, head_dim: int, length: int
) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.partition("-")[0]
    rope = {"rope_type": kind, "rope_theta": 5e5, **SCALINGS[name]}
    values = {**base_config, "head_dim": head_dim, "rope_parameters": rope}
    del values["rope_theta"]
    ours = read(tmp_path, values).rope
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length or None)
    assert ours.frequencies(length) == pytest.approx(frequencies.tolist(), rel=2e-6)
    assert ours.attention_factor == pytest.approx(factor)


def test_plain_rope_frequencies_are_those_of_transformers(
    tmp_path: Path, base_config: dict[str, Any]
) -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = read(tmp_path, base_config).rope
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_pretrained(tmp_path))
    assert ours.frequencies() == pytest.approx(theirs.inv_freq.tolist(), rel=2e-6)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral"}, [4096] * 2),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 2),
        ({"model_type": "mistral", "sliding_window": 7}, [7] * 2),
        ({"model_type": "qwen2", "sliding_window": 7}, [None] * 2),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, [None] * 2),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            [None, 7],
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [7, None],
        ),
        (
            {"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True},
            [None, None],
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, base_config: dict[str, Any], changes: dict[str, Any], windows: list[int | None]
) -> None:
    config = read(tmp_path, {**base_config, "architectures": None, **changes})
    assert list(config.sliding_window) == windows


def test_end_of_sequence_tokens_are_collected(tmp_path: Path, base_config: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 9]}')
    assert read(tmp_path, {**base_config, "eos_token_id": [7, 5, -1]}).eos_token_ids == (7, 5, 2, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read(tmp_path, {**base_config, "eos_token_id": None}).eos_token_ids == ()


def test_partial_rotation_and_null_fields(tmp_path: Path, base_config: dict[str, Any]) -> None:
    config = read(
        tmp_path,
        {
            **base_config,
            "partial_rotary_factor": 0.5,
            "head_dim": None,
            "num_key_value_heads": None,
            "rope_scaling": None,
            "pretraining_tp": 4,
        },
    )
    assert (config.rope.dim, config.head_dim, config.num_kv_heads) == (2, 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": ["GPT9"]}, UnsupportedModelError, "GPT9 is not supported; supported: L"),
        ({"architectures": [], "model_type": "x9"}, UnsupportedModelError, "model type x9"),
        ({"architectures": ["A"], "auto_map": {"b": "c"}}, UnsupportedModelError, "never executes"),
        ({"architectures": None, "model_type": None}, SourceError, "names no architecture"),
        ({"architectures": "Llama"}, SourceError, "architectures must be a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "(gptq)"),
        ({"hidden_act": "mish"}, UnsupportedModelError, "'mish' is not supported; supported: silu"),
        ({"rope_scaling": {"type": "ntk"}}, UnsupportedModelError, "'ntk'"),
        ({"rope_scaling": {"type": "longrope"}}, SourceError, "short_factor is missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 0]}},
            SourceError,
            "short_factor must be a list of 2 positive numbers",
        ),
        ({"rope_scaling": {"type": "linear"}}, SourceError, "rope_scaling.factor is missing"),
        ({"rope_scaling": [1]}, SourceError, "rope_scaling must be an object"),
        (
            {"rope_parameters": {"full_attention": {}}},
            UnsupportedModelError,
            "differ by layer type (full_attention)",
        ),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, SourceError, "positive number"),
        ({"torch_dtype": "int8"}, UnsupportedModelError, "'int8'"),
        ({"hidden_size": "big"}, SourceError, "hidden_size must be a positive whole number"),
        ({"hidden_size": None}, SourceError, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, SourceError, "num_hidden_layers must be a positive"),
        ({"vocab_size": -5}, SourceError, "vocab_size must be a positive whole number, not -5"),
        ({"vocab_size": True}, SourceError, "not True"),
        ({"num_attention_heads": 3}, SourceError, "num_key_value_heads must be a divisor"),
        ({"num_attention_heads": 6}, SourceError, "a multiple of num_attention_heads (6)"),
        ({"head_dim": 5}, SourceError, "even number"),
        ({"partial_rotary_factor": 1.5}, SourceError, "even number"),
        ({"rms_norm_eps": "x"}, SourceError, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, SourceError, "true or false"),
        ({"eos_token_id": "</s>"}, SourceError, "eos_token_id must be a token id"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
            SourceError,
            "a list of 2 names",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["a", "b"]},
            UnsupportedModelError,
            "layer type 'a'",
        ),
    ],
)
def test_bad_config(
    tmp_path: Path,
    base_config: dict[str, Any],
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        read(tmp_path, {**base_config, **changes})
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00", "[" * 100_000])
def test_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match="is not") as caught:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(caught.value)
