"""Tokenizer directories as real models have them, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles.",
    "naïve café 你好, 世界 🙂👍🏽 Привет мир",
] * 3


def byte_level(directory: Path, *, bos: bool = True, **config: Any) -> Path:
    """Byte-level BPE, as Llama 3 and Qwen have it; every byte is a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return _write(directory, tokenizer, "<|begin|>", "<|end|>", config)


def sentencepiece(directory: Path, **config: Any) -> Path:
    """BPE with a leading "▁" and byte fallback, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    merges = []
    for word in ["▁to", "▁be", "▁the", "▁question", "or", "▁not"]:
        for length in range(1, len(word) + 1):
            if word[length - 1] not in pieces:
                pieces.append(word[length - 1])
            if word[:length] not in pieces:
                pieces.append(word[:length])
            if length > 1 and (word[: length - 1], word[length - 1]) not in merges:
                merges.append((word[: length - 1], word[length - 1]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _write(directory, tokenizer, "<s>", "</s>", config)


def _write(
    directory: Path, tokenizer: tokenizers.Tokenizer, bos: str, eos: str, config: dict[str, Any]
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": bos, "special": True},
        "eos_token": eos,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
