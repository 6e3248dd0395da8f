"""generate() with a tokenizer: streamed text, stop strings, finish reasons."""

from __future__ import annotations

import pytest
import toy_tokenizers
from toy_model import ToyExecutable, limits

from llmforge.comm import LocalComm
from llmforge.engine.step import SamplingParams
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request
from llmforge.runtime.tokenizer import Tokenizer

VOCAB = 330


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(toy_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


def serve(tokenizer, requests):
    """Completions, the pieces of each request, and the order of events."""
    pieces = {request.index: [] for request in requests}
    ended = []

    def on_text(index, piece):
        assert piece and index not in ended
        pieces[index].append(piece)

    done = generate(
        ToyExecutable(limits(max_seq_len=64, num_blocks=64), VOCAB),
        LocalComm(),
        requests,
        vocab_size=VOCAB,
        tokenizer=tokenizer,
        on_text=on_text,
        on_finish=lambda completion: ended.append(completion.index),
    )
    assert sorted(ended) == sorted(pieces)
    return done, pieces


def request(index, stop=(), new=40):
    return Request(index, (5 + index, 6), new, SamplingParams(temperature=1.0, seed=index), stop)


def test_pieces_are_the_text_and_stop_strings_cut_it(tokenizer):
    free, pieces = serve(tokenizer, [request(index) for index in range(6)])
    for completion in free:
        assert "".join(pieces[completion.index]) == completion.text
        prompt = tokenizer.decode((5 + completion.index, 6))
        assert prompt + completion.text == tokenizer.decode(
            [5 + completion.index, 6, *completion.token_ids]
        )
    stops = {}
    for completion in free:
        text = completion.text
        start = next(at for at in range(8, len(text)) if "\ufffd" not in text[at : at + 3])
        stops[completion.index] = text[start : start + 3]
    stopped, pieces = serve(
        tokenizer, [request(index, (stop, "never there")) for index, stop in stops.items()]
    )
    for before, after in zip(free, stopped, strict=True):
        stop = stops[after.index]
        assert after.finish_reason == "stop"
        assert after.text == before.text[: before.text.index(stop)]
        assert "".join(pieces[after.index]) == after.text
        count = len(after.token_ids)
        assert after.token_ids == before.token_ids[:count] and count == after.num_drawn
        ids = [5 + after.index, 6, *after.token_ids]
        assert stop in tokenizer.decode(ids)
        assert stop not in tokenizer.decode(ids[2:-1])


def test_the_last_token_may_complete_a_stop_string(tokenizer):
    free = serve(tokenizer, [request(0)])[0][0]
    index = next(
        i
        for i in range(5, 40)
        if tokenizer.decode([free.token_ids[i]]).isascii()
        and tokenizer.decode([free.token_ids[i]]) not in tokenizer.decode(free.token_ids[:i])
    )
    stop = tokenizer.decode([free.token_ids[index]])
    done = serve(tokenizer, [request(0, (stop,), new=index + 1)])[0][0]
    assert (done.finish_reason, len(done.token_ids)) == ("stop", index + 1)


def test_text_held_back_to_the_end_may_complete_a_stop_string(tokenizer):
    for index in range(40):
        free = serve(tokenizer, [request(index, new=4)])[0][0]
        if free.text.find("\ufffd") == len(free.text) - 1:
            break
    done, pieces = serve(tokenizer, [request(index, ("\ufffd",), new=4)])
    assert done[0].finish_reason == "stop" and done[0].token_ids == free.token_ids
    assert done[0].text == free.text[:-1] == "".join(pieces[index])


def test_without_a_tokenizer_text_is_null():
    done = generate(
        ToyExecutable(limits(), VOCAB), LocalComm(), [request(0, new=3)], vocab_size=VOCAB
    )[0]
    assert done.text is None and done.to_json()["text"] is None
