"""sentencepiece models against what sentencepiece 0.2 gave for them (tests/sources/
sentencepiece_models: small models trained on a few lines, and its encodings of some texts)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llmforge.checkpoint.sentencepiece import parse, tokenizer
from llmforge.checkpoint.tokenizer_files import copy_tokenizer

MODELS = Path(__file__).parents[1] / "sources/sentencepiece_models"
EXPECTED: dict[str, Any] = json.loads((MODELS / "expected.json").read_bytes())


@pytest.mark.parametrize("name", EXPECTED)
def test_the_same_ids(name: str) -> None:
    model = parse((MODELS / f"{name}.model").read_bytes())
    expected = EXPECTED[name]
    assert len(model.pieces) == expected["size"]
    assert [i if model.has(i) else -1 for i in (model.bos, model.eos)] == [
        expected["bos"],
        expected["eos"],
    ]
    made = tokenizer(model)
    for text, ids in expected["ids"].items():
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        # It writes what is not in its vocabulary as "⁇".
        if "⁇" not in expected["decoded"][text]:
            assert made.decode(ids) == expected["decoded"][text]


def test_a_model_alone_becomes_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((MODELS / "bpe.model").read_bytes())
    warnings: list[str] = []
    copy_tokenizer(tmp_path, tmp_path / "out", warnings.append)
    assert not warnings
    found = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    text = "to be or not to be"
    assert found.decode(found.encode(text).ids) == text
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_bytes())
    assert config == {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    warnings: list[str] = []
    copy_tokenizer(tmp_path, tmp_path / "out", warnings.append)
    [warning] = warnings
    assert "could not be converted (tokenizer.model is no sentencepiece model" in warning
    assert not (tmp_path / "out/tokenizer.json").exists()
