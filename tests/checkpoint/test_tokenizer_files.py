"""The tokenizer travels with the weights, and never stops them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.tokenizer_files import copy_tokenizer
from llmforge.runtime.tokenizer import generation_defaults, load_tokenizer
from llmforge.settings import ConvertSettings

TEXT = "the quick brown fox jumps over the lazy dog, twice: the fox, the dog. Übermut and 日本"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def test_all_files_travel(hf_model: Callable[..., Path], output: Path, trained: Tokenizer) -> None:
    source = hf_model()
    trained.save(str(source / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("not this")
    warnings: list[str] = []
    manifest = convert(source, output, ConvertSettings(), warn=warnings.append)
    assert warnings == []
    names = sorted(path.name for path in (output / "tokenizer").iterdir())
    assert names == [
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {f"tokenizer/{name}" for name in names} <= set(manifest.files)
    copied = Tokenizer.from_file(str(output / "tokenizer" / "tokenizer.json"))
    assert copied.encode(TEXT).ids == trained.encode(TEXT).ids


@pytest.mark.parametrize("with_transformers", [True, False])
def test_vocab_and_merges_are_converted(
    tmp_path: Path,
    trained: Tokenizer,
    with_transformers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    trained.model.save(str(source))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|end|>"})
    )
    if not with_transformers:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: None if name == "transformers" else real(name),
        )
    warnings: list[str] = []
    names = copy_tokenizer(source, destination, warnings.append)
    assert warnings == []
    assert names[0] == "tokenizer.json"
    made = Tokenizer.from_file(str(destination / "tokenizer.json"))
    assert made.encode(TEXT).ids == trained.encode(TEXT).ids
    assert made.decode(made.encode(TEXT).ids) == TEXT


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "there is no tokenizer in"),
        ({"generation_config.json": "{}"}, "there is no tokenizer.json, tokenizer.model or"),
        ({"tokenizer.json": "{nope"}, "cannot be loaded"),
        ({"tokenizer.model": "garbage"}, "could not be converted"),
        ({"vocab.json": "{}", "merges.txt": "a b c d"}, None),
    ],
)
def test_trouble_is_a_warning(tmp_path: Path, files: dict[str, str], words: str | None) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    warnings: list[str] = []
    copy_tokenizer(source, tmp_path / "destination", warnings.append)
    for warning in warnings:
        assert "\n" not in warning and "token ids only" in warning
    if words is not None:
        assert len(warnings) == 1 and words in warnings[0]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tokenizer.json", b"{}", "cannot be loaded (Model missing"),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("generation_config.json", b"null", "is not a JSON object"),
        ("chat_template.json", b"", "is not valid JSON"),
        ("chat_template.json", b"3", "is not a JSON object"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_file_stays_behind(
    tmp_path: Path, trained: Tokenizer, name: str, data: bytes, words: str
) -> None:
    """What is copied can be used: an engine would refuse the file at each run."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    trained.save(str(source / "tokenizer.json"))
    (source / name).write_bytes(data)
    warnings: list[str] = []
    written = copy_tokenizer(source, destination, warnings.append)
    assert len(warnings) == 1 and words in warnings[0] and name in warnings[0]
    assert sorted(written) == sorted(path.name for path in destination.iterdir())
    assert name not in written
    loaded = load_tokenizer(destination)
    assert (loaded is None) == (name == "tokenizer.json")
    assert generation_defaults(destination) == {}
