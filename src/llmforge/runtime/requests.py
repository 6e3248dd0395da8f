"""What is asked for and what comes back: `Request` and `Completion`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llmforge.engine.step import SamplingParams

FinishReason = Literal["length", "stop", "eos"]


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    index: names the request; a session's live requests have different ones.
    stop: text that ends the generation; needs a tokenizer.
    eos_token_ids: tokens that end it, unless `ignore_eos`.
    """

    index: int
    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Completion:
    """A request's outcome.

    token_ids: the generated tokens. The end-of-sequence token is not among them; the token that
        completed a stop string is the last of them.
    text: their text, which ends before the stop string; None without a tokenizer.
    finish_reason: "eos" (an end-of-sequence token was drawn), "stop" (a stop string appeared)
        or "length" (max_new_tokens, or the engine's max_seq_len, was reached).
    ttft: seconds from submission to the first token. latency: ... to the last.
    num_drawn: tokens drawn, the end-of-sequence token included.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    ttft: float
    latency: float
    num_drawn: int

    def to_json(self) -> dict[str, Any]:
        """The line that `llmforge run --json` prints."""
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
        }
