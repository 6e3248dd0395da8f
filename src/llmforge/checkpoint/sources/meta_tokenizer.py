"""Meta's tokenizer.model as files that the runtime reads.

That of Llama 1 and 2 is a sentencepiece model. From Llama 3 on it is a list of tokens in tiktoken's
form, a line each: the token's bytes in base 64, and its rank. How text is cut before tokens are
merged, and the special tokens behind the list, are in Meta's code
(https://github.com/meta-llama/llama-models, models/llama3/tokenizer.py).
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmforge.artifact import Warn
from llmforge.checkpoint.tokenizer_files import TOKENIZER_JSON

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
SPECIAL = 256
_BEGIN, _END, _TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
# By their place behind the list; the others are reserved.
_NAMES = {
    0: _BEGIN,
    1: _END,
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: _TURN,
}
_NAMES_3_1 = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def unpack_tokenizer(model: Path, directory: Path, newer: bool, warn: Warn) -> Path:
    """Make the tokenizer's files in `directory`. newer: whether the special tokens are those of
    Llama 3.1 and later."""
    directory.mkdir(parents=True)
    if not model.is_file():
        return directory
    raw = model.read_bytes()
    ranks = _ranks(raw)
    if ranks is None:
        (directory / MODEL).write_bytes(raw)
        return directory
    try:
        (directory / TOKENIZER_JSON).write_text(_tokenizer(ranks, newer).to_str())
    except ImportError:
        warn("converting tokenizer.model needs tokenizers: pip install tokenizers")
        return directory
    config = {"bos_token": _BEGIN, "eos_token": _END}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def _ranks(raw: bytes) -> dict[bytes, int] | None:
    """Token → rank, or None where this is not tiktoken's form."""
    ranks = {}
    try:
        for line in raw.split(b"\n"):
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks or None


def special_tokens(newer: bool) -> list[str]:
    """Those behind the list, in order."""
    names = {**_NAMES, **(_NAMES_3_1 if newer else {})}
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(SPECIAL))
    return [names.get(place) or next(reserved) for place in range(SPECIAL)]


def _tokenizer(ranks: Mapping[bytes, int], newer: bool) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    letters = _byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    merges = [
        (text(a), text(b))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if (pair := _last_merge(token, rank, ranks))
        for a, b in [pair]
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = special_tokens(newer)
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A",
        pair=f"{_BEGIN} $A {_BEGIN} $B",
        special_tokens=[(_BEGIN, len(ranks))],
    )
    return tokenizer


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that became this one: what merging its bytes, lowest rank first, leaves when
    only tokens of a lower rank are there."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = ((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        lowest, at = min(pairs)
        if lowest >= rank:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (as GPT-2's
    code has it: printable bytes stand for themselves, the others for what follows 255)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
