"""sentencepiece models (tokenizer.model) → tokenizer.json, as the model's own specification says.

The file is a ModelProto (https://github.com/google/sentencepiece, src/sentencepiece_model.proto):
pieces with scores, how the text is normalised before, and whether pieces are merged (BPE) or chosen
by likelihood (Unigram). sentencepiece itself is not needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER = 1, 3, 4


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePiece:
    """What the parts of a ModelProto that matter say. A negative id stands for "none"."""

    pieces: Sequence[Piece]
    model_type: int
    byte_fallback: bool
    suffix_space: bool
    unk: int
    bos: int
    eos: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool

    def has(self, index: int) -> bool:
        return 0 <= index < len(self.pieces)


def parse(raw: bytes) -> SentencePiece:
    """Raises ValueError where it is no ModelProto."""
    try:
        return _parse(raw)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"tokenizer.model is no sentencepiece model: {error}") from error


def _parse(raw: bytes) -> SentencePiece:
    pieces = []
    trainer: Mapping[int, Any] = {}
    normalizer: Mapping[int, Any] = {}
    for field, value in _fields(raw):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(2, b"\0\0\0\0")))[0]
            pieces.append(Piece(_bytes(piece[1]).decode(), score, int(piece.get(3, _NORMAL))))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePiece(
        pieces=pieces,
        model_type=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        suffix_space=bool(trainer.get(24, 0)),
        unk=_id(trainer.get(40, 0)),
        bos=_id(trainer.get(41, 1)),
        eos=_id(trainer.get(42, 2)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
    )


def config(model: SentencePiece) -> dict[str, Any]:
    """A tokenizer_config.json: the tokens that begin and end a text, and that one begins it."""
    named = {"bos_token": model.bos, "eos_token": model.eos}
    found = {name: model.pieces[i].text for name, i in named.items() if model.has(i)}
    return {"add_bos_token": model.has(model.bos), **found}


def tokenizer(model: SentencePiece) -> Any:
    """A `tokenizers.Tokenizer` that gives the same ids. Raises ValueError for what it cannot
    express."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

    if model.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"sentencepiece models of type {model.model_type} are not supported")
    if model.suffix_space or not model.escape_spaces:
        raise ValueError("sentencepiece models that treat spaces in another way are not supported")
    made = Tokenizer(_bpe(model) if model.model_type == _BPE else _unigram(model))
    made.normalizer = _normalizer(model)
    made.decoder = _decoder(model)
    own = sorted((p.text for p in model.pieces if p.kind == _USER), key=len, reverse=True)
    if own:  # pieces that the user gave are found before anything is merged
        pattern = Regex("|".join(map(re.escape, own)))
        made.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    special = [p.text for p in model.pieces if p.kind == _CONTROL]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def _bpe(model: SentencePiece) -> Any:
    from tokenizers import models

    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    merges = []
    mergeable = {p.text: p.score for p in model.pieces if p.kind in (_NORMAL, _USER)}
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-score, vocabulary[text], (left, right)))
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocabulary,
        [pair for _, _, pair in merges],
        unk_token=model.pieces[model.unk].text if model.unk >= 0 else None,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=any(piece.kind == _USER for piece in model.pieces),
    )


def _unigram(model: SentencePiece) -> Any:
    from tokenizers import models

    # Pieces that no text is cut into must not be chosen: their score is the worst there is.
    worst = min(piece.score for piece in model.pieces) - 100.0
    scores = [(p.text, p.score if p.kind in (_NORMAL, _USER) else worst) for p in model.pieces]
    return models.Unigram(scores, model.unk, model.byte_fallback)


def _normalizer(model: SentencePiece) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: SentencePiece) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _id(value: int) -> int:
    """An int32, which the format writes in 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a string should be")
    return value


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers, or bytes
    (https://protobuf.dev/programming-guides/encoding)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(raw) or shift > 63:
                raise ValueError("truncated")
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
            raise ValueError(f"wire type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(raw):
            raise ValueError("truncated")
        yield key >> 3, raw[at : at + size]
        at += size
