"""What a model's tokenizer files tell about its tokens: how many, and which begin and end a text.

Other layouts than Hugging Face's leave this to the tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.checkpoint import sentencepiece

_BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True)
class Tokens:
    """`size`: one more than the largest id, or None where nothing tells."""

    size: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()


def tokens(directory: Path) -> Tokens:
    """What the tokenizer files in `directory` tell; files that are not what they should be tell
    nothing, since copying them says what is wrong."""
    try:
        found = _from_files(directory)
        generation = directory / "generation_config.json"
        if generation.is_file():
            ends = json.loads(generation.read_bytes()).get("eos_token_id")
            ids = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
            found = Tokens(found.size, found.bos, tuple(dict.fromkeys((*found.eos, *ids))))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError):
        return Tokens()
    return found


def _from_files(directory: Path) -> Tokens:
    whole, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if whole.is_file():
        data = json.loads(whole.read_bytes())
        ids = _vocabulary(data["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in data.get("added_tokens", ())}
        return _named(ids, _config(directory))
    if model.is_file():
        return _sentencepiece(model.read_bytes())
    vocabulary = directory / "vocab.json"
    if vocabulary.is_file():
        ids = json.loads(vocabulary.read_bytes())
        added = directory / "added_tokens.json"
        if added.is_file():
            ids |= json.loads(added.read_bytes())
        return _named(ids, _config(directory))
    return Tokens()


def _vocabulary(vocabulary: Any) -> dict[str, int]:
    """Token → id; Unigram models list tokens with their scores in order."""
    if isinstance(vocabulary, list):
        return {token: index for index, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _named(ids: dict[str, int], config: dict[str, Any]) -> Tokens:
    def declared(name: str) -> str | None:
        token = config.get(name)
        return token["content"] if isinstance(token, dict) else token

    begin, end = declared("bos_token"), declared("eos_token")
    begins = [begin] if begin else _BEGINS
    ends = [end] if end else _ENDS
    return Tokens(
        max(ids.values()) + 1,
        next((ids[token] for token in begins if token in ids), None),
        next(((ids[token],) for token in ends if token in ids), ()),
    )


def _sentencepiece(raw: bytes) -> Tokens:
    model = sentencepiece.parse(raw)
    bos = model.bos if model.has(model.bos) else None
    return Tokens(len(model.pieces), bos, (model.eos,) if model.has(model.eos) else ())
