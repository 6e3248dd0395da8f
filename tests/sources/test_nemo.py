"""NeMo archives and directories, against the same models in the Hugging Face layout."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nemo_layout import NemoWriter, as_yaml, below, nemo1_config, pack
from parts import model_parts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.sources.blocks import Chunk, from_chunks
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]

# What NeMo's config says of each case, besides what nemo1_config gives.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "llama-biases": {"bias": True, "bias_activation_fusion": True},
    "llama-mha": {"num_query_groups": None},
    "llama-head-dim-80": {"kv_channels": 80},
    "llama-linear": {"seq_len_interpolation_factor": 4},
    "llama-llama3": {"scale_positional_embedding": True, "old_context_len": 16},
    "mistral-window": {"window_size": [6, 0]},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "nemotron": {
        "normalization": "layernorm1p",
        "activation": "squared-relu",
        "rotary_percentage": 0.5,
        "layernorm_epsilon": 1e-5,
    },
    "nemotron-biases": {
        "normalization": "layernorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "squared-relu",
        "rotary_percentage": 0.5,
        "layernorm_epsilon": 1e-5,
        "bias": True,
    },
    "starcoder2": {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "layernorm_epsilon": 1e-5,
        "bias": True,
        "window_size": [6, 0],
    },
    "gemma": {
        "layernorm_zero_centered_gamma": True,
        "activation": "fast-geglu",
        "openai_gelu": True,
        "apply_embedding_scaling": True,
    },
    "gpt2": {
        "normalization": "layernorm",
        "activation": "gelu",
        "layernorm_epsilon": 1e-5,
        "bias": True,
        "position_embedding_type": "learned_absolute",
        "num_query_groups": None,
        "kv_channels": None,
        "ffn_hidden_size": "${multiply:4, ${.hidden_size}}",
    },
}
FORMS = {
    "one file": lambda w: w.ranks(1, 1),
    "torch_dist, cut": lambda w: below("model_weights", w.torch_dist(2)),
    "torch_dist, not stacked": lambda w: below(
        "model_weights", w.torch_dist(2, stacked=False, singleton=True)
    ),
    "zarr, cut": lambda w: below("model_weights", w.zarr(2)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_forms(hf: Hf, assert_same: Hf, tmp_path: Path, case: str, form: str) -> None:
    directory, config, state = hf(case)
    parts = model_parts(config, state, norms_whole=False)
    files = FORMS[form](NemoWriter(parts))
    files["model_config.yaml"] = as_yaml(nemo1_config(parts, **CASES[case]))
    assert_same(directory, pack(tmp_path / "nemo", files, "directory"))


@pytest.mark.parametrize(("tp", "pp"), [(1, 3), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("case", ["llama-mha", "llama-tied", "nemotron-biases", "gpt2"])
@pytest.mark.parametrize("names", ["mcore", "legacy", "local"])
def test_ranks(
    hf: Hf, assert_same: Hf, tmp_path: Path, case: str, names: str, tp: int, pp: int
) -> None:
    directory, config, state = hf(case)
    parts = model_parts(config, state, norms_whole=False)
    if parts.kv_heads % tp:
        pytest.skip("Megatron gives each rank whole kv heads")
    files = NemoWriter(parts, names, padded_to=4).ranks(tp, pp)
    fields = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "override_vocab_size": 101,
        "make_vocab_size_divisible_by": 4 // tp,
    }
    files["model_config.yaml"] = as_yaml(nemo1_config(parts, **{**CASES[case], **fields}))
    assert_same(directory, pack(tmp_path / "nemo", files, "directory"))


def test_gate_and_up_apart(hf: Hf, assert_same: Hf, tmp_path: Path) -> None:
    """NeMo's own modules have two products for "swiglu"."""
    directory, config, state = hf("llama-biases")
    parts = model_parts(config, state)
    files = NemoWriter(parts, "legacy", apart=True, padded_to=2).ranks(2, 1)
    fields = {"activation": "swiglu", "bias": True, "tensor_model_parallel_size": 2}
    files["model_config.yaml"] = as_yaml(nemo1_config(parts, override_vocab_size=101, **fields))
    assert_same(directory, pack(tmp_path / "nemo", files, "directory"))


@pytest.mark.parametrize("container", ["directory", "tar", "gz"])
@pytest.mark.parametrize("prefix", ["./", "", "llama/"])
@pytest.mark.parametrize("form", ["one file", "torch_dist, cut", "zarr, cut"])
def test_containers(
    hf: Hf, assert_same: Hf, tmp_path: Path, form: str, container: str, prefix: str
) -> None:
    directory, config, state = hf("llama")
    parts = model_parts(config, state)
    files = FORMS[form](NemoWriter(parts))
    files["model_config.yaml"] = as_yaml(nemo1_config(parts))
    assert_same(directory, pack(tmp_path / "model", files, container, prefix))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(hf: Hf, assert_same: Hf, tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    directory, config, state = hf("llama", dtype)
    parts = model_parts(config, state)
    files = FORMS[form](NemoWriter(parts))
    files["model_config.yaml"] = as_yaml(nemo1_config(parts))
    assert_same(directory, pack(tmp_path / "nemo", files, "directory"))


def nemo2_config(parts: Any, name: str, **fields: Any) -> dict[str, Any]:
    """As io_dump writes model.yaml: every field, defaults included."""
    return {
        "_target_": f"nemo.collections.llm.gpt.model.{name}Model",
        "config": {
            "_target_": f"nemo.collections.llm.gpt.model.{name}Config",
            "num_layers": len(parts.layers),
            "hidden_size": parts.outer["embed.weight"].shape[1],
            "ffn_hidden_size": parts.layers[0]["up.weight"].shape[0],
            "num_attention_heads": parts.heads,
            "num_query_groups": parts.kv_heads,
            "kv_channels": parts.head_dim,
            "seq_length": 64,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-6,
            "layernorm_zero_centered_gamma": False,
            "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "bias_activation_fusion": True,
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_base": 10000,
            "share_embeddings_and_output_weights": "head.weight" not in parts.outer,
            "make_vocab_size_divisible_by": 8,
            "vocab_size": None,
            "num_moe_experts": None,
            "multi_latent_attention": False,
            "tensor_model_parallel_size": 2,
            "generation_config": None,
            **fields,
        },
        "tokenizer": {"_target_": "nemo.collections.common.tokenizers.AutoTokenizer"},
    }


NEMO2: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama.Llama", {}),
    "llama-llama3": (
        "llama.Llama31",
        {
            "scale_factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "old_context_len": 16,
        },
    ),
    "qwen2-tied": ("qwen2.Qwen2", {"add_qkv_bias": True, "vocab_size": 101}),
    "nemotron": (
        "nemotron.Nemotron",
        {
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "layernorm_epsilon": 1e-5,
            "activation_func": "nemo.collections.llm.fn.activation.squared_relu",
            "gated_linear_unit": False,
            "rotary_percent": 0.5,
        },
    ),
    "starcoder2": (
        "starcoder2.Starcoder2",
        {
            "normalization": "LayerNorm",
            "layernorm_epsilon": 1e-5,
            "activation_func": {"_target_": "torch._C._nn.gelu"},
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "window_size": [6, 0],
        },
    ),
    "gemma": (
        "gemma.Gemma",
        {
            "layernorm_zero_centered_gamma": True,
            "activation_func": "nemo.collections.llm.fn.activation.openai_gelu",
        },
    ),
}


@pytest.mark.parametrize("case", NEMO2)
def test_nemo_2(hf: Hf, assert_same: Hf, tmp_path: Path, case: str) -> None:
    directory, config, state = hf(case)
    parts = model_parts(config, state, norms_whole=False)
    name, fields = NEMO2[case]
    files = below("weights", NemoWriter(parts, padded_to=16).torch_dist(2))
    files["context/model.yaml"] = as_yaml(nemo2_config(parts, name, **fields))
    files["context/io.json"] = b"{}"
    vocabulary = {f"t{i}": i for i in range(100)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    tokenizer.add_special_tokens(["</s>"])
    files["context/nemo_tokenizer/tokenizer.json"] = tokenizer.to_str().encode()
    files["context/nemo_tokenizer/tokenizer_config.json"] = b'{"eos_token": "</s>"}'
    files["context/generation_config/generation_config.json"] = b'{"eos_token_id": [5, 100]}'
    nemo = pack(tmp_path / "nemo", files, "directory")
    checkpoint = assert_same(directory, nemo)
    assert checkpoint.config.eos_token_ids == (100, 5)
    assert (checkpoint.directory / "tokenizer/tokenizer.json").is_file()


def test_what_it_is_is_told(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("llama")
    parts = model_parts(config, state)
    files = NemoWriter(parts, padded_to=2).ranks(2, 2)
    fields = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    files["model_config.yaml"] = as_yaml(nemo1_config(parts, **fields))
    path = pack(tmp_path / "model", files, "gz")
    notices: list[str] = []
    warnings: list[str] = []
    manifest = convert(
        path,
        tmp_path / "out",
        ConvertSettings(),
        notice=notices.append,
        warn=warnings.append,
    )
    assert notices == ["source: NeMo archive, ranks of tp 2, pp 2"]
    assert any("no tokenizer tells how many of the embedding's 102 rows" in w for w in warnings)
    assert any(f"there is no tokenizer in {path}: the checkpoint" in w for w in warnings)
    assert any("which names meta-llama/Llama: put its tokenizer.json" in w for w in warnings)
    assert manifest.data["config"]["vocab_size"] == 102


@pytest.mark.parametrize("single_file", [False, True])
def test_a_checkpoint_that_torch_saved(
    hf: Hf, assert_same: Hf, tmp_path: Path, single_file: bool
) -> None:
    from torch.distributed import checkpoint as dcp

    directory, config, state = hf("llama")
    parts = model_parts(config, state)
    whole = {
        name.replace("model.", "module.", 1): torch.stack([values[0] for _, values in chunks])
        if "layers" in name
        else chunks[0][1]
        for name, (_, chunks) in NemoWriter(parts).chunked(1, True, False).items()
        if "linear_fc1.weight" not in name
    }
    gate_up = [torch.cat([layer["gate.weight"], layer["up.weight"]]) for layer in parts.layers]
    whole["module.decoder.layers.mlp.linear_fc1.weight"] = torch.stack(gate_up)
    nemo = tmp_path / "nemo"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        writer = dcp.FileSystemWriter(nemo / "weights", single_file_per_rank=single_file)
        dcp.save(whole, storage_writer=writer)
    pack(nemo, {"context/model.yaml": as_yaml(nemo2_config(parts, "llama.Llama"))}, "directory")
    assert_same(directory, nemo)


def fill_from(data: bytes) -> Callable[[int, Any], None]:
    raw = np.frombuffer(data, np.uint8)

    def fill(first: int, out: Any) -> None:
        out[:] = raw[first : first + out.size]

    return fill


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(0, 7))
def test_pieces_are_what_numpy_makes_of_them(data: Any, rows: int, columns: int) -> None:
    """A tensor cut into a grid, joined again, cut again and read in pieces of any size."""
    shape = (rows, columns) if columns else (rows,)
    array = np.arange(rows * max(columns, 1), dtype=np.float32).reshape(shape)
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else [] for n in shape]
    bounds = [list(itertools.pairwise([0, *c, n])) for c, n in zip(cuts, shape, strict=True)]
    chunks = []
    for box in itertools.product(*bounds):
        part = np.ascontiguousarray(array[tuple(slice(a, b) for a, b in box)])
        chunks.append(
            Chunk(tuple(a for a, _ in box), tuple(b - a for a, b in box), fill_from(part.tobytes()))
        )
    piece = from_chunks("float32", shape, data.draw(st.permutations(chunks)))
    assert piece is not None
    assert np.array_equal(piece.read(), array)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    rows_read = piece.rows(start, stop)
    expected = array[start:stop].tobytes()
    first = data.draw(st.integers(0, len(expected)))
    out = np.empty(data.draw(st.integers(0, len(expected) - first)), np.uint8)
    rows_read.fill(first, out)
    assert out.tobytes() == expected[first : first + out.size]
    if len(chunks) > 1:
        assert from_chunks("float32", shape, chunks[1:]) is None
        assert from_chunks("float32", shape, [*chunks, chunks[0]]) is None


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],  # the last row is missing, another there twice
        [((0, 0), (3, 4)), ((3, 0), (1, 4))],  # beyond the end
        [((0, 0), (3, 2)), ((0, 2), (2, 2)), ((1, 2), (1, 2))],
    ],
)
def test_chunks_that_do_not_cover_a_tensor_once(boxes: Any) -> None:
    chunks = [Chunk(offsets, sizes, lambda first, out: None) for offsets, sizes in boxes]
    assert from_chunks("float32", (3, 4), chunks) is None
