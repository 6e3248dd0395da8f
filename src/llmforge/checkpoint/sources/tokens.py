"""What a model's tokenizer files tell about its tokens: how many, and which begin and end a text.

Other layouts than Hugging Face's leave this to the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        raw = model.read_bytes()
        return _sentencepiece(raw) if raw[:1] == b"\n" else Tokens()
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
    """From a ModelProto: field 1 is a piece, field 2 the TrainerSpec, whose fields 41 and 42 are
    the ids of begin and end (https://github.com/google/sentencepiece,
    src/sentencepiece_model.proto). A negative id stands for "none"."""
    pieces, bos, eos = 0, 1, 2
    for field, value in _protobuf(raw):
        if field == 1:
            pieces += 1
        elif field == 2 and isinstance(value, bytes):
            spec = {number: v for number, v in _protobuf(value) if isinstance(v, int)}
            bos, eos = spec.get(41, 1), spec.get(42, 2)
    return Tokens(pieces, bos if bos < pieces else None, (eos,) if eos < pieces else ())


def _protobuf(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message (https://protobuf.dev/programming-guides/encoding)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"protobuf wire type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(raw):
            raise ValueError("truncated protobuf")
        yield key >> 3, raw[at : at + size]
        at += size
