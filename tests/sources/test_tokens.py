"""Tokenizers that come with other layouts, and what they tell about a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nemo_layout import NemoWriter, as_yaml, nemo1_config, pack
from parts import model_parts
from trtllm_layout import write_trtllm

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.sources.tokens import Tokens, tokens
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as they are in 64 bits
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces: int, **ids: int) -> bytes:
    """A ModelProto (github.com/google/sentencepiece, sentencepiece_model.proto)."""
    names = ["<unk>", "<s>", "</s>", *(f"p{i}" for i in range(3, pieces))]
    score = varint(2 << 3 | 5) + b"\0\0\x80\xbf"
    model = b"".join(field(1, field(1, n.encode()) + score + field(3, 1)) for n in names)
    numbers = {"bos_id": 41, "eos_id": 42}
    spec = field(3, 2) + b"".join(field(numbers[name], value) for name, value in ids.items())
    return model + field(2, spec)


@pytest.mark.parametrize(
    ("ids", "bos", "eos"),
    [({}, 1, (2,)), ({"bos_id": 3, "eos_id": 4}, 3, (4,)), ({"bos_id": -1}, None, (2,))],
)
def test_sentencepiece(
    tmp_path: Path, ids: dict[str, int], bos: int | None, eos: tuple[int, ...]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(300, **ids))
    assert tokens(tmp_path) == Tokens(300, bos, eos)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Tokens()),
        ({"vocab.json": {"a": 0, "<|endoftext|>": 7}}, Tokens(8, None, (7,))),
        (
            {"vocab.json": {"a": 0}, "added_tokens.json": {"</s>": 3, "<s>": 2}},
            Tokens(4, 2, (3,)),
        ),
        (
            {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["</s>", -1]]}}},
            Tokens(2, None, (1,)),
        ),
        (
            {
                "tokenizer.json": {
                    "model": {"vocab": {"a": 0, "<s>": 1}},
                    "added_tokens": [{"content": "[END]", "id": 9}],
                },
                "tokenizer_config.json": {"eos_token": {"content": "[END]"}, "bos_token": None},
                "generation_config.json": {"eos_token_id": [9, 4]},
            },
            Tokens(10, 1, (9, 4)),
        ),
        ({"generation_config.json": {"eos_token_id": 5}}, Tokens(None, None, (5,))),
        ({"tokenizer.json": {"model": 3}}, Tokens()),
        ({"tokenizer.json": [1]}, Tokens()),
        ({"vocab.json": {}}, Tokens()),
    ],
)
def test_json_files(tmp_path: Path, files: dict[str, Any], expected: Tokens) -> None:
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert tokens(tmp_path) == expected


@pytest.mark.parametrize("raw", [b"", b"\n", b"\n\xff\xff\xff\xff\x7f", b"{}", b"\x0b\x00" * 4])
def test_damaged_files_tell_nothing(tmp_path: Path, raw: bytes) -> None:
    for name in ("tokenizer.model", "generation_config.json"):
        (tmp_path / name).write_bytes(raw)
    assert tokens(tmp_path) == Tokens()


def test_a_tokenizer_tells_what_pads_the_vocabulary(
    hf: Hf, assert_same: Hf, tmp_path: Path
) -> None:
    directory, config, state = hf("llama-tied")
    parts = model_parts(config, state)
    files = NemoWriter(parts, padded_to=16).ranks(1, 1)
    files["0a1b_tokenizer.model"] = sentencepiece(101)
    tokenizer = {"library": "sentencepiece", "model": "nemo:0a1b_tokenizer.model"}
    files["model_config.yaml"] = as_yaml(
        nemo1_config(parts, make_vocab_size_divisible_by=16, tokenizer=tokenizer)
    )
    checkpoint = assert_same(directory, pack(tmp_path / "model", files, "tar"))
    assert checkpoint.config.vocab_size == 101
    assert checkpoint.config.eos_token_ids == (2,)
    assert (checkpoint.directory / "tokenizer/tokenizer.model").read_bytes() == sentencepiece(101)


def test_a_padding_that_nothing_explains_is_kept(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("llama")
    parts = model_parts(config, state)
    files = NemoWriter(parts, padded_to=16).ranks(1, 1)
    files["x_vocab.json"] = json.dumps({f"t{i}": i for i in range(90)}).encode()
    files["x_merges.txt"] = b""
    tokenizer = {"vocab_file": "nemo:x_vocab.json", "merge_file": "/elsewhere/x_merges.txt"}
    files["model_config.yaml"] = as_yaml(
        nemo1_config(parts, make_vocab_size_divisible_by=16, tokenizer=tokenizer)
    )
    warnings: list[str] = []
    path = pack(tmp_path / "model", files, "tar")
    manifest = convert(path, tmp_path / "out", ConvertSettings(), warn=warnings.append)
    assert manifest.data["config"]["vocab_size"] == 112
    assert any(
        "a vocabulary of 90 does not explain how many of the embedding's 112" in w for w in warnings
    )
    assert (tmp_path / "out/tokenizer/merges.txt").is_file()


def test_token_ids_of_a_tensorrt_llm_checkpoint(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("llama")
    fields = {
        "architecture": "LlamaForCausalLM",
        "position_embedding_type": "rope_gpt_neox",
        "hidden_act": "silu",
        "max_position_embeddings": 64,
    }
    trt = write_trtllm(tmp_path / "trt", config, state, fields=fields)
    (trt / "vocab.json").write_text(json.dumps({"<s>": 4, "</s>": 6}))
    found = convert(trt, tmp_path / "out", ConvertSettings()).data["config"]
    assert (found["bos_token_id"], found["eos_token_ids"]) == (4, [6])
