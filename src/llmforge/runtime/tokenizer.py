"""Text ↔ token ids, from the tokenizer files that travel with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from llmforge.errors import RequestError, StoreError
from llmforge.runtime.chat import ChatTemplate, Message, find_template

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of a directory with tokenizer.json.

    Raises StoreError where a file of it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise StoreError(
                f"{path} is not a tokenizer ({error}); convert the model again"
            ) from error
        # A tokenizer.json may carry the truncation and padding of its training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special = {
            name: text
            for name in _SPECIAL_TOKENS
            if (text := _token_text(config.get(name))) is not None
        }
        self.eos_token_id = self._id(special.get("eos_token"))
        self._prefix = self._missing_bos(config, self._id(special.get("bos_token")))
        source = find_template(directory, config)
        self._template = None if source is None else ChatTemplate(source, special)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; a model's vocabulary may be larger."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts around a text.
        Raises RequestError where the text has lone surrogates."""
        return self._prefix + self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation (mappings with role and content), ready for the assistant's
        answer. The template writes the special tokens itself. Raises RequestError where there is
        no template, or where it cannot render the messages."""
        if self._template is None:
            raise RequestError(
                "the model has no chat template; give the prompt as plain text (without --chat "
                'and "messages")'
            )
        text = self._template.render(messages)
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode ({error}); correct it") from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _missing_bos(self, config: dict[str, Any], bos: int | None) -> list[int]:
        """The BOS token to put before a text, where tokenizer_config.json asks for one that
        tokenizer.json does not add."""
        if config.get("add_bos_token") is not True or bos is None:
            return []
        return [] if self._tokenizer.encode("a").ids[:1] == [bos] else [bos]


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer; None where it has no tokenizer.json (then token ids only)."""
    return Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None


def generation_defaults(directory: Path) -> dict[str, Any]:
    """What generation_config.json says: the sampling fields of `SAMPLING_DEFAULTS` that it has, if
    it samples at all (`do_sample`; temperature is 1 unless given), and "eos_token_ids", a tuple.
    Empty where there is no such file."""
    config = _read_json(directory / "generation_config.json")
    defaults: dict[str, Any] = {}
    if config.get("do_sample") is True:
        defaults = {
            name: config[name] for name in SAMPLING_DEFAULTS if config.get(name) is not None
        }
        defaults.setdefault("temperature", 1.0)
    eos = config.get("eos_token_id")
    if isinstance(eos, int):
        eos = [eos]
    if eos:
        defaults["eos_token_ids"] = tuple(eos)
    return defaults


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}); convert the model again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is not a JSON object; convert the model again")
    return value


def _token_text(token: Any) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
