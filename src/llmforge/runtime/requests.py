"""What is asked for and what comes back: prompts as JSON lines, `Request`, `Completion`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from llmforge.engine.step import SamplingParams
from llmforge.errors import RequestError
from llmforge.settings import RunSettings

if TYPE_CHECKING:
    from llmforge.runtime.tokenizer import Tokenizer

FinishReason = Literal["length", "stop", "eos"]

PROMPT_FIELDS = ("prompt", "token_ids", "messages")
SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty",
)  # fmt: skip
REQUEST_FIELDS = ("max_new_tokens", *SAMPLING_FIELDS, "seed", "stop", "ignore_eos")

_SETTINGS = {setting.name: setting for setting in fields(RunSettings)}
_WHOLE_NUMBERS = ("max_new_tokens", "top_k", "seed")
_LARGEST = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    index: names the request; those that are served together have different ones.
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


@dataclass(frozen=True)
class PromptEntry:
    """A prompt as given: exactly one of text, token ids, or the messages of a conversation.

    source: where it stands, for errors ("prompts.jsonl line 3").
    fields: its own values of `REQUEST_FIELDS`, checked.
    """

    source: str
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def parse_jsonl(lines: Iterable[str], source_name: str) -> list[PromptEntry]:
    """The prompts of JSON lines, each an object with one of `PROMPT_FIELDS` and any of
    `REQUEST_FIELDS`. Blank lines are skipped. Raises one RequestError that names every bad line,
    or says that there is no prompt."""
    entries: list[PromptEntry] = []
    reasons: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entries.append(_parse_line(line, f"{source_name} line {number}"))
            except RequestError as error:
                reasons.append(str(error))
    if reasons:
        raise RequestError(join_reasons(reasons))
    if not entries:
        raise RequestError(
            f'{source_name} has no prompts; give one JSON object a line, like {{"prompt": "text"}}'
        )
    return entries


def resolve(
    index: int,
    entry: PromptEntry,
    settings: RunSettings,
    defaults: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    eos_token_ids: Sequence[int] = (),
) -> Request:
    """The request that an entry asks for.

    Each field is the entry's own, else the settings' where they give one, else the generation
    config's (`defaults`, from `generation_defaults`), else off. The end-of-sequence tokens are the
    generation config's, else the model config's `eos_token_ids`, else the tokenizer's. Raises
    RequestError, with the entry's source, where that is no request.
    """

    def value(name: str) -> Any:
        return entry.fields.get(name, getattr(settings, name))

    eos = defaults.get("eos_token_ids") or tuple(eos_token_ids)
    if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    try:
        sampling = {}
        for name in SAMPLING_FIELDS:
            # Checked again here: settings may come from a caller.
            if (found := value(name)) is not None:
                sampling[name] = _check_number(name, found)
            elif name in defaults:
                sampling[name] = _check_default(name, defaults[name])
        stop = _check_stop(value("stop"))
        if stop and tokenizer is None:
            raise RequestError(_needs_tokenizer("stop strings"))
        return Request(
            index=index,
            token_ids=_token_ids(entry, settings.chat, tokenizer),
            max_new_tokens=_check_number("max_new_tokens", value("max_new_tokens")),
            sampling=SamplingParams(**sampling, seed=_check_number("seed", value("seed"))),
            stop=stop,
            eos_token_ids=frozenset(eos),
            ignore_eos=value("ignore_eos"),
        )
    except RequestError as error:
        raise RequestError(f"{entry.source}: {error}") from error


def resolve_all(
    entries: Sequence[PromptEntry],
    settings: RunSettings,
    defaults: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    eos_token_ids: Sequence[int] = (),
    refusal: Callable[[Request], str | None] = lambda request: None,
) -> list[Request]:
    """`resolve` each entry, numbered in order. Raises one RequestError that names every bad one.

    refusal: says why the engine cannot serve a request, if so (`scheduler.refusal`).
    """
    requests: list[Request] = []
    reasons: list[str] = []
    for index, entry in enumerate(entries):
        try:
            request = resolve(index, entry, settings, defaults, tokenizer, eos_token_ids)
            requests.append(request)
            if reason := refusal(request):
                reasons.append(f"{entry.source}: {reason}")
        except RequestError as error:
            reasons.append(str(error))
    if reasons:
        raise RequestError(join_reasons(reasons))
    return requests


def join_reasons(reasons: Sequence[str], shown: int = 10) -> str:
    """Many faults as one line."""
    more = len(reasons) - shown
    return "; ".join(reasons[:shown]) + (f"; and {more} more" if more > 0 else "")


def _parse_line(line: str, source: str) -> PromptEntry:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{source} is not JSON ({error}); each line is one JSON object, like "
            '{"prompt": "text"}'
        ) from error
    try:
        return _entry(value, source)
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _entry(value: Any, source: str) -> PromptEntry:
    if not isinstance(value, dict):
        raise RequestError(
            f'{_shown(value)} is not a JSON object; each line is one, like {{"prompt": "text"}}'
        )
    known = (*PROMPT_FIELDS, *REQUEST_FIELDS)
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"unknown key {name!r}{hint} (allowed: {', '.join(known)})")
    given = [name for name in PROMPT_FIELDS if name in value]
    if len(given) != 1:
        raise RequestError(
            f"{' and '.join(given) if given else 'no prompt'} given; "
            f"give exactly one of {', '.join(PROMPT_FIELDS)}"
        )
    own = {name: _check_field(name, value[name]) for name in REQUEST_FIELDS if name in value}
    prompt = value[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str):
            raise RequestError(f"prompt is {_shown(prompt)}; it must be a string")
        return PromptEntry(source, prompt=prompt, fields=own)
    if given == ["token_ids"]:
        if not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
            raise RequestError(f"token_ids is {_shown(prompt)}; it must be a list of integers")
        return PromptEntry(source, token_ids=tuple(prompt), fields=own)
    return PromptEntry(source, messages=_check_messages(prompt), fields=own)


def _check_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    ok = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not ok or not messages:
        raise RequestError(
            f"messages is {_shown(messages)}; it must be a list of objects, each with the strings "
            '"role" and "content"'
        )
    return tuple(messages)


def _check_field(name: str, value: Any) -> Any:
    """The value of one of `REQUEST_FIELDS`, as `Request` has it; RequestError where it is bad."""
    if name == "stop":
        return _check_stop(value)
    if name == "ignore_eos":
        if not isinstance(value, bool):
            raise RequestError(f"ignore_eos is {_shown(value)}; it must be true or false")
        return value
    return _check_number(name, value)


def _check_number(name: str, value: Any) -> Any:
    """A number within the bounds that `RunSettings` gives the field."""
    whole = name in _WHOLE_NUMBERS
    if not (type(value) is int or (type(value) is float and not whole and math.isfinite(value))):
        raise RequestError(
            f"{name} is {_shown(value)}; it must be {'an integer' if whole else 'a number'}"
        )
    minimum = _SETTINGS[name].metadata["minimum"]
    maximum = _SETTINGS[name].metadata["maximum"]
    if maximum is None:
        maximum = _LARGEST  # a seed has 64 bits; more is of no use elsewhere
    if minimum is not None and value < minimum:
        raise RequestError(f"{name} is {value}; it must be at least {minimum}")
    if value > maximum:
        raise RequestError(f"{name} is {value}; it must be at most {maximum}")
    return value if whole else float(value)


def _check_default(name: str, value: Any) -> Any:
    """A number of the model's generation config."""
    try:
        return _check_number(name, value)
    except RequestError as error:
        raise RequestError(
            f"{error}; the model's generation_config.json has it: give another, with the prompt or "
            f"with --{name.replace('_', '-')}"
        ) from error


def _check_stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list | tuple) or not all(
        isinstance(text, str) and text for text in stop
    ):
        raise RequestError(
            f"stop is {_shown(value)}; it must be a string that is not empty, or a list of such"
        )
    return tuple(stop)


def _token_ids(entry: PromptEntry, chat: bool, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The prompt, encoded; with `chat`, text is a user's message. Token ids stay as they are."""
    if entry.token_ids is not None:
        return entry.token_ids
    if tokenizer is None:
        raise RequestError(_needs_tokenizer("a prompt of text"))
    messages: Sequence[Mapping[str, Any]] | None = entry.messages
    if messages is None and chat:
        messages = [{"role": "user", "content": entry.prompt}]
    if messages is not None:
        return tuple(tokenizer.apply_chat_template(messages))
    assert entry.prompt is not None
    return tuple(tokenizer.encode(entry.prompt))


def _needs_tokenizer(what: str) -> str:
    return (
        f"{what} cannot be used, since the engine has no tokenizer; give token_ids, or convert "
        "the model again from a source with tokenizer.json"
    )


def _shown(value: Any, length: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[: length - 3]}..."
