"""How `llmforge run` prints completions: text or JSON lines, as they come or in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from llmforge.cli.console import json_text
from llmforge.runtime.requests import Completion, PromptEntry
from llmforge.settings import RunSettings

_TITLE_LENGTH = 60


class Printer(Protocol):
    def text(self, index: int, piece: str) -> None:
        """More text of a request."""
        ...

    def finish(self, completion: Completion) -> None:
        """A request is done."""
        ...


def printer(settings: RunSettings, entries: Sequence[PromptEntry]) -> Printer:
    """The printer that the settings ask for."""
    if settings.json:
        return JsonPrinter(in_order=not settings.stream)
    return TextPrinter(entries)


class JsonPrinter:
    """A JSON line for each request: in the order of the requests, or as they finish."""

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._waiting: dict[int, Completion] = {}
        self._next = 0

    def text(self, index: int, piece: str) -> None:
        pass

    def finish(self, completion: Completion) -> None:
        if not self._in_order:
            self._print(completion)
            return
        self._waiting[completion.index] = completion
        while self._next in self._waiting:
            self._print(self._waiting.pop(self._next))
            self._next += 1

    def _print(self, completion: Completion) -> None:
        _write(json_text(completion.to_json()) + "\n")


class TextPrinter:
    """The generated text, in the order of the requests; with several, a title before each.

    The first request that is not done yet is printed as its text comes; what comes of later ones
    meanwhile is kept for their turn. Without a tokenizer, the token ids are printed.
    """

    def __init__(self, entries: Sequence[PromptEntry]) -> None:
        self._entries = entries
        self._buffered: list[str] = [""] * len(entries)
        self._done: dict[int, Completion] = {}
        self._printed = ""  # of the current request
        self._current = 0
        self._print_title()

    def text(self, index: int, piece: str) -> None:
        self._buffered[index] += piece
        self._flush()

    def finish(self, completion: Completion) -> None:
        self._done[completion.index] = completion
        while self._current in self._done:
            completion = self._done.pop(self._current)
            text = completion.text
            if text is None:
                text = " ".join(map(str, completion.token_ids))
            self._buffered[self._current] = text
            self._flush()
            _write("\n")
            self._current, self._printed = self._current + 1, ""
            if self._current < len(self._entries):
                self._print_title()
                self._flush()

    def _flush(self) -> None:
        """Print what is there of the current request and was not printed yet."""
        if self._current < len(self._entries):
            text = self._buffered[self._current]
            if new := text[len(self._printed) :]:
                _write(new)
                self._printed = text

    def _print_title(self) -> None:
        if len(self._entries) > 1:
            _write(f"=== {self._current}: {_title(self._entries[self._current])}\n")


def _title(entry: PromptEntry) -> str:
    """A prompt in a line."""
    if entry.token_ids is not None:
        text = "token ids " + " ".join(map(str, entry.token_ids))
    elif entry.messages is not None:
        text = str(entry.messages[-1].get("content", ""))
    else:
        text = entry.prompt or ""
    text = " ".join(text.split())
    return text if len(text) <= _TITLE_LENGTH else f"{text[: _TITLE_LENGTH - 3]}..."


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
