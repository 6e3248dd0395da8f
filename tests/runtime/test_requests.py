"""JSON-lines prompts, their errors, and what overrides what."""

from __future__ import annotations

import json

import pytest
import toy_tokenizers
from toy_model import VOCAB, limits

from llmforge.engine.step import SamplingParams
from llmforge.errors import RequestError
from llmforge.runtime.requests import (
    Completion,
    PromptEntry,
    parse_jsonl,
    resolve,
    resolve_all,
)
from llmforge.runtime.scheduler import refusal
from llmforge.runtime.tokenizer import Tokenizer
from llmforge.settings import RunSettings

IDS = PromptEntry("--prompt 1", token_ids=(1, 2))


def test_a_completion_prints_exactly_the_promised_keys():
    done = Completion(3, "ab", (4, 5), "stop", 7, 0.1, 0.2, 2)
    assert done.to_json() == {
        "index": 3,
        "text": "ab",
        "token_ids": [4, 5],
        "finish_reason": "stop",
        "prompt_tokens": 7,
    }
    assert list(done.to_json()) == ["index", "text", "token_ids", "finish_reason", "prompt_tokens"]


def test_lines_of_every_kind():
    lines = [
        '{"prompt": "To be"}\n',
        "\n",
        '{"token_ids": [1, 2], "temperature": 1, "top_k": 5, "stop": "x", "ignore_eos": true}',
        '{"messages": [{"role": "user", "content": "hi"}], "stop": ["a", "b"], "seed": 9}',
        "   ",
    ]
    text, ids, chat = parse_jsonl(lines, "p.jsonl")
    assert text == PromptEntry("p.jsonl line 1", prompt="To be")
    assert ids.token_ids == (1, 2) and ids.source == "p.jsonl line 3"
    assert ids.fields == {"temperature": 1.0, "top_k": 5, "stop": ("x",), "ignore_eos": True}
    assert isinstance(ids.fields["temperature"], float)
    assert chat.messages == ({"role": "user", "content": "hi"},)
    assert chat.fields == {"stop": ("a", "b"), "seed": 9}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl line 1 is not JSON"),
        ("[" * 100_000, "p.jsonl line 1 is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "a key is given twice"),
        ('"To be"', '"To be" is not a JSON object'),
        ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; did you mean 'temp"),
        ('{"prompt": "a", "zzz": 1}', r"unknown key 'zzz' \(allowed: prompt, token_ids, mess"),
        ('{"temperature": 1}', "no prompt given; give exactly one of prompt, token_ids, mess"),
        ('{"prompt": "a", "token_ids": [1]}', "prompt and token_ids given; give exactly one"),
        ('{"prompt": 5}', "prompt is 5; it must be a string"),
        ('{"token_ids": "1 2"}', "it must be a list of integers"),
        ('{"token_ids": [1, true]}', r"token_ids is \[1, true\]; it must be a list of integers"),
        ('{"token_ids": [1.0]}', "it must be a list of integers"),
        ('{"messages": []}', r"messages is \[\]; it must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', 'the strings "role" and "content"'),
        ('{"messages": {"role": "user", "content": "x"}}', "messages is"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0; it must be at least 1"),
        ('{"prompt": "a", "max_new_tokens": 2.5}', "max_new_tokens is 2.5; .*an integer"),
        ('{"prompt": "a", "max_new_tokens": null}', "max_new_tokens is null; .*an integer"),
        ('{"prompt": "a", "temperature": "hot"}', 'temperature is "hot"; it must be a number'),
        ('{"prompt": "a", "temperature": NaN}', "temperature is NaN; it must be a number"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1; it must be at least 0"),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "it must be at most"),
        ('{"prompt": "a", "top_p": 1.5}', "top_p is 1.5; it must be at most 1"),
        ('{"prompt": "a", "min_p": -0.1}', "min_p is -0.1; it must be at least 0"),
        ('{"prompt": "a", "top_k": true}', "top_k is true; it must be an integer"),
        ('{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty is 0; it must be at le"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "seed is .*; it must be at most 184"),
        ('{"prompt": "a", "stop": ""}', 'stop is ""; it must be a string that is not empty'),
        ('{"prompt": "a", "stop": [1]}', r"stop is \[1\]"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos is 1; it must be true or false"),
    ],
)
def test_bad_lines_name_file_line_and_remedy(line, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_jsonl([line], "p.jsonl")
    assert str(caught.value).startswith("p.jsonl line 1")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_every_bad_line_is_in_one_message():
    with pytest.raises(RequestError) as caught:
        parse_jsonl(['{"prompt": "a"}', "{", '{"prompt": 1}'], "p.jsonl")
    assert "p.jsonl line 2 is not JSON" in str(caught.value)
    assert "; p.jsonl line 3: prompt is 1" in str(caught.value)


@pytest.mark.parametrize("lines", [[], ["", "  \n"]])
def test_a_file_without_prompts_is_refused(lines):
    with pytest.raises(RequestError, match=r"empty\.jsonl has no prompts"):
        parse_jsonl(lines, "empty.jsonl")


def test_entry_over_settings_over_generation_config_over_off():
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_ids": (7,)}
    settings = RunSettings(top_p=0.5, min_p=0.1, seed=4, max_new_tokens=9)
    entry = PromptEntry("p", token_ids=(1,), fields={"min_p": 0.2, "seed": 5, "ignore_eos": True})
    request = resolve(2, entry, settings, defaults, None, eos_token_ids=(8,))
    assert request.sampling == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.5, min_p=0.2, seed=5
    )
    assert (request.index, request.max_new_tokens, request.ignore_eos) == (2, 9, True)
    assert request.eos_token_ids == {7}
    plain = resolve(0, IDS, RunSettings(), {}, None, eos_token_ids=(8, 9))
    assert plain.sampling == SamplingParams() and plain.max_new_tokens == 128
    assert plain.eos_token_ids == {8, 9} and not plain.ignore_eos
    off = PromptEntry("p", token_ids=(1,), fields={"temperature": 0.0, "stop": ()})
    assert resolve(0, off, RunSettings(), defaults, None).sampling.greedy


def test_a_bad_value_of_the_generation_config_is_named_as_such():
    defaults = {"temperature": "hot", "top_k": 50.0}
    with pytest.raises(RequestError) as caught:
        resolve(0, IDS, RunSettings(top_k=4), defaults, None)
    assert str(caught.value) == (
        '--prompt 1: temperature is "hot"; it must be a number; the model\'s '
        "generation_config.json has it: give another, with the prompt or with --temperature"
    )
    both = RunSettings(top_k=4, temperature=0.5)
    assert resolve(0, IDS, both, defaults, None).sampling == SamplingParams(
        temperature=0.5, top_k=4
    )


def test_text_is_encoded_and_chat_uses_the_template(tmp_path):
    source = "[{{ messages[0].role }}]{{ messages[0].content }}"
    tokenizer = Tokenizer(toy_tokenizers.byte_level(tmp_path, chat_template=source))
    text = PromptEntry("p", prompt="To be")
    chat = PromptEntry("p", messages=({"role": "user", "content": "To be"},))
    plain = resolve(0, text, RunSettings(), {}, tokenizer)
    assert plain.token_ids == tuple(tokenizer.encode("To be")) and plain.eos_token_ids == {1}
    by_flag = resolve(0, text, RunSettings(chat=True), {}, tokenizer).token_ids
    assert by_flag == resolve(0, chat, RunSettings(), {}, tokenizer).token_ids
    assert tokenizer.decode(by_flag) == "[user]To be"
    assert resolve(0, IDS, RunSettings(chat=True), {}, tokenizer).token_ids == (1, 2)


@pytest.mark.parametrize(
    ("entry", "settings", "message"),
    [
        (PromptEntry("--prompt 1", prompt="a"), RunSettings(), "--prompt 1: a prompt of text can"),
        (IDS, RunSettings(stop=("x",)), "--prompt 1: stop strings cannot be used, since the eng"),
        (IDS, RunSettings(temperature=-1.0), "temperature is -1.0"),
        (IDS, RunSettings(stop=("",)), "stop is"),
    ],
)
def test_what_cannot_be_resolved(entry, settings, message):
    with pytest.raises(RequestError, match=message):
        resolve(0, entry, settings, {}, None)


def test_resolve_all_reports_every_entry_with_its_source():
    entries = parse_jsonl(
        [json.dumps({"token_ids": ids}) for ids in ([], [1], [VOCAB])] + ['{"prompt": "x"}'], "p"
    )
    settings = RunSettings(max_new_tokens=4)
    with pytest.raises(RequestError) as caught:
        resolve_all(
            entries, settings, {}, None, refusal=lambda each: refusal(each, limits(), VOCAB)
        )
    assert "p line 1: the prompt is empty" in str(caught.value)
    assert f"p line 3: token id {VOCAB}" in str(caught.value)
    assert "p line 4: a prompt of text" in str(caught.value) and "line 2" not in str(caught.value)
    good = resolve_all(entries[1:2], settings, {}, None)
    assert good[0].index == 0 and good[0].token_ids == (1,)
