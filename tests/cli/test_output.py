"""How completions are printed, from whatever order they come in."""

from __future__ import annotations

import io
import json

import pytest

from llmforge.cli.console import print_table, progress
from llmforge.cli.output import Printer, printer
from llmforge.runtime.requests import Completion, PromptEntry
from llmforge.settings import RunSettings

ENTRIES = [
    PromptEntry("a", prompt="To be\nor not"),
    PromptEntry("b", token_ids=(1, 2)),
    PromptEntry("c", messages=({"role": "user", "content": "Hi" * 50},)),
]


def completion(index: int, text: str | None) -> Completion:
    return Completion(index, text, (7, 8), "length", 2, 0.1, 0.2, 2)


def feed(output: Printer) -> None:
    """Three requests, interleaved; the last finishes first."""
    output.text(0, "a1 ")
    output.text(2, "c1")
    output.finish(completion(2, "c1"))
    output.text(1, "b1 ")
    output.text(0, "a2")
    output.finish(completion(0, "a1 a2"))
    output.text(1, "b2")
    output.finish(completion(1, "b1 b2"))


def test_text_comes_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    feed(printer(RunSettings(stream=True), ENTRIES))
    title = f"{'Hi' * 28}H..."
    assert capsys.readouterr().out == (
        f"=== 0: To be or not\na1 a2\n=== 1: token ids 1 2\nb1 b2\n=== 2: {title}\nc1\n"
    )


def test_the_current_request_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    output = printer(RunSettings(stream=True), ENTRIES[:2])
    output.text(1, "later")
    output.text(0, "now")
    assert capsys.readouterr().out == "=== 0: To be or not\nnow"
    output.finish(completion(0, "now!"))
    assert capsys.readouterr().out == "!\n=== 1: token ids 1 2\nlater"


def test_one_prompt_has_no_title(capsys: pytest.CaptureFixture[str]) -> None:
    printer(RunSettings(), ENTRIES[:1]).finish(completion(0, "text"))
    assert capsys.readouterr().out == "text\n"


def test_token_ids_without_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    printer(RunSettings(), ENTRIES[:1]).finish(completion(0, None))
    assert capsys.readouterr().out == "7 8\n"


@pytest.mark.parametrize(("stream", "order"), [(False, [0, 1, 2]), (True, [2, 0, 1])])
def test_json_lines(stream: bool, order: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    feed(printer(RunSettings(json=True, stream=stream), ENTRIES))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == order
    assert lines[order.index(0)] == {
        "index": 0,
        "text": "a1 a2",
        "token_ids": [7, 8],
        "finish_reason": "length",
        "prompt_tokens": 2,
    }


def test_tables_are_whole_when_piped() -> None:
    file = io.StringIO()
    print_table("T", ("name", "n"), [("x" * 300, 1), ("[red]", None)], right=(1,), file=file)
    lines = file.getvalue().splitlines()
    assert any("x" * 300 in line for line in lines) and any("[red]" in line for line in lines)
    assert "\x1b" not in file.getvalue() and all(line == line.rstrip() for line in lines)


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        for done in range(0, 101, 10):
            report("reading", done * 10**6, 100 * 10**6)
        report("writing", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 0.1 GB"
    assert lines[1].startswith("reading: done in ")
    assert lines[2:] == ["writing: 0.0 MB"]  # it was not finished
