"""Meta's Llama files."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_layout import write_meta
from models import Case

from llmforge.checkpoint.convert import convert
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]
EVEN = {"vocab_size": 104}  # divides by the ranks, as Meta's do


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("by_columns", [False, True])
def test_round_trip(
    hf: Hf, assert_same: Hf, tmp_path: Path, ranks: int, kv_heads: int, by_columns: bool
) -> None:
    case = Case("llama", "Llama", {**EVEN, "num_key_value_heads": kv_heads})
    directory, config, state = hf(case)
    assert_same(directory, write_meta(tmp_path / "meta", config, state, ranks, by_columns))


def test_vocabulary_of_minus_one_is_the_tokenizers(hf: Hf, assert_same: Hf, tmp_path: Path) -> None:
    directory, config, state = hf("llama-mha")
    meta = write_meta(tmp_path / "meta", config, state, vocab_size=-1, max_seq_len=5)
    assert assert_same(directory, meta).config.vocab_size == config["vocab_size"]


def test_the_same_head_again_is_a_tied_one(hf: Hf, assert_same: Hf, tmp_path: Path) -> None:
    directory, config, state = hf("llama-tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    meta = write_meta(tmp_path / "meta", config, state)
    assert assert_same(directory, meta).config.tied_embeddings


@pytest.mark.parametrize(
    ("params", "positions", "theta", "factor"),
    [
        ({"norm_eps": 1e-6}, 2048, 1e4, None),
        ({"norm_eps": 1e-5}, 4096, 1e4, None),
        ({"rope_theta": 1e6}, 16384, 1e6, None),
        ({"rope_theta": 5e5}, 8192, 5e5, None),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, 5e5, 8.0),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 32},
            131072,
            5e5,
            32.0,
        ),
    ],
)
def test_versions(
    hf: Hf,
    tmp_path: Path,
    params: dict[str, Any],
    positions: int,
    theta: float,
    factor: float | None,
) -> None:
    _, config, state = hf("llama")
    write_meta(tmp_path / "meta", config, state, **params)
    warnings: list[str] = []
    manifest = convert(tmp_path / "meta", tmp_path / "out", ConvertSettings(), warn=warnings.append)
    found = manifest.data["config"]
    assert found["max_position"] == positions
    assert any(f"{positions} positions are assumed" in warning for warning in warnings)
    assert found["rope"]["theta"] == theta
    assert found["rope"]["scaling"] == ("llama3" if factor else "default")
    assert found["rope"]["factor"] == (factor or 1.0)


def broken(directory: Path, what: str) -> None:
    second = directory / "consolidated.01.pth"
    params = json.loads((directory / "params.json").read_bytes())
    if what == "missing rank":
        second.unlink()
        (directory / "consolidated.03.pth").write_bytes(b"")
    elif what == "truncated":
        second.write_bytes(second.read_bytes()[:5000])
    elif what == "code":
        torch.save({"x": Path}, second)
    elif what == "one rank of two":
        second.unlink()
    elif what == "lacks a tensor":
        state = torch.load(second)
        del state["layers.1.attention.wk.weight"]
        torch.save(state, second)
    elif what == "another shape":
        state = torch.load(second)
        state["layers.1.attention.wo.weight"] = torch.zeros(3, 24, dtype=torch.bfloat16)
        torch.save(state, second)
    elif what == "moe":
        (directory / "params.json").write_text(json.dumps({**params, "moe": {"num_experts": 8}}))
    elif what == "vocabulary":
        (directory / "params.json").write_text(json.dumps({**params, "vocab_size": 7}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing rank", r"lacks consolidated\.01\.pth, consolidated\.02\.pth"),
        ("truncated", r"cannot read .*consolidated\.01\.pth: it is truncated"),
        ("code", r"consolidated\.01\.pth: it holds more than tensors"),
        ("one rank of two", r"consolidated files \(1\) hold 24 of the 48 rows"),
        ("lacks a tensor", r"ranks lack tensors .* layers\.1\.attention\.wk\.weight \(rank 1\)"),
        ("another shape", r"parts of layers\.1\.attention\.wo\.weight in .* do not fit together"),
        ("moe", r"moe is set: mixture-of-experts models are not supported"),
        ("vocabulary", r"vocab_size must be 104"),
    ],
)
def test_refusals(hf: Hf, tmp_path: Path, what: str, message: str) -> None:
    _, config, state = hf(Case("llama", "Llama", EVEN))
    broken(write_meta(tmp_path / "meta", config, state, ranks=2), what)
    with pytest.raises(SourceError, match=message) as caught:
        convert(tmp_path / "meta", tmp_path / "out", ConvertSettings())
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "meta"}


TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  Zwölf Boxkämpfer\n\njagen Viktor\tquer über 'den' großen Sylter Deich. ",
    "天地玄黄 🦊!!!",
]


@pytest.mark.parametrize("newer", [False, True])
def test_tokenizer_in_tiktokens_form(hf: Hf, tmp_path: Path, newer: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from llmforge.checkpoint.sources.meta_tokenizer import _PATTERN, _byte_letters

    tokenizers = pytest.importorskip("tokenizers")
    trained = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    ids = trained.get_vocab()
    lines = [
        base64.b64encode(bytes(bytes_of[c] for c in token)) + f" {ids[token]}".encode()
        for token in sorted(ids, key=ids.__getitem__)
    ]
    case = Case("llama", "Llama", {"vocab_size": len(ids) + 256})
    _, config, state = hf(case)
    params = {"rope_theta": 5e5, **({"use_scaled_rope": True} if newer else {})}
    meta = write_meta(tmp_path / "meta", config, state, **params)
    (meta / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    convert(meta, tmp_path / "out", ConvertSettings())
    found = Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json"))
    for text in TEXTS:
        encoded = found.encode(text).ids
        assert encoded == [len(ids), *trained.encode(text).ids]
        assert found.decode(encoded) == text
    assert found.token_to_id("<|eot_id|>") == len(ids) + 9
    assert (found.token_to_id("<|eom_id|>") == len(ids) + 8) == newer
    assert found.get_vocab_size() == config["vocab_size"]


def test_a_token_that_no_merges_lead_to(hf: Hf, tmp_path: Path) -> None:
    """It stands for a whole word, as in tiktoken, and for no part of one."""
    from tokenizers import Tokenizer

    listed = [bytes([byte]) for byte in range(256)] + [b"xyz"]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(listed)]
    _, config, state = hf(Case("llama", "Llama", {"vocab_size": len(listed) + 256}))
    meta = write_meta(tmp_path / "meta", config, state)
    (meta / "tokenizer.model").write_bytes(b"\n".join(lines))
    convert(meta, tmp_path / "out", ConvertSettings())
    found = Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json"))
    assert found.encode("xyz", add_special_tokens=False).ids == [256]
    assert found.encode("axyz", add_special_tokens=False).ids == list(b"axyz")


def test_tokenizer_of_sentencepiece_is_kept(hf: Hf, tmp_path: Path) -> None:
    _, config, state = hf("llama")
    meta = write_meta(tmp_path / "meta", config, state)
    (meta / "tokenizer.model").write_bytes(b"\n\x05\n\x03<s>")
    convert(meta, tmp_path / "out", ConvertSettings())
    assert (tmp_path / "out/tokenizer/tokenizer.model").read_bytes() == b"\n\x05\n\x03<s>"


def test_a_model_in_two_layouts(hf: Hf, tmp_path: Path) -> None:
    directory, config, state = hf("llama")
    meta = write_meta(tmp_path / "meta", config, state)
    for path in meta.iterdir():
        path.rename(directory / path.name)
    warnings: list[str] = []
    notices: list[str] = []
    convert(
        directory,
        tmp_path / "out",
        ConvertSettings(),
        warn=warnings.append,
        notice=notices.append,
    )
    assert notices == ["source: Hugging Face model, family llama"]
    assert any(
        "holds the model in two layouts: that of Hugging Face is read" in w for w in warnings
    )
    (directory / "model.safetensors").unlink()
    notices.clear()
    convert(directory, tmp_path / "again", ConvertSettings(), notice=notices.append)
    assert notices == ["source: Meta's Llama files, 1 shard"]
