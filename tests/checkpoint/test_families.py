"""Models saved by transformers convert, every value bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.families import FAMILIES
from llmforge.checkpoint.params import parameters
from llmforge.checkpoint.store import Checkpoint
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 41,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Our name → theirs, written out again here so that a mistake in families/ shows.
THEIRS = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "final_norm": "model.norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"attention.{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def theirs(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, stem = stem.split(".", 2)
        return f"model.layers.{layer}.{THEIRS[stem]}.{kind}"
    return f"{THEIRS[stem]}.{kind}"


def tiny_model(family: str, **changes: Any) -> Any:
    import transformers

    row = next(row for row in FAMILIES if row.name == family)
    config = transformers.AutoConfig.for_model(row.model_types[0], **{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, row.architectures[0])(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(torch.bfloat16)


def assert_same(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == list(parameters(checkpoint.config))
    for name in checkpoint.tensors:
        expected = state[theirs(name)].contiguous().view(torch.int16).numpy()
        assert np.array_equal(checkpoint.read(name).view(np.int16), expected), name


CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "sharded bin"])
def test_every_tensor_is_converted_bit_for_bit(
    tmp_path: Path, output: Path, family: str, changes: dict[str, Any], layout: str
) -> None:
    model = tiny_model(family, **changes)
    directory = tmp_path / "hf"
    model.save_pretrained(directory, max_shard_size="10KB" if layout == "sharded" else "1GB")
    state = model.state_dict()
    if "bin" in layout:
        for file in directory.glob("*.safetensors"):
            file.unlink()
        save_bin(directory, state, 3 if "sharded" in layout else 1)
    if layout == "sharded":
        assert len(list(directory.glob("*.safetensors"))) > 2
    warnings: list[str] = []
    convert(directory, output, ConvertSettings(), warn=warnings.append)
    checkpoint = Checkpoint.open(output)
    assert_same(checkpoint, state)
    assert checkpoint.config.family == family
    assert checkpoint.config.tied_embeddings == bool(changes.get("tie_word_embeddings"))
    assert [w for w in warnings if "tokenizer" not in w] == []


def save_bin(directory: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map: dict[str, str] = {}
    for index in range(shards):
        part = dict(list(state.items())[index::shards])
        torch.save(part, directory / f"pytorch_model-{index}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{index}.bin")
    text = json.dumps({"weight_map": weight_map})
    (directory / "pytorch_model.bin.index.json").write_text(text)


def test_bin_with_views_shared_storage_and_the_old_format(tmp_path: Path, output: Path) -> None:
    model = tiny_model("llama")
    directory = tmp_path / "hf"
    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    state = dict(model.state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = state[name].t()  # square: the transpose has the same shape
    gate, up = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up"))
    both = torch.cat([state[gate], state[up]])
    state[gate], state[up] = both[:48], both[48:]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for old in (False, True):
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        convert(directory, output, ConvertSettings(overwrite=True))
        assert_same(Checkpoint.open(output), state)


def test_save_of_the_bare_decoder(tmp_path: Path, output: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", output, ConvertSettings())
    assert_same(Checkpoint.open(output), model.state_dict())


def test_unneeded_tensors_are_ignored_and_listed(
    hf_model: Callable[..., Path], output: Path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = hf_model(config={"tie_word_embeddings": True}, edit=edit)
    ignored = convert(source, output, ConvertSettings()).data["ignored_source_tensors"]
    assert ignored["rotary frequencies are computed from the config"]["count"] == 2
    assert ignored["the output head is tied to the embedding"]["examples"] == ["lm_head.weight"]
    assert "head.weight" not in Checkpoint.open(output).tensors


def test_a_head_that_differs_though_tied_is_used(
    hf_model: Callable[..., Path], output: Path
) -> None:
    warnings: list[str] = []
    source = hf_model(config={"tie_word_embeddings": True})
    convert(source, output, ConvertSettings(), warn=warnings.append)
    assert "head.weight" in Checkpoint.open(output).tensors
    assert any("converted as untied" in warning for warning in warnings)


def test_no_head_and_not_tied_is_an_error(hf_model: Callable[..., Path], output: Path) -> None:
    source = hf_model(edit=lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(SourceError, match=r"missing tensors \(1\): lm_head\.weight"):
        convert(source, output, ConvertSettings())
