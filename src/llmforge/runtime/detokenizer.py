"""Text from tokens as they come: `IncrementalDecoder`, `StopChecker`, and both in `TextStream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are not UTF-8
_CONTEXT_TOKENS = 8
_LONGEST_CHARACTER = 4  # bytes in UTF-8


class Decodes(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


class IncrementalDecoder:
    """The text of generated tokens, piece by piece.

    A tokenizer's decoding depends on the neighbours (a leading space is stripped at the start of
    a text, a character may have its bytes in several tokens), so each token is decoded together
    with the tokens of the last piece, at first the last ones of the prompt, and the text that they
    had already is taken off. Text that ends in U+FFFD may be an incomplete character and is held
    back. The pieces together are what decoding prompt and generated tokens as a whole adds to
    the prompt's text.
    """

    def __init__(self, tokenizer: Decodes, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = self._context(prompt_ids)
        self._num_known_tokens = len(self._window)
        self._known = self._whole_characters()

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if len(text) <= self._known or text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is held back, at the end: incomplete characters become U+FFFD."""
        text = self._tokenizer.decode(self._window)
        return self._advance(text) if len(text) > self._known else ""

    def _advance(self, text: str) -> str:
        piece = text[self._known :]
        recent = self._window[self._num_known_tokens :]
        alone = self._tokenizer.decode(recent)
        # By themselves the piece's tokens may have another text: they may begin within a character.
        # Such a window is no context for the next token, so the longer one is kept.
        if alone and piece.endswith(alone):
            self._window, text = recent, alone
        self._num_known_tokens = len(self._window)
        self._known = len(text)
        return piece

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, with text (special tokens have none, and the next token
        would pass for the first), and from a character's beginning on."""
        count = _CONTEXT_TOKENS
        while True:
            context = list(prompt_ids[-count:])
            text = self._tokenizer.decode(context)
            if len(context) == len(prompt_ids) or (text and not text.startswith(REPLACEMENT)):
                return context
            count *= 2

    def _whole_characters(self) -> int:
        """Length of the context's text without an incomplete character at its end, which the
        generated tokens then complete."""
        for missing in range(_LONGEST_CHARACTER):
            text = self._tokenizer.decode(self._window[: len(self._window) - missing])
            if not text.endswith(REPLACEMENT):
                return len(text)
        return len(self._tokenizer.decode(self._window))


class StopChecker:
    """Looks for stop strings in text that comes in pieces.

    The text ends before the stop string that is complete first (of several that end at the same
    character, the longest). However the text is cut into pieces, the outcome is the same.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string is refused with the request"
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Text that cannot be part of a stop string any more. After `stopped`, nothing."""
        if self.stopped:
            return ""
        text = self._held + piece
        matches = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A request's text: decoded, and cut before its stop strings."""

    def __init__(
        self, tokenizer: Decodes, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids)
        self._checker = StopChecker(stop)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """A stop string is complete; the text ends before it."""
        return self._checker.stopped

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The next piece; often empty."""
        return self._add(self._checker.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The last piece."""
        rest = self._checker.push(self._decoder.flush())
        return self._add(rest + self._checker.flush())

    def _add(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
