"""Text as it comes: characters across tokens, leading spaces, stop strings across tokens."""

from __future__ import annotations

import pytest
import toy_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.runtime.detokenizer import IncrementalDecoder, StopChecker, TextStream
from llmforge.runtime.tokenizer import Tokenizer

TEXTS = [
    "To be, or not to be 你好, 世界 🙂👍🏽 café",
    " leading and  double   spaces ",
    "🙂🙂🙂",
    "to be or not to be the question\nto",
    "\ufffd real replacement \ufffd",
]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return Tokenizer(getattr(toy_tokenizers, request.param)(directory))


def stream(decoder, tokens):
    pieces = [decoder.push(token) for token in tokens]
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 3, 10])
def test_pieces_are_what_the_whole_decoding_adds_to_the_prompt(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    prompt, rest = ids[:cut], ids[cut:]
    whole = tokenizer.decode(ids)
    pieces = stream(IncrementalDecoder(tokenizer, prompt), rest)
    known = len(whole) - len("".join(pieces))
    assert whole == text and whole[known:] == "".join(pieces)
    if "\ufffd" not in text:
        # What is new, and the character within which the prompt ended.
        spelled = [tokenizer.decode(ids[: max(0, cut - missing)]) for missing in range(4)]
        assert known == len(next(part for part in spelled if "\ufffd" not in part))
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_the_space_of_the_first_generated_word_is_kept(tmp_path):
    tokenizer = Tokenizer(toy_tokenizers.sentencepiece(tmp_path))
    ids = tokenizer.encode("to be the")
    assert stream(IncrementalDecoder(tokenizer, ids[:1]), ids[1:])[0] == " be"
    # Special tokens have no text and are no context.
    many = [*ids[:1], *[2] * 20]
    assert stream(IncrementalDecoder(tokenizer, many), ids[1:])[0] == " be"
    assert stream(IncrementalDecoder(tokenizer, []), ids[:1])[0] == "to"


def test_each_character_comes_with_its_last_token(tmp_path):
    tokenizer = Tokenizer(toy_tokenizers.sentencepiece(tmp_path))
    ids = tokenizer.encode("to🙂")[1:]
    assert len(ids) == 4
    pieces = stream(IncrementalDecoder(tokenizer, tokenizer.encode("to")), ids)
    assert pieces == ["", "", "", "🙂", ""]
    cut = stream(IncrementalDecoder(tokenizer, tokenizer.encode("to")), ids[:2])
    assert "".join(cut) == "\ufffd\ufffd"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_never_taken_back(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cut = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.lists(st.text("abe t\ufffd", min_size=1, max_size=3), max_size=2))
    text = TextStream(tokenizer, tokens[:cut], stop)
    pieces = []
    for token in tokens[cut:]:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    assert not any(each in text.text for each in stop)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 10))
def test_any_text_comes_back(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    pieces = stream(IncrementalDecoder(tokenizer, ids[:cut]), ids[cut:])
    prompt = tokenizer.decode(ids[:cut])
    if not prompt.endswith("\ufffd"):
        assert prompt + "".join(pieces) == tokenizer.decode(ids)


def naive_stop(text, stops):
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stops):
    checker = StopChecker(stops)
    whole = "".join(pieces)
    expected, stopped = naive_stop(whole, stops)
    emitted, given_so_far = "", ""
    for piece in pieces:
        given_so_far += piece
        emitted += checker.push(piece)
        assert expected.startswith(emitted)
        if not stops:
            assert emitted == given_so_far
    emitted += checker.flush()
    assert (emitted, checker.stopped) == (expected, stopped)


def test_only_what_may_become_a_stop_string_is_held_back():
    checker = StopChecker(["\nEND"])
    assert [checker.push(piece) for piece in ["to be\n", "E", "x", "\nEN", "D more"]] == [
        "to be",
        "",
        "\nEx",
        "",
        "",
    ]
    assert checker.stopped and checker.flush() == "" and checker.push("x") == ""
