"""Chat templates: where a model's directory keeps them, and rendering one.

A template comes with the model, so it is untrusted: it is rendered in jinja2's immutable sandbox,
with the names that transformers gives templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmforge.errors import RequestError, StoreError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]


def find_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The source of the directory's chat template: chat_template.jinja, else chat_template.json,
    else `chat_template` of tokenizer_config.json. Of several named ones, "default"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise StoreError(f"{path} is not UTF-8 ({error}); convert the model again") from error
    found = tokenizer_config.get("chat_template")
    path = directory / "chat_template.json"
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}); convert the model again") from error
        found = found.get("chat_template") if isinstance(found, dict) else found
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A template, compiled on first use.

    variables: what it sees beside `messages` and `add_generation_prompt`: the special tokens.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._source = source
        self._variables = dict(variables)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text that the assistant's answer continues. Raises RequestError
        where the template refuses the messages or fails."""
        import jinja2

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        # A template can fail in any way that Python can: "abc"|int + none, messages[7].content
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template cannot render the messages ({error}); change their roles or "
                "contents, or give a plain prompt"
            ) from error

    @cached_property
    def _template(self) -> Template:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self._source)


def _generation_tag() -> Any:
    """An extension for ``{% generation %} ... {% endgeneration %}``, with which templates mark the
    assistant's text for training; here the text just passes."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body).set_lineno(line)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
