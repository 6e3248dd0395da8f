"""Tokenizer directories: encoding, chat templates (compared with transformers), defaults."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest
import toy_tokenizers
from transformers import PreTrainedTokenizerFast

from llmforge.errors import RequestError, StoreError
from llmforge.runtime.tokenizer import Tokenizer, generation_defaults, load_tokenizer

CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": " Hello 🙂 "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "To be?"},
]

TEMPLATES = {
    "llama3": (
        "{{- bos_token }}\n{% for message in messages %}\n"
        "    {%- set text = '[' + message['role'] + ']\\n' + message['content'] | trim %}\n"
        "    {{- text + eos_token }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    ),
    "blocks": (
        "  {% for message in messages %}\n"
        "  {% if message.role == 'system' %}\n"
        "S:{{ message.content }}\n"
        "  {% continue %}\n"
        "  {% endif %}\n"
        "{{ message.role | upper }}: {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "  {% endfor %}\n"
        "{{ {'ü': [1, 2]} | tojson(indent=2) }}{% if tools is defined and tools %}tools{% endif %}"
    ),
    "namespace": (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content %}"
        "{% endfor %}{{ ns.last }}{{ pad_token }}"
    ),
}


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("bos_in_json", [True, False])
def test_bos_is_there_once_where_either_file_asks_for_it(tmp_path, bos_in_json, add_bos):
    config = {} if add_bos is None else {"add_bos_token": add_bos}
    tokenizer = Tokenizer(toy_tokenizers.byte_level(tmp_path, bos=bos_in_json, **config))
    ids = tokenizer.encode("To be")
    assert ids.count(0) == (1 if bos_in_json or add_bos else 0)
    assert tokenizer.decode(ids) == "To be"
    assert tokenizer.eos_token_id == 1 and tokenizer.vocab_size == 330


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    path = toy_tokenizers.byte_level(tmp_path) / "tokenizer.json"
    value = json.loads(path.read_text())
    value["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(value))
    text = "To be, or not to be, that is the question"
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["config", "list", "jinja", "json"])
def test_chat_template_gives_the_tokens_that_transformers_gives(tmp_path, name, place):
    source = TEMPLATES[name]
    config = {"pad_token": "<|end|>"}
    if place == "config":
        config["chat_template"] = source
    if place == "list":
        config["chat_template"] = [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": source},
        ]
    toy_tokenizers.byte_level(tmp_path, **config)
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    if place == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    expected = theirs.apply_chat_template(
        CHAT, chat_template=source, add_generation_prompt=True, tokenize=False
    )
    ours = tokenizer.apply_chat_template(CHAT)
    assert ours == theirs(expected, add_special_tokens=False)["input_ids"]
    assert ours.count(0) == (1 if name == "llama3" else 0)


def template(tmp_path, source):
    return Tokenizer(toy_tokenizers.byte_level(tmp_path, chat_template=source))


@pytest.mark.parametrize("named", [[{"name": "a"}], [{}], ["x"], [], [{"template": 3}]])
def test_templates_that_are_none(tmp_path, named):
    tokenizer = Tokenizer(toy_tokenizers.byte_level(tmp_path, chat_template=named))
    assert not tokenizer.has_chat_template


def test_files_that_are_not_utf8(tmp_path):
    toy_tokenizers.byte_level(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert load_tokenizer(tmp_path) is not None
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).write_bytes(b"\xff")
        with pytest.raises(StoreError, match=f"{name} is not (UTF-8|JSON)"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_strftime_now(tmp_path):
    tokenizer = template(tmp_path, "{{ strftime_now('%Y') }}")
    assert tokenizer.decode(tokenizer.apply_chat_template(CHAT)) == str(datetime.now().year)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "cannot render"),
        ("{{ 1 + messages[0].content }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% for %}", "cannot render"),
        ("{% include '/etc/passwd' %}", "cannot render"),
    ],
)
def test_a_template_that_fails_is_a_request_error(tmp_path, source, message):
    with pytest.raises(RequestError, match=message):
        template(tmp_path, source).apply_chat_template(CHAT)


def test_without_a_template_messages_are_refused(tmp_path):
    tokenizer = Tokenizer(toy_tokenizers.byte_level(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template; give the prompt as plain text"):
        tokenizer.apply_chat_template(CHAT)


def test_lone_surrogates_are_refused(tmp_path):
    tokenizer = Tokenizer(toy_tokenizers.byte_level(tmp_path))
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_no_tokenizer_and_broken_tokenizers(tmp_path):
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "absent") is None
    toy_tokenizers.byte_level(tmp_path)
    assert load_tokenizer(tmp_path) is not None
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(StoreError, match=re.escape("tokenizer_config.json is not a JSON object")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(StoreError, match=re.escape("tokenizer_config.json is not JSON")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StoreError, match=re.escape("tokenizer.json is not a tokenizer")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}, {"eos_token_ids": (2,)}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": []},
            {"temperature": 0.6, "top_k": 20},
        ),
        (
            {
                "do_sample": True,
                "repetition_penalty": 1.05,
                "eos_token_id": [0, 3],
                "max_length": 9,
            },
            {"temperature": 1.0, "repetition_penalty": 1.05, "eos_token_ids": (0, 3)},
        ),
        ({"eos_token_id": 0}, {"eos_token_ids": (0,)}),
    ],
)
def test_generation_defaults(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert generation_defaults(tmp_path) == expected
